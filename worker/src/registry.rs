//! Says that the worker is alive, learns what it should keep, which incarnation is in force, and
//! what the registry believes that the worker has.

use std::sync::Arc;
use std::time::Instant;

use broker_schema::{Epoch, SCHEMA_VERSION, SandboxId, Timestamp};
use remuda_client::broker::BrokerError;
use remuda_lease::{HeartbeatReply, LeaseError, Renewal, WorkerRecord};
use remuda_telemetry::{Chain, Readiness};
use tokio_util::sync::CancellationToken;

use crate::finish;
use crate::reconcile::reconcile;
use crate::shared::Shared;

/// A heartbeat that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("the fleet does not take this worker")]
    Refused(#[source] LeaseError),
    #[error("the registry cannot be told that the worker is alive")]
    Heartbeat(#[source] LeaseError),
    #[error("the incarnation cannot be put in force")]
    Install(#[source] LeaseError),
    #[error("no new incarnation can be had")]
    Incarnation(#[source] BrokerError),
    #[error("the incarnation keeps changing")]
    Unsettled,
}

/// How often the incarnation may change within one heartbeat.
const CHANGES: usize = 4;

pub(crate) struct Registry {
    shared: Arc<Shared>,
    started_at: Timestamp,
    registered: bool,
    /// When both sides were last found the same, or made so. None where they may differ.
    compared: Option<Instant>,
    /// Set aside until now.
    foreign_keys: u64,
}

impl Registry {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            started_at: Timestamp::now(),
            registered: false,
            compared: None,
            foreign_keys: 0,
        }
    }

    pub(crate) async fn run(mut self, readiness: Readiness, token: CancellationToken) {
        let mut ticks = tokio::time::interval(self.shared.options.timings.heartbeat);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.shared.registry_wake.notified() => {}
            }
            let beat = self.beat().await;
            // One that leaves takes nothing.
            readiness.set("redis", beat.is_ok() && !self.shared.draining());
            readiness.set("nats", self.shared.broker.connected());
            match beat {
                Ok(()) => self.compare().await,
                Err(error @ RegistryError::Refused(_)) => {
                    tracing::error!(error = %Chain(&error), "leaving");
                    self.shared.leave.cancel();
                }
                Err(error) => {
                    self.compared = None;
                    tracing::warn!(error = %Chain(&error), "no heartbeat");
                }
            }
            self.look_around().await;
            let sandboxes = self.shared.herd().by_state();
            let jobs = self.shared.jobs().running();
            self.shared.metrics.state(sandboxes, jobs);
        }
    }

    /// One heartbeat, repeated under the incarnation that is in force.
    pub(crate) async fn beat(&mut self) -> Result<(), RegistryError> {
        for _ in 0..CHANGES {
            let record = self.record();
            let told = if self.registered {
                self.shared.leases.heartbeat(&record).await
            } else {
                self.shared.leases.register(&record).await
            };
            let reply = told.map_err(|error| match error {
                LeaseError::SchemaRefused { .. } => RegistryError::Refused(error),
                other => RegistryError::Heartbeat(other),
            })?;
            match reply.incarnation {
                Some(incarnation) if incarnation == record.incarnation => {
                    self.registered = true;
                    self.taken(reply);
                    return Ok(());
                }
                Some(incarnation) => self.adopt(incarnation),
                None => {
                    let next = self.shared.broker.next_incarnation().await;
                    let candidate = next.map_err(RegistryError::Incarnation)?;
                    let installed = self.shared.leases.install_incarnation(candidate).await;
                    self.adopt(installed.map_err(RegistryError::Install)?);
                }
            }
        }
        Err(RegistryError::Unsettled)
    }

    fn record(&self) -> WorkerRecord {
        let shared = &self.shared;
        WorkerRecord {
            worker: shared.worker.clone(),
            incarnation: shared.incarnation(),
            schema: SCHEMA_VERSION,
            backends: shared.backends.kinds(),
            slots: shared.options.slots,
            pools: shared.herd().counts(),
            host: nix::unistd::gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            pid: std::process::id(),
            started_at: self.started_at,
        }
    }

    /// What an older incarnation gave out may be forgotten, or not: the next renewal tells.
    fn adopt(&mut self, incarnation: u32) {
        tracing::info!(incarnation, "incarnation");
        self.shared.set_incarnation(incarnation);
        self.registered = false;
        self.compared = None;
        self.shared.herd().forget_offers();
        self.shared.renew_wake.notify_one();
    }

    fn taken(&self, reply: HeartbeatReply) {
        let shared = &self.shared;
        if reply.draining && !shared.draining() && !shared.leave.is_cancelled() {
            tracing::info!("the registry asks the worker to leave");
            shared.leave.cancel();
        }
        shared.targets.send_if_modified(|targets| {
            let changed = *targets != reply.targets;
            *targets = reply.targets;
            changed
        });
        shared.pool_wake.notify_one();
        shared.offer_wake.notify_one();
    }

    /// Goes by the fleet's clock where this machine's is wrong, and counts what was in the way.
    async fn look_around(&mut self) {
        let shared = &self.shared;
        let foreign = shared.leases.foreign_keys();
        shared.metrics.foreign_keys(foreign - self.foreign_keys);
        self.foreign_keys = foreign;
        let Ok(redis) = shared.leases.clock_offset().await else {
            return;
        };
        if let Err(error) = shared.broker.keep_time(redis).await {
            tracing::debug!(error = %Chain(&error), "the clock is not compared");
        }
    }

    /// Makes both sides the same again, in both directions.
    async fn compare(&mut self) {
        let shared = &self.shared;
        let often = shared.options.timings.renew;
        if self.compared.is_some_and(|at| at.elapsed() < often) {
            return;
        }
        let before = shared.herd().snapshot();
        let held = match shared.leases.held(&shared.worker).await {
            Ok(held) => held,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "what the registry holds is not known");
                return;
            }
        };
        let after = shared.herd().snapshot();
        let to_do = reconcile(&before, &held, &after, shared.incarnation());
        self.compared = Some(Instant::now());
        if to_do.is_empty() {
            return;
        }
        tracing::info!(
            offered = to_do.offer.len(),
            let_go = to_do.let_go.len(),
            withdrawn = to_do.withdraw.len(),
            released = to_do.release.len(),
            "the registry and this worker differed"
        );
        shared.herd().forget_offers_of(&to_do.offer);
        shared.offer_wake.notify_one();
        self.confirm_lost(&to_do.let_go).await;
        for sandbox in to_do.withdraw {
            if let Err(error) = shared.leases.withdraw(&shared.worker, sandbox).await {
                tracing::warn!(error = %Chain(&error), "a sandbox that is not here stays offered");
            }
        }
        for (sandbox, epoch) in to_do.release {
            finish::release(shared, sandbox, epoch, None).await;
        }
    }

    /// A lease is let go of only where a renewal says so too.
    async fn confirm_lost(&self, leases: &[(SandboxId, Epoch)]) {
        let shared = &self.shared;
        if leases.is_empty() {
            return;
        }
        let Ok(renewals) = shared.leases.renew(&shared.worker, leases).await else {
            // The next renewal, or its absence, decides.
            return;
        };
        for ((sandbox, epoch), renewal) in leases.iter().zip(renewals) {
            if renewal == Renewal::Lost {
                shared.lease_lost(*sandbox, *epoch);
            }
        }
    }
}
