//! Real servers and real daemons, made in the shape that a fault wants.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientOptions};
use remuda_lease::{LeaseOptions, LeaseStore};
use serde_json::json;

use super::daemon::{Daemon, Recipe};
use super::namespace::Namespace;
use super::points::{self, Points};
use super::shape::{Shape, Who, merge};
use super::volume::Volume;
use crate::binaries;
use crate::history::{Log, Recorder};
use crate::leftovers::{cgroups_of, mounts_beneath};
use crate::proxy::Proxy;
use crate::servers::{NatsServer, RedisServer};
use crate::wait::eventually;

/// Two busy cores are slow to start things.
const PATIENCE: Duration = Duration::from_secs(60);
/// A daemon that was told to end and has nothing to do.
const STOP: Duration = Duration::from_secs(45);

/// The way of one client, dispatcher or worker to its servers.
#[derive(Debug)]
pub(crate) struct Proxies {
    pub(crate) nats: Proxy,
    pub(crate) redis: Proxy,
}

/// A fleet that can be hurt. Its fields end in their order: daemons before
/// servers, servers before what they stand on.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) dispatchers: Vec<Daemon>,
    pub(crate) workers: Vec<Daemon>,
    pub(crate) nats: NatsServer,
    pub(crate) redis: RedisServer,
    pub(crate) proxies: BTreeMap<Who, Proxies>,
    pub(crate) namespaces: BTreeMap<usize, Namespace>,
    pub(crate) nats_volume: Option<Volume>,
    pub(crate) worker_volume: Option<Volume>,
    pub(crate) points: Points,
    log: Log,
    shape: Shape,
    folder: PathBuf,
}

impl World {
    /// Starts the servers, and makes everything else ready to be started, in a
    /// folder that is the world's.
    pub(crate) async fn make(shape: Shape, folder: &Path) -> anyhow::Result<Self> {
        let nats_volume = shape
            .nats_store
            .map(|bytes| Volume::create(&folder.join("nats-store"), bytes))
            .transpose()?;
        let worker_volume = shape
            .worker_state
            .map(|bytes| Volume::create(&folder.join("worker-0-state"), bytes))
            .transpose()?;
        let nats = start_nats(&shape, folder, nats_volume.as_ref()).await?;
        let redis = RedisServer::start_with(shape.redis.clone()).await?;
        let mut namespaces = BTreeMap::new();
        for worker in &shape.isolated {
            namespaces.insert(*worker, Namespace::create()?);
        }
        let log = Log::in_folder(&folder.join("history"))?;
        let mut world = Self {
            points: Points::new(folder)?,
            log,
            dispatchers: Vec::new(),
            workers: Vec::new(),
            nats,
            redis,
            proxies: BTreeMap::new(),
            namespaces,
            nats_volume,
            worker_volume,
            shape,
            folder: folder.to_path_buf(),
        };
        world.connect().await?;
        world.hire()?;
        Ok(world)
    }

