//! The parts of a fleet: what runs, what died, what starts again when.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use futures::future::select_all;

use super::Plan;
use super::child::{Child, Invocation};
use super::daemons::{Daemon, Urls, merge, object};
use super::data::Data;
use super::policy::{Deaths, Decision};
use super::probe;
use super::servers::{Nats, Redis, password};
use crate::failure::Failure;
use crate::out;
use crate::programs::{self, Server};

/// In the order in which they start; they stop in the opposite one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nats,
    Redis,
    Dispatcher,
    Worker,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Nats, Self::Redis, Self::Dispatcher, Self::Worker];
    pub(super) const SERVERS: &[Self] = &[Self::Nats, Self::Redis];
    pub(super) const DAEMONS: &[Self] = &[Self::Dispatcher, Self::Worker];

    fn name(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Redis => "redis-server",
            Self::Dispatcher => "dispatcher",
            Self::Worker => "worker",
        }
    }

    /// How long it may take to end: a worker finishes what it runs.
    fn patience(self) -> Duration {
        match self {
            Self::Worker => Duration::from_secs(60),
            Self::Nats | Self::Redis | Self::Dispatcher => Duration::from_secs(15),
        }
    }
}

/// What runs of one kind, and what became of it.
#[derive(Debug, Default)]
struct Slot {
    child: Option<Child>,
    deaths: Deaths,
    restart_at: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Parts {
    data: Data,
    prefix: String,
    nats: Place<Nats>,
    redis: Place<Redis>,
    dispatcher: Daemon,
    worker: Daemon,
    slots: [Slot; 4],
}

/// A server that is ours to run, or one that is there already.
#[derive(Debug)]
enum Place<T> {
    Ours(T),
    Elsewhere(String),
}

impl Parts {
    pub(super) async fn plan(plan: &Plan, data: Data) -> Result<Self, Failure> {
        let nats = match &plan.nats {
            Some(url) => Place::Elsewhere(url.clone()),
            None => Place::Ours(Nats {
                found: program(programs::NATS)?,
                name: format!("remuda-{}", &password()[..16]),
                port: None,
            }),
        };
        let redis = match &plan.redis {
            Some(url) => Place::Elsewhere(url.clone()),
            None => Place::Ours(Redis {
                found: program(programs::REDIS)?,
                password: password(),
                port: port().await?,
                settled: false,
            }),
        };
        let daemon = |name, ours, theirs: &serde_json::Value, port| {
            let mut settings = ours;
            if !theirs.is_null() {
                merge(&mut settings, theirs.clone());
            }
            Daemon {
                name,
                settings,
                port,
            }
        };
        let pools = serde_json::to_value(&plan.pools)
            .map_err(|error| Failure::because("the pools cannot be written down", &error))?;
        let folder = data.root.join("worker");
        Ok(Self {
            dispatcher: daemon(
                "dispatcher",
                object([("pools", pools)]),
                &plan.dispatcher,
                port().await?,
            ),
            worker: daemon(
                "worker",
                object([("state_dir", folder.to_string_lossy().into())]),
                &plan.worker,
                port().await?,
            ),
            prefix: plan.prefix.clone(),
            nats,
            redis,
            data,
            slots: Default::default(),
        })
    }

    pub(super) fn data(&self) -> &Data {
        &self.data
    }

    pub(super) fn dispatcher(&self) -> &Daemon {
        &self.dispatcher
    }

    pub(super) fn worker(&self) -> &Daemon {
        &self.worker
    }

    pub(super) fn pid(&self, kind: Kind) -> Option<i32> {
        self.slots[kind as usize].child.as_ref().map(Child::pid)
    }

    pub(super) fn log_tail(&self, kind: Kind) -> String {
        let child = &self.slots[kind as usize].child;
        child.as_ref().map(Child::log_tail).unwrap_or_default()
    }

    /// Where the servers are, once they have said so.
    pub(super) fn urls(&self) -> Result<Urls, Failure> {
        let nats = match &self.nats {
            Place::Elsewhere(url) => url.clone(),
            Place::Ours(nats) => nats
                .address()
                .map(|address| format!("nats://{address}"))
                .ok_or_else(|| Failure::new("nats-server has not said where it listens"))?,
        };
        let redis = match &self.redis {
            Place::Elsewhere(url) => url.clone(),
            Place::Ours(redis) => redis.url(),
        };
        Ok(Urls { nats, redis })
    }

    /// Starts these parts, those that are ours.
    pub(super) async fn launch(&mut self, kinds: &[Kind]) -> Result<(), Failure> {
        for kind in kinds {
            self.launch_one(*kind).await?;
        }
        Ok(())
    }

    async fn launch_one(&mut self, kind: Kind) -> Result<(), Failure> {
        let slot = &mut self.slots[kind as usize];
        slot.restart_at = None;
        let Some(invocation) = self.invocation(kind).await? else {
            return Ok(());
        };
        let child = Child::start(kind.name(), &invocation, self.data.log(kind.name()))
            .map_err(|error| Failure::chain(&error))?;
        self.slots[kind as usize].child = Some(child);
        Ok(())
    }

