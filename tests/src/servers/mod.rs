//! Real servers on free loopback ports, with data of their own, that can be
//! killed, stopped, frozen and started again in the same place.

mod nats;
mod redis;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::port::Port;
use crate::process::Process;
use crate::wait::eventually;

pub use nats::Nats;
pub use redis::{Redis, ask as ask_redis, ask_all as ask_redis_all};

/// `nats-server` with JetStream on a file store.
pub type NatsServer = Server<Nats>;
/// `redis-server` with an append-only file, evicting nothing.
pub type RedisServer = Server<Redis>;

/// How long a server may take to answer, or to stop.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often another port is tried when somebody took ours.
const TRIES: usize = 5;

/// What differs between the kinds of servers.
pub trait Kind: Send + Sync {
    /// The command that starts one. `name` is unique for every start.
    fn command(&self, address: SocketAddr, data: &Path, name: &str) -> anyhow::Result<Command>;

    /// Ok when the one that was started answers; otherwise what is the case.
    fn answers(
        &self,
        address: SocketAddr,
        name: &str,
        pid: i32,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// A server that a test owns; dropping it kills it and removes its data.
#[derive(Debug)]
pub struct Server<K> {
    kind: K,
    // Before the data, so that it is dead when they are removed.
    process: Process,
    data: TempDir,
    port: Port,
}

impl<K: Kind + Default> Server<K> {
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(K::default()).await
    }
}

impl<K: Kind> Server<K> {
    pub async fn start_with(kind: K) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new()
            .prefix("remuda-test-data-")
            .tempdir()
            .context("cannot make a folder for a server's data")?;
        for _ in 1..TRIES {
            let port = Port::reserve()?;
            match launch(&kind, port.address(), data.path()).await {
                Ok(process) => {
                    return Ok(Self {
                        kind,
                        process,
                        data,
                        port,
                    });
                }
                Err(error) if is_address_in_use(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let port = Port::reserve()?;
        let process = launch(&kind, port.address(), data.path()).await?;
        Ok(Self {
            kind,
            process,
            data,
            port,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// How it is started the next time.
    pub fn kind_mut(&mut self) -> &mut K {
        &mut self.kind
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// SIGKILL, as a crash of the machine's process; returns once it is dead.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.process.signal_group(Signal::SIGKILL)?;
        self.process.wait_exit(PATIENCE).await.map(drop)
    }

    /// SIGTERM; returns once it has ended of its own accord.
    pub async fn stop(&self) -> anyhow::Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.signal(Signal::SIGCONT)?;
        self.process.wait_exit(PATIENCE).await
    }

    /// Freezes it: connections stay open and nothing is answered. Returns once
    /// it is frozen.
    pub async fn pause(&self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGSTOP)?;
        self.wait_state("frozen", |state| state == 'T').await
    }

    /// Ends the freeze.
    pub async fn resume(&self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGCONT)?;
        self.wait_state("running again", |state| state != 'T').await
    }

    /// Stops it if it runs, and starts it on the same port with the same data;
    /// returns once it answers.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        if self.process.try_exit()?.is_none() {
            self.stop().await?;
        }
        self.process = launch(&self.kind, self.address(), self.data.path()).await?;
        Ok(())
    }

    async fn wait_state(&self, what: &str, wanted: impl Fn(char) -> bool) -> anyhow::Result<()> {
        let stat = format!("/proc/{}/stat", self.process.pid());
        let what = format!("{what} {}", self.process.name());
        eventually(&what, PATIENCE, async || {
            let text = std::fs::read_to_string(&stat).map_err(|error| error.to_string())?;
            // The state follows the name, which stands in brackets.
            let state = text
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            match state {
                Some(state) if wanted(state) => Ok(()),
                _ => Err(format!("its state is {state:?}")),
            }
        })
        .await
    }
}

async fn launch<K: Kind>(kind: &K, address: SocketAddr, data: &Path) -> anyhow::Result<Process> {
    static STARTS: AtomicU64 = AtomicU64::new(0);
    let start = STARTS.fetch_add(1, Ordering::Relaxed);
    let name = format!("remuda-test-{}-{start}", std::process::id());
    let process = Process::spawn(kind.command(address, data, &name)?)?;
    let pid = process.pid().as_raw();
    let what = format!("answer of {} at {address}", process.name());
    let ready = eventually(&what, PATIENCE, || kind.answers(address, &name, pid));
    tokio::select! {
        // Looked at first: when it has ended, another may be answering.
        biased;
        status = process.exited() => bail!(
            "{} at {address} ended at once ({}); {}",
            process.name(),
            status?,
            process.stderr_tail()
        ),
        ready = ready => ready.with_context(|| process.stderr_tail())?,
    }
    Ok(process)
}

fn is_address_in_use(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}").to_lowercase();
    text.contains("address already in use") || text.contains("address in use")
}
