//! A worker's life: built, run, and ended in this order.
//!
//! Leaving: nothing new is taken and every idle sandbox is withdrawn; what runs finishes, or goes
//! back when the time is over; then the loops end, the registry forgets the worker, and its
//! consumer goes. Placements that arrive meanwhile are still answered: a sandbox that was claimed
//! before it could be withdrawn has its placement on the way.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::WorkerId;
use broker_schema::pool::BackendKind;
use broker_schema::stream::{ConsumerDef, worker_consumer};
use remuda_client::broker::{Broker, BrokerError, Delivery, Puller};
use remuda_lease::{LeaseError, LeaseStore};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, Readiness, TaskGroup};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::backend::fake::FakeBackend;
use crate::backend::local::{LocalError, LocalLauncher, LocalOptions};
use crate::options::{InvalidOptions, WorkerOptions};
use crate::pool::{self, Pool};
use crate::registry::{Registry, RegistryError};
use crate::shared::{Shared, Stop};
use crate::{control, fetch, renew, settle};

/// What must be up before the worker is ready.
pub const READINESS: [&str; 2] = ["nats", "redis"];

/// As `EX_CONFIG`: this program and this fleet do not fit.
const REFUSED: u8 = 78;
/// Bound on what is killed and handed back once the time for finishing is over.
const KILL_BOUND: Duration = Duration::from_secs(10);
const LOOPS_BOUND: Duration = Duration::from_secs(5);
const FLUSH_BOUND: Duration = Duration::from_secs(5);
/// How long a worker waits for the fleet's streams.
const STREAMS_BOUND: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);

