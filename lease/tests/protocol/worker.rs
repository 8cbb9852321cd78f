//! A worker with one sandbox and its sidecar: from the delivery of a placement to the release of
//! the lease. A crash may come between any two steps.

use std::collections::BTreeSet;

use crate::broker::{Placement, Stage};
use crate::dispatcher::{put, waits};
use crate::model::{Mutation, Protocol};
use crate::state::{Epoch, SandboxId, State, Terminal};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Worker {
    pub(crate) up: bool,
    /// What it works under; 0 before it knows.
    pub(crate) incarnation: u8,
    pub(crate) sandbox: SandboxId,
    pub(crate) holder: Option<Holder>,
    /// `jobs::JobTable`: what ended here and is settled.
    pub(crate) ended: BTreeSet<JobKey>,
    /// Operations on their way to the sidecar, by the epoch that they are made under. They may
    /// arrive long after whoever sent them is gone.
    pub(crate) operations: BTreeSet<Epoch>,
    /// `epoch::EpochGate` of the sidecar.
    pub(crate) highest: Epoch,
}

/// `jobs::JobKey`: one try at a task. The attempt alone is not enough: a Redis that forgot it counts
/// it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct JobKey {
    task: usize,
    attempt: u8,
    epoch: Epoch,
}

impl JobKey {
    fn new(protocol: &Protocol, task: usize, attempt: u8, epoch: Epoch) -> Self {
        let forgetful = protocol.mutation == Some(Mutation::JobsWithoutEpoch);
        Self {
            task,
            attempt,
            epoch: if forgetful { Epoch::default() } else { epoch },
        }
    }
}

/// `holder::Holder` with its one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Holder {
    pub(crate) task: usize,
    pub(crate) attempt: u8,
    pub(crate) epoch: Epoch,
    pub(crate) at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum At {
    Adopted,
    Sent,
    /// To be concluded with this.
    Ran(Terminal),
    Concluded,
    Settled,
}

impl Worker {
    pub(crate) fn new(worker: usize, up: bool) -> Self {
        Self {
            up,
            incarnation: 0,
            sandbox: SandboxId { worker, made: 0 },
            holder: None,
            ended: BTreeSet::new(),
            operations: BTreeSet::new(),
            highest: Epoch::default(),
        }
    }
}

/// `fetch::route` and `Inventory::place`.
pub(crate) fn fetch(protocol: &Protocol, state: &State, place: usize) -> Option<State> {
    let placement = *state.broker.placements.get(place)?;
    let w = placement.sandbox.worker;
    let worker = &state.workers[w];
    if !worker.up || !waits(placement.stage) {
        return None;
    }
    let mut next = state.clone();
    let key = JobKey::new(protocol, placement.task, placement.attempt, placement.epoch);
    if worker.ended.contains(&key) {
        next.broker.placements.remove(place);
        return Some(next);
    }
    let fits = worker.sandbox == placement.sandbox
        && worker.holder.is_none()
        && worker.incarnation == placement.epoch.incarnation;
    if fits {
        next.broker.stage(place, Stage::Held);
        next.workers[w].holder = Some(Holder {
            task: placement.task,
            attempt: placement.attempt,
            epoch: placement.epoch,
            at: At::Adopted,
        });
    } else {
        next.broker.stage(place, Stage::Refused);
    }
    Some(next)
}

/// `execute::Attempt::run`: an operation leaves for the sidecar.
pub(crate) fn send(state: &State, w: usize) -> Option<State> {
    let holder = state.workers[w].holder.filter(|h| h.at == At::Adopted)?;
    let mut next = state.clone();
    next.workers[w].operations.insert(holder.epoch);
    goes(&mut next, w, At::Sent);
    Some(next)
}

/// `EpochGate::judge`: it arrives, and is answered to whoever still waits.
pub(crate) fn arrive(protocol: &Protocol, state: &State, w: usize, epoch: Epoch) -> Option<State> {
    let mut next = state.clone();
    let worker = &mut next.workers[w];
    if !worker.operations.remove(&epoch) {
        return None;
    }
    let checked = protocol.mutation != Some(Mutation::NoEpochCheck);
    let accepted = !checked || epoch >= worker.highest;
    let sandbox = worker.sandbox;
    let waiting = worker
        .holder
        .filter(|holder| holder.epoch == epoch && holder.at == At::Sent);
    if accepted {
        worker.highest = worker.highest.max(epoch);
        next.seen.act(epoch, sandbox);
        if let Some(holder) = waiting {
            let attempt = holder.attempt;
            goes(&mut next, w, At::Ran(Terminal::Done { attempt, epoch }));
        }
    } else if waiting.is_some() {
        return Some(hand_back(protocol, next, w));
    }
    Some(next)
}

