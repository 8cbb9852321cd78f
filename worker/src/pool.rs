//! Keeps the warm pool at its target: makes, offers, withdraws, destroys, in the background.

mod backoff;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::event::OfferHint;
use broker_schema::pool::PoolSpec;
use broker_schema::{HEADER_CONTENT_TYPE, PoolId, SandboxId, codec};
use futures::FutureExt as _;
use remuda_lease::Offered;
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, TaskGroup, failpoint};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backend::{CreateError, Sandbox};
use crate::shared::Shared;
use backoff::Backoff;

/// How often everything is looked at again when nothing has happened.
const LOOK: Duration = Duration::from_secs(1);
/// Sandboxes that are made at once per core.
const PER_CORE: usize = 2;

/// What became of one creation.
struct Made {
    pool: PoolId,
    sandbox: SandboxId,
    result: Result<Sandbox, CreateError>,
    took: Duration,
}

pub(crate) struct Pool {
    shared: Arc<Shared>,
    concurrency: usize,
    creating: usize,
    backoff: HashMap<PoolId, Backoff>,
    made: mpsc::UnboundedSender<Made>,
    results: mpsc::UnboundedReceiver<Made>,
    tasks: TaskGroup,
}

impl Pool {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (made, results) = mpsc::unbounded_channel();
        Self {
            concurrency: shared
                .options
                .create_concurrency
                .unwrap_or(cores * PER_CORE),
            tasks: shared.holders.clone(),
            shared,
            creating: 0,
            backoff: HashMap::new(),
            made,
            results,
        }
    }

    pub(crate) async fn run(mut self, token: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let mut look = false;
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                Some(made) = self.results.recv() => self.take(made),
                () = self.shared.pool_wake.notified() => {}
                _ = ticks.tick() => look = true,
            }
            while let Ok(made) = self.results.try_recv() {
                self.take(made);
            }
            if look {
                self.bury();
            }
            self.mend(look).await;
        }
    }

    /// Does what the plan says. Withdrawing is tried again only with the clock: a sandbox that
    /// is leased already will be, whatever is asked.
    async fn mend(&mut self, look: bool) {
        let draining = self.shared.draining();
        let targets = self.shared.targets.borrow().clone();
        let plan = self.shared.herd().plan(&targets, draining);
        for (spec, missing) in plan.create {
            self.create(&spec, missing);
        }
        if look || draining {
            for sandbox in plan.retire {
                self.retire(sandbox).await;
            }
        }
    }

    fn create(&mut self, spec: &Arc<PoolSpec>, missing: u32) {
        let now = Instant::now();
        let held_back = self.backoff.get(&spec.name);
        if held_back.is_some_and(|backoff| backoff.until() > now) {
            return;
        }
        let room = self.concurrency.saturating_sub(self.creating);
        for _ in 0..room.min(missing as usize) {
            self.creating += 1;
            let sandbox = SandboxId::new();
            self.shared.herd().begin(sandbox, spec.clone());
            let (shared, spec, made) = (self.shared.clone(), spec.clone(), self.made.clone());
            self.tasks.spawn("create sandbox", async move {
                let began = Instant::now();
                let result = match shared.backends.get(spec.backend) {
                    Some(backend) => backend.create(sandbox, &spec.image, &spec.limits).await,
                    None => Err(CreateError::NoBackend {
                        backend: spec.backend,
                    }),
                };
                let made_one = Made {
                    pool: spec.name.clone(),
                    sandbox,
                    result,
                    took: began.elapsed(),
                };
                // Without a listener the worker has ended, and dropping ends the sandbox.
                let _ = made.send(made_one);
            });
        }
    }

    fn take(&mut self, made: Made) {
        self.creating = self.creating.saturating_sub(1);
        match made.result {
            Ok(sandbox) => {
                self.backoff.remove(&made.pool);
                self.shared.metrics.created(made.took);
                failpoint::step(failpoint::worker::CREATED);
                self.shared.herd().ready(made.sandbox, sandbox);
                self.shared.offer_wake.notify_one();
            }
            Err(error) => {
                self.shared.herd().gone(made.sandbox);
                self.shared.metrics.create_failed();
                let backoff = self.backoff.entry(made.pool.clone()).or_default();
                let pause = backoff.failed(Instant::now(), rand::random());
                tracing::error!(
                    pool = %made.pool, failures = backoff.failures(),
                    pause_ms = pause.as_millis() as u64, error = %Chain(&error),
                    "a sandbox cannot be made"
                );
                if error.for_good() {
                    tracing::error!("what makes sandboxes here is gone for good, leaving");
                    self.shared.leave.cancel();
                }
            }
        }
    }

    /// Idle sandboxes that have ended by themselves go.
    fn bury(&self) {
        let mut herd = self.shared.herd();
        for sandbox in herd.dead(|sandbox| sandbox.died().now_or_never().is_some()) {
            tracing::warn!(%sandbox, "an idle sandbox has died");
            herd.retire(sandbox);
        }
    }

    /// Destroys an idle sandbox once it is certain that nobody is given it.
    async fn retire(&self, sandbox: SandboxId) {
        let withdrawn = self
            .shared
            .leases
            .withdraw(&self.shared.worker, sandbox)
            .await;
        match withdrawn {
            Ok(true) => {}
            // Leased: its placement is on its way, and will find it.
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "an idle sandbox stays for now");
                return;
            }
        }
        let Some(handle) = self.shared.herd().take_warm(sandbox) else {
            return;
        };
        let shared = self.shared.clone();
        self.tasks.spawn("destroy sandbox", async move {
            if let Err(error) = handle.destroy().await {
                tracing::error!(error = %Chain(&error), "something of a sandbox is left over");
            }
            shared.herd().gone(sandbox);
            shared.pool_wake.notify_one();
        });
    }
}

/// Tells Redis about idle sandboxes, many at a time while it is busy.
pub(crate) async fn offer(shared: Arc<Shared>, token: CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = token.cancelled() => return,
            () = shared.offer_wake.notified() => {}
        }
        if shared.draining() {
            continue;
        }
        let pools = shared.herd().to_offer();
        for (pool, sandboxes) in pools {
            let incarnation = shared.incarnation();
            for sandbox in &sandboxes {
                history::record(|| Event::Offered {
                    sandbox: sandbox.to_string(),
                });
            }
            let offered = shared
                .leases
                .offer(&shared.worker, incarnation, &pool, &sandboxes)
                .await;
            match offered {
                Ok(Offered::Taken { fresh }) => {
                    failpoint::step(failpoint::worker::OFFERED);
                    shared.herd().offered(&sandboxes);
                    if fresh > 0 {
                        hint(&shared, pool).await;
                    }
                }
                Ok(Offered::StaleIncarnation { .. } | Offered::Unregistered) => {
                    shared.registry_wake.notify_one();
                    break;
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "idle sandboxes are not offered");
                    break;
                }
            }
        }
    }
}

/// Wakes whoever waits for this pool.
async fn hint(shared: &Shared, pool: PoolId) {
    let format = codec::Format::default();
    let Ok(payload) = codec::encode(&OfferHint { pool }, format) else {
        return;
    };
    let mut headers = async_nats::HeaderMap::new();
    headers.insert(HEADER_CONTENT_TYPE, format.content_type());
    let subject = shared.broker.subjects().offer_hint();
    let sent = shared
        .broker
        .nats()
        .publish_with_headers(subject, headers, payload.into())
        .await;
    if let Err(error) = sent {
        tracing::debug!(%error, "an offer's hint was not sent");
    }
}
