//! A fleet of processes that come and go one by one: real servers, a dispatcher, as many workers
//! as a test starts.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientOptions};
use remuda_lease::{LeaseOptions, LeaseStore, WorkerInfo};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries;
use crate::fleet::remuda;
use crate::process::Process;
use crate::servers::{Nats, NatsServer, RedisServer};
use crate::wait::eventually;

const PATIENCE: Duration = Duration::from_secs(60);

/// Dropping it kills everything.
#[derive(Debug)]
pub struct Cluster {
    // Before the servers, so that they have somebody to say goodbye to.
    dispatcher: Option<Process>,
    pools: Value,
    pub nats: NatsServer,
    pub redis: RedisServer,
    home: TempDir,
}

/// A worker's process.
#[derive(Debug)]
pub struct Member {
    pub process: Process,
    name: String,
}

impl Member {
    /// What its id begins with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a worker of the registry is this one.
    pub fn is(&self, info: &WorkerInfo) -> bool {
        info.record.pid == self.process.pid().as_raw().unsigned_abs()
    }

    /// Tells it to leave and waits until it has.
    pub async fn leave(self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.wait_exit(PATIENCE).await?;
        ensure!(
            status.success(),
            "worker {} left with {status}; {}",
            self.name,
            self.process.stderr_tail()
        );
        Ok(())
    }
}

impl Cluster {
    /// Servers and a dispatcher; `pools` as a dispatcher's configuration has them.
    pub async fn start(pools: Value) -> anyhow::Result<Self> {
        let home = tempfile::Builder::new()
            .prefix("remuda-test-cluster-")
            .tempdir()
            .context("cannot make a folder for the cluster")?;
        let file = home.path().join("nats.conf");
        std::fs::write(&file, "max_payload: 8388608\n").context("cannot configure nats")?;
        let args = vec!["--config".to_owned(), file.display().to_string()];
        let nats = NatsServer::start_with(Nats {
            args,
            ..Nats::default()
        })
        .await?;
        let redis = RedisServer::start().await?;
        let mut cluster = Self {
            dispatcher: None,
            pools,
            nats,
            redis,
            home,
        };
        cluster.start_dispatcher().await?;
        Ok(cluster)
    }

    /// Starts the dispatcher, where there is none.
    pub async fn start_dispatcher(&mut self) -> anyhow::Result<()> {
        let config = self.config(json!({
            "pools": self.pools,
            "streams": {
                "requests_bytes": 64 << 20, "results_bytes": 128 << 20,
                "terminals_bytes": 64 << 20,
            },
        }));
        self.dispatcher = Some(self.daemon("dispatcher", "dispatcher", &config)?);
        let leases = self.leases().await?;
        eventually("pools in the registry", PATIENCE, async || {
            match leases.pools().await {
                Ok(pools) if !pools.is_empty() => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    /// SIGKILLs the dispatcher.
    pub async fn kill_dispatcher(&mut self) -> anyhow::Result<()> {
        let dispatcher = self.dispatcher.take().context("no dispatcher runs")?;
        dispatcher.signal(Signal::SIGKILL)?;
        dispatcher.wait_exit(PATIENCE).await.map(drop)
    }

    /// Starts a worker; `options` lie over the defaults. Does not wait for it.
    pub fn start_worker(&self, name: &str, options: Value) -> anyhow::Result<Member> {
        let mut config = self.config(json!({
            "name": name,
            "sidecar": binaries::sidecar()?,
            "state_dir": self.home.path().join(name),
        }));
        merge(&mut config, options);
        Ok(Member {
            process: self.daemon("worker", name, &config)?,
            name: name.to_owned(),
        })
    }

    /// The same, and waits until it has so many idle sandboxes.
    pub async fn worker(&self, name: &str, warm: u32) -> anyhow::Result<Member> {
        let member = self.start_worker(name, json!({}))?;
        let leases = self.leases().await?;
        eventually("worker with idle sandboxes", PATIENCE, async || {
            let workers = leases.workers().await.map_err(|error| error.to_string())?;
            let info = workers.iter().find(|info| member.is(info));
            let found = info.map_or(0, |info| {
                info.record.pools.values().map(|count| count.warm).sum()
            });
            if found >= warm {
                Ok(())
            } else {
                Err(format!(
                    "{found} of {warm}; {}",
                    member.process.stderr_tail()
                ))
            }
        })
        .await?;
        Ok(member)
    }

    pub async fn leases(&self) -> anyhow::Result<LeaseStore> {
        let options = LeaseOptions {
            url: self.redis.url(),
            ..LeaseOptions::default()
        };
        LeaseStore::connect(&options)
            .await
            .context("cannot connect to redis")
    }

    /// A client of the tenant `default`.
    pub async fn client(&self, run: &str) -> anyhow::Result<Client> {
        let options = ClientOptions::new("default".parse()?, run.parse()?);
        let broker = BrokerOptions {
            url: self.nats.url(),
            ..options.broker.clone()
        };
        Client::connect(ClientOptions { broker, ..options })
            .await
            .context("cannot connect a client")
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    fn config(&self, mut own: Value) -> Value {
        own["nats"] = json!({"url": self.nats.url()});
        own["redis"] = json!({"url": self.redis.url()});
        own
    }

    fn daemon(&self, kind: &str, name: &str, config: &Value) -> anyhow::Result<Process> {
        let file = self.home.path().join(format!("{name}.yaml"));
        // JSON is YAML too.
        std::fs::write(&file, config.to_string()).context("cannot write a configuration")?;
        let mut command = remuda()?;
        command.arg(kind).arg("--config").arg(file);
        Process::spawn(command)
    }
}

fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (name, value) in over {
                merge(under.entry(name).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}
