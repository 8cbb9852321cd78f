//! What a holder is told while it waits or runs something.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use broker_schema::{CancelCause, SandboxRef, TaskRequest};
use remuda_lease::Renewal;
use remuda_telemetry::Chain;
use tokio::sync::watch;

use crate::outcome::Interrupt;
use crate::shared::{Job, Shared, Stop};

/// A session's task that runs for so long is written down in Redis, for `remuda ps` and for
/// those who want to cancel it. Shorter ones are over before anybody could.
const ASSIGN_AFTER: Duration = Duration::from_millis(200);
/// How long a terminal is tried to be stored once the worker was told to end at once.
const LAST_WORD: Duration = Duration::from_secs(3);

/// Resolves when the holder is told something that it has not heeded.
pub(super) async fn told(stop: &mut watch::Receiver<Stop>, leaving: bool) -> Stop {
    let new = |stop: &Stop| match stop {
        Stop::No => false,
        Stop::Drain => !leaving,
        Stop::Cancelled | Stop::LeaseLost | Stop::LeaseOverdue | Stop::Shutdown => true,
    };
    // A failed wait means that nobody is left who could stop it.
    stop.wait_for(new).await.map_or(Stop::Shutdown, |why| *why)
}

/// Resolves a little after the worker was told to end at once.
pub(super) async fn given_up(mut stop: watch::Receiver<Stop>) {
    if stop.wait_for(|stop| *stop == Stop::Shutdown).await.is_ok() {
        tokio::time::sleep(LAST_WORD).await;
    } else {
        std::future::pending::<()>().await;
    }
}

/// Resolves when the attempt is to stop.
pub(super) async fn interrupt(
    stop: &mut watch::Receiver<Stop>,
    job: &Job,
    assignment: impl Future<Output = Interrupt>,
) -> Interrupt {
    tokio::select! {
        biased;
        why = stop.wait_for(|stop| !matches!(stop, Stop::No | Stop::Drain)) => {
            match why.map_or(Stop::Shutdown, |why| *why) {
                Stop::LeaseLost => Interrupt::LeaseLost,
                Stop::LeaseOverdue => Interrupt::LeaseOverdue,
                Stop::Cancelled => Interrupt::Cancelled(CancelCause::Run),
                Stop::No | Stop::Drain | Stop::Shutdown => Interrupt::Shutdown,
            }
        }
        cause = job.cancel.cancelled() => Interrupt::Cancelled(cause),
        why = assignment => why,
    }
}

/// Writes a session's long task down; resolves only where that shows that it must stop.
pub(super) async fn assign(
    shared: &Shared,
    lease: &SandboxRef,
    task: &TaskRequest,
    session: bool,
    assigned: &AtomicBool,
) -> Interrupt {
    if session {
        tokio::time::sleep(ASSIGN_AFTER).await;
        assigned.store(true, Ordering::Relaxed);
        let assigning =
            shared
                .leases
                .assign(lease, &task.tenant, &task.run, task.id, task.group.as_ref());
        match Box::pin(assigning).await {
            Ok(Renewal::Held {
                cancelled: Some(cancelled),
            }) => return Interrupt::Cancelled(cancelled.cause),
            Ok(Renewal::Held { cancelled: None }) => {}
            Ok(Renewal::Lost) => return Interrupt::LeaseLost,
            Err(error) => tracing::debug!(error = %Chain(&error), "a task is not written down"),
        }
    }
    std::future::pending().await
}
