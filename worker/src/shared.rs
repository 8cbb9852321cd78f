//! What the loops of one worker share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use broker_schema::codec::Format;
use broker_schema::{
    CancelCause, CancelNotice, Epoch, Placement, SandboxId, TaskId, TenantId, WorkerId,
};
use remuda_client::broker::{Broker, Delivery};
use remuda_lease::{LeaseStore, PoolTarget};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{TaskGroup, TraceHeaders};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::answers::Answers;
use crate::backend::{Backends, Sandbox};
use crate::cancellation::Cancellation;
use crate::clock::BootTime;
use crate::farewell::Farewells;
use crate::inventory::Inventory;
use crate::jobs::{JobKey, JobTable};
use crate::metrics::Metrics;
use crate::options::WorkerOptions;

/// A lease is not counted on for this long before Redis forgets it.
const MARGIN: Duration = Duration::from_secs(2);

/// Why a holder should stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    No,
    /// Finish what runs, then close.
    Drain,
    /// What its session belongs to was cancelled.
    Cancelled,
    LeaseLost,
    LeaseOverdue,
    Shutdown,
}

/// How a leased sandbox is reached.
#[derive(Debug, Clone)]
pub(crate) struct HolderHandle {
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
    stop: watch::Sender<Stop>,
}

impl HolderHandle {
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Job>, watch::Receiver<Stop>) {
        let (jobs, queue) = mpsc::unbounded_channel();
        let (stop, stops) = watch::channel(Stop::No);
        (Self { jobs, stop }, queue, stops)
    }

    /// The first reason that ends a task at once stays.
    pub(crate) fn stop(&self, why: Stop) -> bool {
        self.stop.send_if_modified(|stop| {
            let new = matches!(stop, Stop::No | Stop::Drain) && *stop != why;
            if new {
                *stop = why;
            }
            new
        })
    }
}

pub(crate) type Herd = Inventory<Sandbox, HolderHandle>;

pub(crate) struct Shared {
    pub(crate) worker: WorkerId,
    pub(crate) options: WorkerOptions,
    pub(crate) broker: Broker,
    pub(crate) leases: LeaseStore,
    pub(crate) backends: Backends,
    pub(crate) metrics: Metrics,
    /// Holders and what they leave to be done; waited for at the end.
    pub(crate) holders: TaskGroup,
    pub(crate) targets: watch::Sender<Vec<PoolTarget>>,
    /// Somebody asked the worker to leave.
    pub(crate) leave: CancellationToken,
    pub(crate) pool_wake: Notify,
    pub(crate) offer_wake: Notify,
    pub(crate) registry_wake: Notify,
    pub(crate) renew_wake: Notify,
    pub(crate) fetch_wake: Notify,
    /// Messages whose tasks are over, on their way to be acknowledged.
    settled: mpsc::UnboundedSender<Delivery>,
    herd: Mutex<Herd>,
    jobs: Mutex<JobTable>,
    in_hand: Mutex<HashMap<u64, Delivery>>,
    farewells: Mutex<Farewells>,
    answers: Mutex<Answers>,
    incarnation: AtomicU32,
    draining: AtomicBool,
}

impl Shared {
    pub(crate) fn new(
        worker: WorkerId,
        options: WorkerOptions,
        broker: Broker,
        leases: LeaseStore,
        backends: Backends,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Delivery>) {
        let (settled, settling) = mpsc::unbounded_channel();
        let shared = Arc::new(Self {
            worker,
            options,
            broker,
            leases,
            backends,
            metrics: Metrics::new(),
            holders: TaskGroup::new(),
            targets: watch::Sender::default(),
            leave: CancellationToken::new(),
            pool_wake: Notify::new(),
            offer_wake: Notify::new(),
            registry_wake: Notify::new(),
            renew_wake: Notify::new(),
            fetch_wake: Notify::new(),
            settled,
            herd: Mutex::default(),
            jobs: Mutex::default(),
            in_hand: Mutex::default(),
            farewells: Mutex::default(),
            answers: Mutex::default(),
            incarnation: AtomicU32::new(0),
            draining: AtomicBool::new(false),
        });
        (shared, settling)
    }

    pub(crate) fn herd(&self) -> MutexGuard<'_, Herd> {
        self.herd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn jobs(&self) -> MutexGuard<'_, JobTable> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sessions that ended here.
    pub(crate) fn farewells(&self) -> MutexGuard<'_, Farewells> {
        self.farewells
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Terminals of sessions' tasks that ran here.
    pub(crate) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<u64, Delivery>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every delivery that somebody works on.
    pub(crate) fn deliveries(&self) -> Vec<Delivery> {
        self.in_hand().values().cloned().collect()
    }