    /// None for a server elsewhere.
    async fn invocation(&mut self, kind: Kind) -> Result<Option<Invocation>, Failure> {
        let made = match kind {
            Kind::Nats => match &self.nats {
                Place::Elsewhere(_) => return Ok(None),
                Place::Ours(nats) => nats.invocation(&self.data),
            },
            Kind::Redis => match &mut self.redis {
                Place::Elsewhere(_) => return Ok(None),
                Place::Ours(redis) => {
                    // Somebody else may have taken the port in between.
                    if !redis.settled {
                        redis.port = port().await?;
                    }
                    redis.invocation(&self.data)
                }
            },
            Kind::Dispatcher | Kind::Worker => {
                let urls = self.urls()?;
                let daemon = match kind {
                    Kind::Worker => &mut self.worker,
                    _ => &mut self.dispatcher,
                };
                daemon.port = port().await?;
                daemon.invocation(&self.data, &self.prefix, &urls)
            }
        };
        made.map(Some).map_err(|error| Failure::chain(&error))
    }

    /// Ok when all of these answer; otherwise what the first lacks.
    pub(super) async fn ready(&mut self, kinds: &[Kind]) -> Result<(), String> {
        for kind in kinds {
            self.ready_one(*kind)
                .await
                .map_err(|lacking| format!("{}: {lacking}", kind.name()))?;
        }
        Ok(())
    }

    async fn ready_one(&mut self, kind: Kind) -> Result<(), String> {
        let pid = self.pid(kind);
        let run = self.data.run();
        match kind {
            Kind::Nats => match &mut self.nats {
                Place::Elsewhere(_) => Ok(()),
                Place::Ours(nats) => {
                    nats.find_port(&run, pid.ok_or("it does not run")?);
                    let address: SocketAddr =
                        nats.address().ok_or("it has not said where it listens")?;
                    probe::nats(address, &nats.name).await
                }
            },
            Kind::Redis => match &mut self.redis {
                Place::Elsewhere(_) => Ok(()),
                Place::Ours(redis) => {
                    probe::redis(redis.address(), &redis.password).await?;
                    redis.settled = true;
                    Ok(())
                }
            },
            Kind::Dispatcher => probe::ready(self.dispatcher.address()).await,
            Kind::Worker => probe::ready(self.worker.address()).await,
        }
    }

    /// Waits for a death, which is told and planned for, or for the time to
    /// start a part again, which is done. An error ends the fleet.
    pub(super) async fn next_change(&mut self) -> Result<(), Failure> {
        let restart = Kind::ALL
            .into_iter()
            .filter_map(|kind| Some((self.slots[kind as usize].restart_at?, kind)))
            .min_by_key(|(at, _)| *at);
        let due = async {
            match restart {
                Some((at, kind)) => {
                    tokio::time::sleep_until(at.into()).await;
                    kind
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            (kind, ended) = next_exit(&mut self.slots) => self.bury(kind, &ended),
            kind = due => {
                self.launch_one(kind).await?;
                out::note(format_args!("{} is started again", kind.name()));
                Ok(())
            }
        }
    }

    fn bury(&mut self, kind: Kind, ended: &str) -> Result<(), Failure> {
        let slot = &mut self.slots[kind as usize];
        let child = slot.child.take();
        let name = kind.name();
        match slot.deaths.record(Instant::now()) {
            Decision::RestartAfter(wait) => {
                out::note(format_args!(
                    "{name} ended ({ended}); it starts again in {} ms",
                    wait.as_millis()
                ));
                slot.restart_at = Some(Instant::now() + wait);
                Ok(())
            }
            Decision::GiveUp => {
                let tail = child.as_ref().map(Child::log_tail).unwrap_or_default();
                let log = child
                    .as_ref()
                    .map(|child| child.log().display().to_string());
                Err(Failure::new(format!(
                    "{name} ended three times within a minute, last with {ended}"
                ))
                .mend(format!("{} ends with:\n{tail}", log.unwrap_or_default())))
            }
        }
    }

    /// Stops everything in order, the worker first.
    pub(super) async fn stop(&mut self) {
        for kind in Kind::ALL.into_iter().rev() {
            if let Some(child) = &mut self.slots[kind as usize].child {
                child.stop(kind.patience()).await;
            }
            self.slots[kind as usize].child = None;
        }
    }

    /// Ends everything at once.
    pub(super) async fn kill(&mut self) {
        for slot in &mut self.slots {
            if let Some(mut child) = slot.child.take() {
                child.kill().await;
            }
        }
    }
}

/// The next part that ends, and how.
async fn next_exit(slots: &mut [Slot; 4]) -> (Kind, String) {
    let waits: Vec<_> = Kind::ALL
        .into_iter()
        .zip(slots)
        .filter_map(|(kind, slot)| {
            let child = slot.child.as_mut()?;
            Some(Box::pin(async move {
                let ended = match child.exited().await {
                    Ok(status) => describe(status),
                    Err(error) => remuda_telemetry::Chain(&error).to_string(),
                };
                (kind, ended)
            }))
        })
        .collect();
    if waits.is_empty() {
        return std::future::pending().await;
    }
    select_all(waits).await.0
}

fn describe(status: ExitStatus) -> String {
    status.to_string()
}

fn program(server: Server) -> Result<programs::Found, Failure> {
    server
        .find()
        .map_err(|error| Failure::chain(&error).mend(server.mend))
}

async fn port() -> Result<u16, Failure> {
    probe::free_port()
        .await
        .map_err(|error| Failure::because("no loopback port can be had", &error))
}