/// The next step of what has run: `finish::conclude`, the acknowledgement, `finish::release`.
pub(crate) fn conclude(protocol: &Protocol, state: &State, w: usize) -> Option<State> {
    let holder = state.workers[w].holder?;
    let mut next = state.clone();
    match holder.at {
        At::Adopted | At::Sent => return None,
        At::Ran(terminal) => {
            put(protocol, &mut next, holder.task, terminal);
            goes(&mut next, w, At::Concluded);
        }
        At::Concluded => {
            let sandbox = state.workers[w].sandbox;
            if let Some(place) = next.broker.held(sandbox, holder.epoch) {
                next.broker.placements.remove(place);
            }
            let job = JobKey::new(protocol, holder.task, holder.attempt, holder.epoch);
            next.workers[w].ended.insert(job);
            goes(&mut next, w, At::Settled);
        }
        At::Settled => {
            let sandbox = state.workers[w].sandbox;
            next.redis.finish(sandbox, holder.epoch, Some(holder.task));
            free(protocol, &mut next, w);
        }
    }
    Some(next)
}

/// `renew::renew`: what is held is said, and ends what is not.
pub(crate) fn renew(protocol: &Protocol, state: &State, w: usize) -> Option<State> {
    let worker = &state.workers[w];
    let holder = worker
        .holder
        .filter(|h| matches!(h.at, At::Adopted | At::Sent))?;
    let mut next = state.clone();
    if !state.redis.held(worker.sandbox, holder.epoch) {
        return Some(hand_back(protocol, next, w));
    }
    state.redis.tasks[holder.task].cancelled.then(|| {
        goes(&mut next, w, At::Ran(Terminal::Cancelled));
        next
    })
}

/// `finish::hand_back` of what a holder runs; the sandbox ends.
fn hand_back(protocol: &Protocol, mut state: State, w: usize) -> State {
    let worker = &state.workers[w];
    let Some(holder) = worker.holder else {
        return state;
    };
    let sandbox = worker.sandbox;
    state.redis.finish(sandbox, holder.epoch, None);
    state.publish_request(holder.task, Some((holder.attempt, holder.epoch)));
    if let Some(place) = state.broker.held(sandbox, holder.epoch) {
        state.broker.stage(place, Stage::Returned);
    }
    free(protocol, &mut state, w);
    state
}

/// `finish::hand_back` of what never ran here.
pub(crate) fn refuse(state: &State, place: usize) -> Option<State> {
    let placement = in_hand(state, place, Stage::Refused)?;
    let mut next = state.clone();
    next.redis.finish(placement.sandbox, placement.epoch, None);
    next.publish_request(placement.task, Some((placement.attempt, placement.epoch)));
    next.broker.stage(place, Stage::Returned);
    Some(next)
}

/// `Job::settle` after a hand-back.
pub(crate) fn settle_returned(protocol: &Protocol, state: &State, place: usize) -> Option<State> {
    let placement = in_hand(state, place, Stage::Returned)?;
    let mut next = state.clone();
    next.broker.placements.remove(place);
    let job = JobKey::new(protocol, placement.task, placement.attempt, placement.epoch);
    next.workers[placement.sandbox.worker].ended.insert(job);
    Some(next)
}

fn in_hand(state: &State, place: usize, stage: Stage) -> Option<Placement> {
    let placement = *state.broker.placements.get(place)?;
    (placement.stage == stage && state.workers[placement.sandbox.worker].up).then_some(placement)
}

/// `Registry::beat`, then `offer`: adopt the incarnation, be known, offer what is idle.
pub(crate) fn beat(state: &State, w: usize) -> Option<State> {
    let current = state.redis.incarnation;
    if !state.workers[w].up || current == 0 {
        return None;
    }
    let mut next = state.clone();
    next.workers[w].incarnation = current;
    next.redis.alive[w] = true;
    next.redis.dead[w] = false;
    if next.workers[w].holder.is_none() {
        next.redis.offer(next.workers[w].sandbox);
    }
    (next != *state).then_some(next)
}

fn goes(state: &mut State, w: usize, at: At) {
    if let Some(holder) = &mut state.workers[w].holder {
        holder.at = at;
    }
}

/// The end of a holder: its sandbox is destroyed for a new one, or reset in place. Operations
/// that are under way reach a sandbox that was reset, and nothing of one that was destroyed.
pub(crate) fn free(protocol: &Protocol, state: &mut State, w: usize) {
    let worker = &mut state.workers[w];
    worker.holder = None;
    if !protocol.reset_in_place {
        worker.sandbox.made += 1;
        worker.operations.clear();
        worker.highest = Epoch::default();
    }
}
