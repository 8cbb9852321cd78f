//! One whole fleet as child processes: servers, then daemons, then a warm
//! sandbox; from then on it is watched until it is told to stop. One loop owns
//! every part.

mod child;
mod daemons;
mod data;
mod parts;
mod policy;
mod probe;
mod servers;
mod signals;

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use broker_schema::PoolId;
use broker_schema::pool::PoolSpec;
use remuda_lease::{LeaseOptions, LeaseStore};
use serde_json::Value;

use crate::failure::{Failure, exit};
use crate::fleet::{Metrics, Pids, Record};
use crate::out;
use data::Data;
use parts::{Kind, Parts};
pub(crate) use signals::Stop;

/// How often it is asked whether a part is ready.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How often a person who waits is told for what.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// A fleet that is not ready by then will not be.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// What is to run.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) data: PathBuf,
    /// Servers that are there already.
    pub(crate) nats: Option<String>,
    pub(crate) redis: Option<String>,
    pub(crate) prefix: String,
    pub(crate) pools: Vec<PoolSpec>,
    /// More configuration for the daemons, as the person's file has it.
    pub(crate) dispatcher: Value,
    pub(crate) worker: Value,
}

/// Runs until it is told to stop, or cannot go on.
pub(crate) async fn run(plan: Plan) -> Result<u8, Failure> {
    let began = Instant::now();
    let mut stop = Stop::listen()?;
    let data = Data::open(&plan.data).await.map_err(|error| {
        Failure::chain(&error)
            .mend("stop the other one, or give this one its own folder with --data")
    })?;
    let mut fleet = Fleet {
        parts: Parts::plan(&plan, data).await?,
        plan,
        record: None,
    };
    let told = tokio::select! {
        biased;
        () = stop.told() => Ok(()),
        result = fleet.start_and_watch(began) => match result {
            Ok(never) => match never {},
            Err(failure) => Err(failure),
        },
    };
    out::note("stopping");
    let clean = tokio::select! {
        biased;
        () = stop.told() => {
            out::note("told again: stopping at once");
            false
        }
        () = fleet.parts.stop() => true,
    };
    if !clean {
        fleet.parts.kill().await;
    }
    if let Some(record) = &fleet.record {
        record.withdraw();
    }
    told?;
    Ok(if clean { 0 } else { exit::INTERRUPTED })
}

#[derive(Debug)]
struct Fleet {
    plan: Plan,
    parts: Parts,
    /// What was written down for other commands.
    record: Option<Record>,
}

impl Fleet {
    async fn start_and_watch(&mut self, began: Instant) -> Result<Infallible, Failure> {
        let give_up = began + START_PATIENCE;
        self.parts.launch(Kind::SERVERS).await?;
        self.until_ready("servers", Kind::SERVERS, give_up).await?;
        self.parts.launch(Kind::DAEMONS).await?;
        self.write_down()?;
        self.until_ready("daemons", Kind::DAEMONS, give_up).await?;
        let warm = self.until_warm(give_up).await?;
        self.announce(began, warm.as_ref())?;
        loop {
            self.parts.next_change().await?;
            self.write_down()?;
        }
    }

    /// Waits until every one of these parts answers; whichever dies meanwhile
    /// is started again.
    async fn until_ready(
        &mut self,
        what: &str,
        kinds: &[Kind],
        give_up: Instant,
    ) -> Result<(), Failure> {
        let mut tell = Instant::now() + TELL_AGAIN;
        loop {
            let Err(lacking) = self.parts.ready(kinds).await else {
                return Ok(());
            };
            wait_more(what, &lacking, &mut tell, give_up)?;
            self.pause().await?;
        }
    }

    /// Waits for the first warm sandbox of the first pool that keeps any.
    async fn until_warm(&mut self, give_up: Instant) -> Result<Option<(PoolId, u64)>, Failure> {
        let Some(pool) = self.plan.pools.iter().find(|pool| pool.warm > 0) else {
            return Ok(None);
        };
        let pool = pool.name.clone();
        let options = LeaseOptions {
            url: self.parts.urls()?.redis,
            prefix: self.plan.prefix.clone(),
            ..LeaseOptions::default()
        };
        let store = LeaseStore::connect(&options)
            .await
            .map_err(|error| Failure::chain(&error).code(error.code()))?;
        let mut tell = Instant::now() + TELL_AGAIN;
        loop {
            let lacking = match store.warm_counts().await {
                Ok(counts) => match counts.get(&pool) {
                    Some(&count) if count > 0 => return Ok(Some((pool, count))),
                    _ => format!("pool {pool} has no warm sandbox yet"),
                },
                Err(error) => remuda_telemetry::Chain(&error).to_string(),
            };
            let worker = self.parts.log_tail(Kind::Worker);
            wait_more("warm sandboxes", &lacking, &mut tell, give_up).map_err(|failure| {
                failure.mend(format!("the worker's log ends with:\n{worker}"))
            })?;
            self.pause().await?;
        }
    }

    /// A moment, in which parts may die and be started again.
    async fn pause(&mut self) -> Result<(), Failure> {
        tokio::select! {
            changed = self.parts.next_change() => changed,
            () = tokio::time::sleep(LOOK_AGAIN) => Ok(()),
        }
    }

    /// Tells other commands where everything is.
    fn write_down(&mut self) -> Result<(), Failure> {
        let urls = self.parts.urls()?;
        let pid = |kind| self.parts.pid(kind);
        let record = Record {
            nats: urls.nats,
            redis: urls.redis,
            prefix: self.plan.prefix.clone(),
            data: self.parts.data().root.clone(),
            metrics: Metrics {
                dispatcher: self.parts.dispatcher().metrics_url(),
                worker: self.parts.worker().metrics_url(),
            },
            pids: Pids {
                up: std::process::id() as i32,
                nats: pid(Kind::Nats),
                redis: pid(Kind::Redis),
                dispatcher: pid(Kind::Dispatcher),
                worker: pid(Kind::Worker),
            },
        };
        record.publish().map_err(|error| {
            Failure::chain(&error).mend("remove it, or set XDG_RUNTIME_DIR to a folder of your own")
        })?;
        self.record = Some(record);
        Ok(())
    }

    fn announce(&self, began: Instant, warm: Option<&(PoolId, u64)>) -> Result<(), Failure> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        out::line(format_args!("nats        {}", record.nats))?;
        out::line(format_args!("redis       {}", record.redis))?;
        out::line(format_args!("dispatcher  {}", record.metrics.dispatcher))?;
        out::line(format_args!("worker      {}", record.metrics.worker))?;
        out::line(format_args!("data        {}", record.data.display()))?;
        let took = began.elapsed().as_secs_f64();
        match warm {
            Some((pool, count)) => out::line(format_args!(
                "ready in {took:.2} s: pool {pool} has {count} warm"
            )),
            None => out::line(format_args!("ready in {took:.2} s")),
        }
    }
}

/// Tells a person what is awaited; an error when it took too long.
fn wait_more(
    what: &str,
    lacking: &str,
    tell: &mut Instant,
    give_up: Instant,
) -> Result<(), Failure> {
    let now = Instant::now();
    if now >= give_up {
        return Err(Failure::new(format!(
            "the {what} are not ready after {} s: {lacking}",
            START_PATIENCE.as_secs()
        )));
    }
    if now >= *tell {
        out::note(format_args!("waiting for the {what}: {lacking}"));
        *tell = now + TELL_AGAIN;
    }
    Ok(())
}
