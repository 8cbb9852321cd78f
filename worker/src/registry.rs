//! Says that the worker is alive, learns what it should keep, and which incarnation is in force.

use std::sync::Arc;

use broker_schema::{SCHEMA_VERSION, Timestamp};
use remuda_client::broker::BrokerError;
use remuda_lease::{HeartbeatReply, LeaseError, WorkerRecord};
use remuda_telemetry::{Chain, Readiness};
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;

/// A heartbeat that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
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
}

impl Registry {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            started_at: Timestamp::now(),
            registered: false,
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
            if let Err(error) = beat {
                tracing::warn!(error = %Chain(&error), "no heartbeat");
            }
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
            let reply = told.map_err(RegistryError::Heartbeat)?;
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
        self.shared.renew_wake.notify_one();
    }

    fn taken(&self, reply: HeartbeatReply) {
        let shared = &self.shared;
        if reply.draining && !shared.draining() {
            tracing::info!("the registry asks the worker to leave");
            shared.leave.cancel();
        }
        shared.targets.send_if_modified(|targets| {
            let changed = *targets != reply.targets;
            *targets = reply.targets;
            changed
        });
        shared.pool_wake.notify_one();
        // Offered again with every heartbeat: what Redis lost in the meantime comes back.
        shared.herd().forget_offers();
        shared.offer_wake.notify_one();
    }
}
