//! What befalls a worker and its leases.

use crate::broker::Stage;
use crate::dispatcher;
use crate::model::Protocol;
use crate::redis::Record;
use crate::state::{Epoch, SandboxId, State};
use crate::worker::{At, Worker, free};

/// `Stop::LeaseOverdue`: Redis could not be reached for so long that nothing may be said any
/// more. The message comes again.
pub(crate) fn overdue(protocol: &Protocol, state: &State, w: usize) -> Option<State> {
    let worker = &state.workers[w];
    let holder = worker.holder.filter(|h| h.at != At::Settled)?;
    let mut next = state.clone();
    if let Some(place) = next.broker.held(worker.sandbox, holder.epoch) {
        next.broker.stage(place, Stage::Waiting);
    }
    free(protocol, &mut next, w);
    Some(next)
}

/// SIGKILL: its sandbox ends with it, and what is on the way to it.
pub(crate) fn crash(state: &State, w: usize) -> Option<State> {
    state.workers[w].up.then(|| {
        let mut next = state.clone();
        let made = state.workers[w].sandbox.made;
        next.workers[w] = Worker::new(w, false);
        next.workers[w].sandbox.made = made;
        next.broker.redeliver_placements(w);
        next
    })
}

/// It is started again under its name.
pub(crate) fn start(state: &State, w: usize) -> Option<State> {
    (!state.workers[w].up).then(|| {
        let mut next = state.clone();
        next.workers[w].up = true;
        next.workers[w].sandbox.made += 1;
        next
    })
}

/// A lease runs out: one that nobody will renew any more, or, `early`, one that somebody still
/// counts on.
pub(crate) fn lease_runs_out(state: &State, sandbox: SandboxId, early: bool) -> Option<State> {
    let Some(Record::Leased {
        epoch, live: true, ..
    }) = state.redis.record(sandbox)
    else {
        return None;
    };
    (counted_on(state, sandbox, epoch) == early).then(|| {
        let mut next = state.clone();
        next.redis.expire(sandbox);
        next
    })
}

/// Whether a worker holds it, or a placement under it is on its way.
fn counted_on(state: &State, sandbox: SandboxId, epoch: Epoch) -> bool {
    let worker = &state.workers[sandbox.worker];
    let held = worker.sandbox == sandbox && worker.holder.is_some_and(|h| h.epoch == epoch);
    let placed = state
        .broker
        .placements
        .iter()
        .any(|placement| worker.up && placement.sandbox == sandbox && placement.epoch == epoch);
    let granted = state.dispatchers.iter().flatten().any(|job| {
        matches!(
            job.at,
            dispatcher::At::Publish(grant) | dispatcher::At::GiveBack(grant)
                if grant.sandbox == sandbox && grant.epoch == epoch
        )
    });
    held || placed || granted
}
