//! Workers and pools: who keeps how many warm, told when it changes, by whoever leads the fleet;
//! the incarnation, renewed when Redis has lost it.

use std::sync::Arc;

use broker_schema::codec::{self, Format};
use broker_schema::{ControlMessage, WorkerId};
use remuda_lease::LeaseError;
use remuda_telemetry::Chain;

use crate::decide::{Targets, split};
use crate::error::DispatcherError;
use crate::fleet::Fleet;

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = Told::default();
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = tick.tick() => {}
        }
        match fleet.bootstrap().await {
            Ok(()) if fleet.leadership.leads_fleet() => {
                let looked = look(&fleet, &mut told).await;
                fleet.note_servers(looked.as_ref().copied());
            }
            Ok(()) => {
                // Whoever leads the fleet may tell them otherwise by now.
                told = Told::default();
                fleet.note_servers(Ok(()));
            }
            Err(DispatcherError::Lease(error) | DispatcherError::Pools(error)) => {
                fleet.note_servers(Err(&error));
            }
            Err(error) => {
                fleet.note_servers(Ok(()));
                tracing::debug!(error = %Chain(&error), "the incarnation cannot be renewed");
            }
        }
    }
}

/// What workers were told, and under which incarnation: a flushed Redis has forgotten it.
#[derive(Debug, Default)]
struct Told {
    incarnation: Option<u32>,
    targets: Targets,
}

async fn look(fleet: &Fleet, told: &mut Told) -> Result<(), LeaseError> {
    let incarnation = fleet.lease.incarnation().await?;
    if incarnation != told.incarnation {
        *told = Told {
            incarnation,
            targets: Targets::new(),
        };
    }
    let workers = fleet.lease.workers().await?;
    let alive = workers.iter().filter(|worker| worker.alive).count();
    fleet.metrics.workers.set(alive as i64, ());
    fleet.metrics.warm(&fleet.lease.warm_counts().await?);
    let wanted = split(&fleet.options.pools, &workers);
    for (worker, targets) in &wanted {
        if told.targets.get(worker) == Some(targets) {
            continue;
        }
        if fleet.lease.set_targets(worker, targets).await? {
            told.targets.insert(worker.clone(), targets.clone());
            tell(fleet, worker, &ControlMessage::Pools).await;
        }
    }
    // One that left may come back under its name, with nothing.
    told.targets.retain(|worker, _| wanted.contains_key(worker));
    Ok(())
}

/// Sends a hint to one worker. Losing it costs time and nothing else.
pub(crate) async fn tell(fleet: &Fleet, worker: &WorkerId, message: &ControlMessage) {
    let payload = match codec::encode(message, Format::MessagePack) {
        Ok(payload) => payload,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "a hint cannot be written");
            return;
        }
    };
    let subject = fleet.broker.subjects().control(worker);
    if let Err(error) = fleet.broker.nats().publish(subject, payload.into()).await {
        tracing::debug!(%worker, error = %Chain(&error), "a hint was not sent");
    }
}