/// A worker that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Options(#[from] InvalidOptions),
    #[error("cannot tell where this program is, set sidecar")]
    OwnPath(#[source] std::io::Error),
    #[error("no sidecar at {path:?}: build it, or set sidecar to where it is")]
    NoSidecar { path: PathBuf },
    #[error("the local backend cannot start")]
    Local(#[source] LocalError),
    #[error("nats cannot be used")]
    Broker(#[source] BrokerError),
    #[error("redis cannot be used")]
    Leases(#[source] LeaseError),
    #[error("the worker cannot be registered")]
    Register(#[source] RegistryError),
}

impl WorkerError {
    /// The stable code that users see.
    pub fn code(&self) -> broker_schema::ErrorCode {
        use broker_schema::ErrorCode;
        match self {
            Self::Options(_) => ErrorCode::InvalidField,
            Self::OwnPath(_) | Self::NoSidecar { .. } | Self::Local(_) => {
                ErrorCode::SandboxCreateFailed
            }
            Self::Broker(error) | Self::Register(RegistryError::Incarnation(error)) => error.code(),
            Self::Leases(error)
            | Self::Register(
                RegistryError::Heartbeat(error)
                | RegistryError::Install(error)
                | RegistryError::Refused(error),
            ) => error.code(),
            Self::Register(RegistryError::Unsettled) => ErrorCode::Internal,
        }
    }

    /// The status that a worker's process ends with: one that a supervisor can tell from a
    /// fault that starting again might mend.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Register(RegistryError::Refused(_)) => REFUSED,
            _ => 1,
        }
    }
}

/// A worker that is connected, registered, and does nothing yet.
pub struct Worker {
    shared: Arc<Shared>,
    puller: Puller,
    control: async_nats::Subscriber,
    cancels: async_nats::Subscriber,
    registry: Registry,
    settled: mpsc::UnboundedReceiver<Delivery>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("id", &self.shared.worker)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// Builds a worker with the backends that its options name.
    pub async fn build(options: WorkerOptions) -> Result<Self, WorkerError> {
        options.validate()?;
        let backends = backends(&options).await?;
        Self::build_with(options, backends).await
    }

    /// Builds a worker on backends that exist.
    pub async fn build_with(
        options: WorkerOptions,
        backends: Backends,
    ) -> Result<Self, WorkerError> {
        options.validate()?;
        let id = options.new_worker_id()?;
        let (broker, leases) = Box::pin(connect(&options, &id)).await?;
        let control = subscribe(&broker, broker.subjects().control(&id)).await?;
        let cancels = subscribe(&broker, broker.subjects().cancel_hint()).await?;
        let consumer = worker_consumer(broker.subjects(), &id, options.slots as usize);
        // Before anybody can place something here.
        let puller = Box::pin(puller(&broker, &consumer)).await?;
        let (shared, settled) = Shared::new(id, options, broker, leases, backends);
        let mut registry = Registry::new(shared.clone());
        Box::pin(registry.beat())
            .await
            .map_err(WorkerError::Register)?;
        Ok(Self {
            shared,
            puller,
            control,
            cancels,
            registry,
            settled,
        })
    }

    pub fn id(&self) -> &WorkerId {
        &self.shared.worker
    }

    /// Runs until `shutdown` is cancelled or somebody asks the worker to leave, then leaves.
    pub async fn run(self, readiness: Readiness, shutdown: CancellationToken) {
        let Self {
            shared,
            puller,
            control,
            cancels,
            registry,
            settled,
        } = self;
        tracing::info!(worker = %shared.worker, "worker runs");
        for part in READINESS {
            readiness.set(part, true);
        }
        // The pool and the registry are told last to stop: draining needs them.
        let loops = TaskGroup::new();
        let token = || loops.token().clone();
        loops.spawn("fetch", fetch::run(shared.clone(), puller, token()));
        loops.spawn("settle", settle::run(settled, token()));
        loops.spawn("control", control::run(shared.clone(), control, token()));
        loops.spawn(
            "cancels",
            control::cancels(shared.clone(), cancels, token()),
        );
        loops.spawn("renew", renew::run(shared.clone(), token()));
        loops.spawn("registry", registry.run(readiness.clone(), token()));
        loops.spawn("pool", Pool::new(shared.clone()).run(token()));
        loops.spawn("offer", pool::offer(shared.clone(), token()));

        tokio::select! {
            () = shutdown.cancelled() => {}
            () = shared.leave.cancelled() => {}
        }

        tracing::info!(worker = %shared.worker, "worker leaves");
        readiness.set("redis", false);
        let leaving = async {
            drain(&shared).await;
            loops.close_and_wait(LOOPS_BOUND).await;
            flush(&shared.broker).await;
            deregister(&shared).await;
        };
        let timings = shared.options.timings;
        tokio::select! {
            biased;
            () = leaving => history::record(|| Event::Left),
            () = shared.broker.lost_for(timings.unreachable) => tracing::warn!(
                worker = %shared.worker, bound = ?timings.unreachable,
                "leaving without NATS: what is unfinished is placed elsewhere"
            ),
            () = tokio::time::sleep(timings.drain + timings.unreachable) => tracing::warn!(
                worker = %shared.worker,
                "leaving took too long: what is unfinished is placed elsewhere"
            ),
        }
        loops.cancel();
        if let Some(local) = shared.backends.local.clone()
            && tokio::time::timeout(LOOPS_BOUND, local.shutdown())
                .await
                .is_err()
        {
            tracing::warn!("the sandboxes did not end in time, they end with this process");
        }
        tracing::info!(worker = %shared.worker, "worker has left");
    }
}

async fn subscribe(
    broker: &Broker,
    subject: String,
) -> Result<async_nats::Subscriber, WorkerError> {
    let subscribed = broker.nats().subscribe(subject.clone()).await;
    subscribed.map_err(|error| {
        WorkerError::Broker(BrokerError::Subscribe {
            subject,
            source: error.into(),
        })
    })
}

async fn connect(
    options: &WorkerOptions,
    id: &WorkerId,
) -> Result<(Broker, LeaseStore), WorkerError> {
    let broker = Broker::connect(&options.nats.broker(id.as_str()))
        .await
        .map_err(WorkerError::Broker)?;
    let leases = LeaseStore::connect(&options.redis)
        .await
        .map_err(WorkerError::Leases)?;
    for warning in leases.suitability().await.map_err(WorkerError::Leases)? {
        tracing::warn!("{warning}");
    }
    Ok((broker, leases))
}

/// The dispatcher makes the streams, with the sizes that its operator chose; a worker that comes
/// first waits for it.
async fn puller(broker: &Broker, consumer: &ConsumerDef) -> Result<Puller, WorkerError> {
    let patience = Instant::now() + STREAMS_BOUND;
    let mut told = false;
    loop {
        match broker.puller(consumer).await {
            Err(error @ BrokerError::StreamMissing { .. }) if Instant::now() < patience => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(error = %Chain(&error), "waiting for a dispatcher to make it");
                }
                tokio::time::sleep(PAUSE).await;
            }
            made => return made.map_err(WorkerError::Broker),
        }
    }
}

