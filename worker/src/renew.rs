//! Keeps leases alive, and ends what runs under one that is not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use remuda_lease::Renewal;
use remuda_telemetry::Chain;
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Stop};

/// Leases in one call.
const BATCH: usize = 256;

pub(crate) async fn run(shared: Arc<Shared>, token: CancellationToken) {
    let mut ticks = tokio::time::interval(shared.options.timings.renew);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let round = async {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shared.renew_wake.notified() => {}
            }
            renew(&shared).await;
        };
        let mut round = std::pin::pin!(round);
        // A call that hangs must not keep the deadlines from being met.
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = overdue(&shared) => {}
                () = &mut round => break,
            }
        }
    }
}

/// Waits for the next deadline, then ends what has passed it.
async fn overdue(shared: &Shared) {
    /// New leases may come up in between; none is due sooner than this.
    const LOOK: Duration = Duration::from_secs(1);
    let now = Instant::now();
    let next = shared.herd().next_deadline();
    let wake = next.map_or(now + LOOK, |deadline| deadline.min(now + LOOK));
    tokio::time::sleep_until(wake.into()).await;
    let overdue = shared.herd().overdue(Instant::now());
    for holder in overdue {
        if holder.stop(Stop::LeaseOverdue) {
            shared.metrics.lease_lost();
            tracing::error!("a lease could not be renewed in time");
        }
    }
}

async fn renew(shared: &Shared) {
    let leases = shared.herd().leases();
    for batch in leases.chunks(BATCH) {
        // Before the call is sent: Redis cannot have counted from earlier.
        let sent = Instant::now();
        let renewals = match shared.leases.renew(&shared.worker, batch).await {
            Ok(renewals) => renewals,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "leases are not renewed");
                return;
            }
        };
        let deadline = shared.lease_deadline(sent);
        for ((sandbox, epoch), renewal) in batch.iter().zip(renewals) {
            match renewal {
                Renewal::Held { cancelled } => {
                    shared.herd().renewed(*sandbox, *epoch, deadline);
                    if let Some(task) = cancelled {
                        shared.cancel(task);
                    }
                }
                Renewal::Lost => {
                    let holder = shared.herd().holder(*sandbox, *epoch);
                    if holder.is_some_and(|holder| holder.stop(Stop::LeaseLost)) {
                        shared.metrics.lease_lost();
                        tracing::warn!(%sandbox, %epoch, "a lease was lost, its sandbox is killed");
                    }
                }
            }
        }
    }
}
