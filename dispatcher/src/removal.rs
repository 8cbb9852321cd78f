//! Removes the results of tasks that asked for it (`ttl_seconds_after_finished`). A duty of the
//! fleet's leader.

use std::sync::Arc;

use broker_schema::TaskRequest;
use remuda_client::broker::BrokerError;
use remuda_lease::{LeaseError, Removal};
use remuda_telemetry::Chain;

use crate::fleet::Fleet;

/// Most tasks whose results are removed in one go.
const MOST: usize = 256;

#[derive(Debug, thiserror::Error)]
enum RemovalError {
    #[error("cannot read or note which results may go")]
    Note(#[source] LeaseError),
    #[error("cannot remove the results of task {task}")]
    Remove {
        task: broker_schema::TaskId,
        #[source]
        source: BrokerError,
    },
}

/// A task ended here whose results are not to be kept. Where it cannot be noted they stay for as
/// long as all others.
pub(crate) async fn note(fleet: &Fleet, request: &TaskRequest) {
    let Some(kept) = request.results_kept_for() else {
        return;
    };
    let TaskRequest {
        tenant, run, id, ..
    } = request;
    if let Err(error) = fleet.lease.remove_later(tenant, run, *id, kept).await {
        tracing::warn!(task = %id, error = %Chain(&error), "results will not be removed early");
    }
}

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = tick.tick() => {}
        }
        if !fleet.leadership.leads_fleet() {
            continue;
        }
        let done = tokio::select! {
            () = fleet.group.token().cancelled() => return,
            done = round(&fleet) => done,
        };
        if let Err(error) = done {
            tracing::debug!(error = %Chain(&error), "results stay for now");
        }
    }
}

/// One round. Cut off in the middle it is done again: removing twice is as good as once.
async fn round(fleet: &Fleet) -> Result<(), RemovalError> {
    let due = fleet.lease.due_removals(MOST).await;
    for removal in due.map_err(RemovalError::Note)? {
        remove(fleet, &removal)
            .await
            .map_err(|source| RemovalError::Remove {
                task: removal.task,
                source,
            })?;
        tracing::debug!(
            task = %removal.task, tenant = %removal.tenant, run = %removal.run,
            "results are removed: they were to be kept no longer"
        );
        fleet.metrics.removed.add(1, ());
        let removed = fleet.lease.removed(std::slice::from_ref(&removal)).await;
        removed.map_err(RemovalError::Note)?;
    }
    Ok(())
}

/// The terminal first: one that stands without its frames would not add up.
async fn remove(fleet: &Fleet, removal: &Removal) -> Result<(), BrokerError> {
    let (broker, streams) = (&fleet.broker, fleet.broker.streams());
    let subjects = broker.subjects();
    let Removal { tenant, run, task } = removal;
    let terminal = subjects.terminal(tenant, run, *task);
    broker.purge(&streams.terminals, &terminal).await?;
    let frames = subjects.result(tenant, run, *task);
    broker.purge(&streams.results, &frames).await.map(drop)
}