    /// Starts the daemons; returns when every worker is known and sandboxes
    /// are warm.
    pub(crate) async fn up(&mut self) -> anyhow::Result<()> {
        for daemon in self.dispatchers.iter_mut().chain(&mut self.workers) {
            daemon.start()?;
        }
        self.ready().await
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where every part writes down what happens.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    async fn connect(&mut self) -> anyhow::Result<()> {
        let isolated = self
            .shape
            .isolated
            .iter()
            .map(|worker| Who::Worker(*worker));
        let who: Vec<Who> = self.shape.proxied.iter().copied().chain(isolated).collect();
        for who in who {
            let host = match who {
                Who::Worker(index) => self.namespaces.get(&index).map(Namespace::host),
                _ => None,
            };
            let host = host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
            let proxies = Proxies {
                nats: Proxy::start(host, self.nats.address()).await?,
                redis: Proxy::start(host, self.redis.address()).await?,
            };
            self.proxies.insert(who, proxies);
        }
        Ok(())
    }

    fn hire(&mut self) -> anyhow::Result<()> {
        for index in 0..self.shape.dispatchers {
            let recipe = self.recipe(Who::Dispatcher(index))?;
            self.dispatchers.push(Daemon::new(recipe));
        }
        for index in 0..self.shape.workers {
            let recipe = self.recipe(Who::Worker(index))?;
            self.workers.push(Daemon::new(recipe));
        }
        Ok(())
    }

    fn recipe(&self, who: Who) -> anyhow::Result<Recipe> {
        let (name, program, mut config) = match who {
            Who::Worker(index) => {
                let name = format!("worker-{index}");
                let mut config = self.shape.worker();
                let own = json!({
                    "name": name,
                    "sidecar": binaries::faulty_sidecar()?,
                    "state_dir": self.folder.join(format!("{name}-state")),
                });
                merge(&mut config, own);
                (name, "remuda-worker", config)
            }
            Who::Dispatcher(index) => {
                let name = format!("dispatcher-{index}");
                (name, "remuda-dispatcher", self.shape.dispatcher())
            }
            Who::Clients => anyhow::bail!("clients are no daemon"),
        };
        let ours = json!({
            "nats": {"url": self.nats_url(who)},
            "redis": {"url": self.redis_url(who)},
            "telemetry": {"history": self.log.file(&name)},
        });
        merge(&mut config, ours);
        let points = match who {
            _ if !self.shape.points => Vec::new(),
            Who::Worker(_) => points::of_workers(),
            _ => points::of_dispatchers(),
        };
        let mutation = self.shape.mutation.as_deref();
        let ours = |point: &&str| match who {
            Who::Worker(_) => !point.starts_with("dispatcher."),
            _ => point.starts_with("dispatcher."),
        };
        merge(
            &mut config,
            self.points.config(&points, mutation.filter(ours)),
        );
        let file = self.folder.join(format!("{name}.yaml"));
        // JSON is YAML too.
        std::fs::write(&file, format!("{config:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut wrap = Vec::new();
        if let Who::Worker(index) = who {
            if let Some(namespace) = self.namespaces.get(&index) {
                wrap.extend(namespace.wrap());
            }
            for (of, words) in &self.shape.worker_wrap {
                if *of == index {
                    wrap.extend(words.iter().map(Into::into));
                }
            }
        }
        let envs = self.shape.envs.iter().filter(|(of, _, _)| *of == who);
        Ok(Recipe {
            name,
            program: binaries::program(program)?,
            config: file,
            wrap,
            envs: envs
                .map(|(_, name, value)| (name.clone(), value.clone()))
                .collect(),
        })
    }

    pub(crate) fn nats_url(&self, who: Who) -> String {
        let proxied = self.proxies.get(&who).map(|proxies| proxies.nats.address());
        format!("nats://{}", proxied.unwrap_or_else(|| self.nats.address()))
    }

    fn redis_url(&self, who: Who) -> String {
        let proxied = self
            .proxies
            .get(&who)
            .map(|proxies| proxies.redis.address());
        format!(
            "redis://{}",
            proxied.unwrap_or_else(|| self.redis.address())
        )
    }

    pub(crate) fn proxies(&self, who: Who) -> anyhow::Result<&Proxies> {
        self.proxies
            .get(&who)
            .with_context(|| format!("{who:?} passes no proxy"))
    }

    /// A client for the tenant `default`, which writes down what it sees.
    pub(crate) async fn client(&self, run: &str) -> anyhow::Result<Client> {
        client(&self.nats_url(Who::Clients), run, self.log.client()).await
    }

    /// The registry, as somebody who only looks.
    pub(crate) async fn leases(&self) -> anyhow::Result<LeaseStore> {
        let options = LeaseOptions {
            url: self.redis.url(),
            ..LeaseOptions::default()
        };
        LeaseStore::connect(&options)
            .await
            .context("cannot look into Redis")
    }

    /// Returns when every worker that runs is known, and half of the pool is
    /// warm.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        let running = self.workers.iter().filter(|worker| worker.runs()).count();
        eventually("ready fleet", PATIENCE, async || {
            for daemon in self.dispatchers.iter().chain(&self.workers) {
                if let Some(process) = daemon.processes().last() {
                    let ended = process.try_exit().map_err(|error| format!("{error:#}"))?;
                    if let Some(status) = ended {
                        let tail = process.stderr_tail();
                        return Err(format!("{} ended with {status}; {tail}", daemon.name()));
                    }
                }
            }
            let leases = self.leases().await.map_err(|error| format!("{error:#}"))?;
            let workers = leases.workers().await.map_err(|error| error.to_string())?;
            let alive = workers.iter().filter(|worker| worker.alive).count();
            let warm = leases
                .warm_counts()
                .await
                .map_err(|error| error.to_string())?;
            let warm: u64 = warm.values().sum();
            if alive >= running && (warm >= 3 || running == 0) {
                Ok(())
            } else {
                Err(format!("{alive} of {running} workers, {warm} warm"))
            }
        })
        .await
    }

    /// Lays something over a daemon's configuration, for its next start.
    pub(crate) fn reconfigure(daemon: &Daemon, over: serde_json::Value) -> anyhow::Result<()> {
        let file = &daemon.recipe().config;
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let mut config = serde_json::from_str(&text).context("it is no JSON")?;
        merge(&mut config, over);
        std::fs::write(file, format!("{config:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// Starts again what has ended by itself; how many that were.
    pub(crate) fn revive(&mut self) -> anyhow::Result<usize> {
        let mut revived = 0;
        for daemon in self.dispatchers.iter_mut().chain(&mut self.workers) {
            if !daemon.runs() {
                daemon.start()?;
                revived += 1;
            }
        }
        Ok(revived)
    }

    /// Ends everything in order, and says what is left on the host.
    pub(crate) async fn stop(&mut self) -> anyhow::Result<Vec<String>> {
        let mut left = Vec::new();
        let workers: Vec<Pid> = self
            .workers
            .iter()
            .flat_map(Daemon::processes)
            .map(crate::process::Process::pid)
            .collect();
        let stopping = self.workers.iter_mut().chain(&mut self.dispatchers);
        let stopped = stopping.filter(|daemon| daemon.runs()).map(async |daemon| {
            let name = daemon.name().to_owned();
            match daemon.stop(STOP).await {
                Ok(status) if status.success() => None,
                Ok(status) => Some(format!("{name} ended with {status}")),
                Err(error) => Some(format!("{name} did not end: {error:#}")),
            }
        });
        left.extend(
            futures::future::join_all(stopped)
                .await
                .into_iter()
                .flatten(),
        );
        let clean = eventually("clean host", Duration::from_secs(20), async || {
            let found = self.found(&workers).map_err(|error| format!("{error:#}"))?;
            if found.is_empty() {
                Ok(())
            } else {
                Err(found.join(", "))
            }
        });
        if let Err(error) = clean.await {
            left.push(format!("{error:#}"));
        }
        Ok(left)
    }

    fn found(&self, workers: &[Pid]) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        for daemon in self.dispatchers.iter().chain(&self.workers) {
            for pid in daemon.orphans() {
                found.push(format!("process {pid} of {}", daemon.name()));
            }
        }
        for worker in workers {
            for folder in cgroups_of(*worker)? {
                found.push(folder.display().to_string());
            }
        }
        let volumes = [&self.nats_volume, &self.worker_volume];
        let ours: Vec<&Path> = volumes.into_iter().flatten().map(Volume::path).collect();
        for line in mounts_beneath(&self.folder)? {
            let path = line.split(' ').nth(4).unwrap_or_default();
            if !ours.contains(&Path::new(path)) {
                found.push(format!("mount {path}"));
            }
        }
        Ok(found)
    }

    /// Writes what everybody logged into the folder, for people.
    pub(crate) fn keep_logs(&self) -> anyhow::Result<()> {
        let folder = self.folder.join("logs");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let write = |name: &str, process: &crate::process::Process| -> anyhow::Result<()> {
            std::fs::write(folder.join(format!("{name}.stderr")), process.stderr()?)?;
            std::fs::write(folder.join(format!("{name}.stdout")), process.stdout()?)?;
            Ok(())
        };
        for daemon in self.dispatchers.iter().chain(&self.workers) {
            for (start, process) in daemon.processes().enumerate() {
                write(&format!("{}.{start}", daemon.name()), process)?;
            }
        }
        write("nats", self.nats.process())?;
        write("redis", self.redis.process())
    }
}

async fn client(url: &str, run: &str, history: Recorder) -> anyhow::Result<Client> {
    let options = ClientOptions::new("default".parse()?, run.parse()?);
    let broker = BrokerOptions {
        url: url.to_owned(),
        name: "faults".to_owned(),
        ..options.broker.clone()
    };
    Client::connect(ClientOptions {
        broker,
        patience: Duration::from_secs(10),
        history,
        ..options
    })
    .await
    .context("cannot connect a client")
}

async fn start_nats(
    shape: &Shape,
    folder: &Path,
    volume: Option<&Volume>,
) -> anyhow::Result<NatsServer> {
    let config = folder.join("nats.conf");
    let mut text = "max_payload: 8388608\nwrite_deadline: \"10s\"\n".to_owned();
    if volume.is_some() {
        // Told to be large: what streams may take is more than there is.
        text += "jetstream { max_file_store: 16GB }\n";
    }
    std::fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut nats = shape.nats.clone();
    nats.args.push("--config".to_owned());
    nats.args.push(config.display().to_string());
    if let Some(volume) = volume {
        // The last one counts.
        nats.args.push("--store_dir".to_owned());
        nats.args.push(volume.path().display().to_string());
    }
    NatsServer::start_with(nats).await
}

/// What is killed leaves control groups behind: workers are asked first.
impl Drop for World {
    fn drop(&mut self) {
        let running: Vec<&crate::process::Process> = self
            .workers
            .iter()
            .filter(|worker| worker.runs())
            .filter_map(|worker| worker.process().ok())
            .collect();
        for process in &running {
            let _ = process.signal(Signal::SIGTERM);
            let _ = process.signal(Signal::SIGCONT);
        }
        for process in running {
            process.block_until_exit(Duration::from_secs(15));
        }
    }
}

/// The JetStream folder of a server, which must be down.
pub(crate) fn jetstream_folder(world: &World) -> anyhow::Result<PathBuf> {
    ensure!(
        world.nats.process().try_exit()?.is_some(),
        "nats-server still runs"
    );
    let data = world
        .nats_volume
        .as_ref()
        .map_or_else(|| world.nats.data(), Volume::path);
    Ok(data.join("jetstream"))
}