    pub(crate) fn incarnation(&self) -> u32 {
        self.incarnation.load(Ordering::SeqCst)
    }

    pub(crate) fn set_incarnation(&self, incarnation: u32) {
        self.incarnation.store(incarnation, Ordering::SeqCst);
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// From now on nothing new is taken.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.pool_wake.notify_one();
    }

    /// How many more placements can be taken in hand.
    pub(crate) fn free_slots(&self) -> usize {
        (self.options.slots as usize).saturating_sub(self.jobs().running())
    }

    /// Until when a lease holds that was known to be held at `since`.
    pub(crate) fn lease_deadline(&self, since: BootTime) -> BootTime {
        since.plus(self.leases.ttl().saturating_sub(MARGIN))
    }

    /// The registry knows a lease no more: its sandbox and what runs in it go.
    pub(crate) fn lease_lost(&self, sandbox: SandboxId, epoch: Epoch) {
        let holder = self.herd().holder(sandbox, epoch);
        if holder.is_some_and(|holder| holder.stop(Stop::LeaseLost)) {
            self.metrics.lease_lost();
            history::record(|| Event::LeaseLost {
                sandbox: sandbox.to_string(),
                epoch: epoch.0,
            });
            tracing::warn!(%sandbox, %epoch, "a lease was lost, its sandbox is killed");
        }
    }

    pub(crate) fn cancel(&self, tenant: &TenantId, task: TaskId, cause: CancelCause) {
        let attempts = self.jobs().cancel(tenant, task, cause);
        tracing::info!(%tenant, %task, attempts, %cause, "cancel");
    }

    /// The registry says that the task of a lease is cancelled.
    pub(crate) fn cancel_leased(&self, epoch: Epoch, task: TaskId, cause: CancelCause) {
        let attempts = self.jobs().cancel_leased(epoch, task, cause);
        tracing::info!(%epoch, %task, attempts, %cause, "cancel");
    }

    /// Something was cancelled, here or elsewhere.
    pub(crate) fn heed(&self, notice: &CancelNotice) {
        let attempts = self.jobs().heed(notice, Instant::now());
        if attempts > 0 {
            tracing::info!(tenant = %notice.tenant, attempts, cause = %notice.cause, "cancel");
        }
        // Sessions that wait, and whatever a hint does not know, are told by the registry.
        self.renew_wake.notify_one();
    }
}

/// A placement in hand. Dropping it gives the slot back.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) placement: Placement,
    pub(crate) delivery: Delivery,
    pub(crate) format: Format,
    pub(crate) trace: TraceHeaders,
    pub(crate) received: Instant,
    pub(crate) cancel: Cancellation,
    ticket: Ticket,
}

impl Job {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        placement: Placement,
        delivery: Delivery,
        format: Format,
        cancel: Cancellation,
    ) -> Self {
        let sequence = delivery.stream_sequence;
        shared.in_hand().insert(sequence, delivery.clone());
        Self {
            trace: delivery.trace(),
            ticket: Ticket {
                shared: shared.clone(),
                key: JobKey::of(&placement),
                sequence,
                settled: false,
                began: false,
            },
            placement,
            delivery,
            format,
            received: Instant::now(),
            cancel,
        }
    }

    /// Whether the task goes to an open session.
    pub(crate) fn in_session(&self) -> bool {
        self.placement.task.session.is_some()
    }

    /// What it is known by here.
    pub(crate) fn key(&self) -> &JobKey {
        &self.ticket.key
    }

    /// A session's task that has begun is not run again, whatever becomes of its message.
    pub(crate) fn begin(&mut self) {
        self.ticket.began = self.in_session();
    }

    /// Its message is acknowledged soon: should it come again, it is not run again.
    pub(crate) fn settle(mut self) {
        self.ticket.settled = true;
        // Nobody listens any more only where the worker has given up on everything.
        let _gone = self.ticket.shared.settled.send(self.delivery.clone());
    }
}

struct Ticket {
    shared: Arc<Shared>,
    key: JobKey,
    sequence: u64,
    settled: bool,
    began: bool,
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.in_hand().remove(&self.sequence);
        self.shared
            .jobs()
            .end(&self.key, self.settled || self.began);
        self.shared.fetch_wake.notify_one();
    }
}
