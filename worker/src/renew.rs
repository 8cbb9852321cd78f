//! Keeps leases alive, and ends what runs under one that is not.

use std::sync::Arc;
use std::time::Duration;

use remuda_lease::{Cancelled, Renewal};
use remuda_telemetry::Chain;
use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
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
    /// New leases may come up in between; none is due sooner than this. Timers stand still
    /// while the machine sleeps: this long after it woke up, what it slept through is noticed.
    const LOOK: Duration = Duration::from_millis(500);
    const PAUSE: Duration = Duration::from_millis(10);
    let next = shared.herd().next_deadline();
    let wait = next.map_or(LOOK, |deadline| BootTime::now().until(deadline).min(LOOK));
    // What is overdue stays so until its holder has ended.
    tokio::time::sleep(wait.max(PAUSE)).await;
    let overdue = shared.herd().overdue(BootTime::now());
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
        let sent = BootTime::now();
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
                    match cancelled {
                        Some(Cancelled {
                            task: Some(task),
                            cause,
                        }) => shared.cancel_leased(*epoch, task, cause),
                        Some(Cancelled { task: None, .. }) => {
                            // A session of what was cancelled waits for a task that will not come.
                            let holder = shared.herd().holder(*sandbox, *epoch);
                            if holder.is_some_and(|holder| holder.stop(Stop::Cancelled)) {
                                tracing::info!(%sandbox, "a session is cancelled");
                            }
                        }
                        None => {}
                    }
                }
                Renewal::Lost => shared.lease_lost(*sandbox, *epoch),
            }
        }
    }
}