async fn backends(options: &WorkerOptions) -> Result<Backends, WorkerError> {
    let mut backends = Backends::default();
    for kind in &options.backends {
        match kind {
            BackendKind::Fake => backends.fake = Some(FakeBackend::default()),
            BackendKind::Local => {
                let local = LocalOptions {
                    sidecar: sidecar(options)?,
                    forker_exe: options.forker.clone(),
                    state_dir: options.state_dir.clone(),
                    allow_unenforced: options.allow_unenforced,
                };
                let launcher = LocalLauncher::start(local)
                    .await
                    .map_err(WorkerError::Local)?;
                backends.local = Some(launcher);
            }
        }
    }
    Ok(backends)
}

fn sidecar(options: &WorkerOptions) -> Result<PathBuf, WorkerError> {
    let path = match &options.sidecar {
        Some(path) => path.clone(),
        None => std::env::current_exe()
            .map_err(WorkerError::OwnPath)?
            .with_file_name("remuda-sidecar"),
    };
    if path.is_file() {
        Ok(path)
    } else {
        Err(WorkerError::NoSidecar { path })
    }
}

/// Lets what runs finish and takes nothing new; afterwards no sandbox and no lease is left.
async fn drain(shared: &Shared) {
    // Nobody should claim what is about to be withdrawn.
    if let Err(error) = shared.leases.set_draining(&shared.worker, true).await {
        tracing::warn!(error = %Chain(&error), "the registry does not know that the worker leaves");
    }
    shared.drain();
    for holder in shared.herd().holders() {
        holder.stop(Stop::Drain);
    }
    let bound = shared.options.timings.drain;
    if tokio::time::timeout(bound, empty(shared)).await.is_ok() {
        shared.holders.wait(KILL_BOUND).await;
        return;
    }
    tracing::warn!(?bound, "tasks did not finish in time, they are handed back");
    for holder in shared.herd().holders() {
        holder.stop(Stop::Shutdown);
    }
    if tokio::time::timeout(KILL_BOUND, empty(shared))
        .await
        .is_err()
    {
        tracing::error!(sandboxes = ?shared.herd().by_state(), "sandboxes are left to the system");
    }
    shared.holders.wait(KILL_BOUND).await;
}

/// Resolves when there is no sandbox left and no placement in hand.
async fn empty(shared: &Shared) {
    let mut ticks = tokio::time::interval(PAUSE / 10);
    loop {
        ticks.tick().await;
        let jobs = shared.jobs().running();
        if jobs == 0 && shared.herd().is_empty() {
            return;
        }
    }
}

async fn flush(broker: &Broker) {
    match tokio::time::timeout(FLUSH_BOUND, broker.nats().flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "what was published last may be lost"),
        Err(_) => tracing::warn!("what was published last may be lost: NATS does not answer"),
    }
}

async fn deregister(shared: &Shared) {
    if let Err(error) = shared.leases.deregister(&shared.worker).await {
        tracing::warn!(error = %Chain(&error), "the registry learns by itself that we are gone");
    }
    let consumer = worker_consumer(shared.broker.subjects(), &shared.worker, 1);
    let deleted = shared
        .broker
        .delete_consumer(&consumer.stream, &consumer.durable);
    if let Err(error) = deleted.await {
        tracing::warn!(error = %Chain(&error), "the worker's consumer stays");
    }
}
