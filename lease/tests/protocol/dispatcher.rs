//! A dispatcher: one request in hand, from the delivery to the acknowledgement. `at` is where
//! it would go on; a crash may come at each.

use crate::broker::{Presence, Stage};
use crate::model::{Mutation, Protocol};
use crate::redis::{Cancel, Claim};
use crate::state::{Grant, SandboxId, State, Terminal};

/// `None` between two requests.
pub(crate) type Dispatcher = Option<Job>;

/// `place::Job`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Job {
    pub(crate) task: usize,
    pub(crate) message: usize,
    /// The terminal of a finished task was looked for and is not there.
    pub(crate) again: bool,
    /// The message that it holds is not in the stream any more.
    pub(crate) gone: bool,
    pub(crate) at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum At {
    /// The terminal is looked for.
    Look,
    Claim,
    Publish(Grant),
    GiveBack(Grant),
    End(Terminal),
    Settle,
    /// Only where claims are not atomic: read, and not written yet.
    Write {
        sandbox: SandboxId,
        counter: u8,
        attempt: u8,
    },
}

/// `lane::accept`: a request is delivered.
pub(crate) fn fetch(state: &State, d: usize, task: usize, message: usize) -> Option<State> {
    let free = state.dispatchers[d].is_none();
    if !free || state.broker.requests[task][message] != Presence::Waiting {
        return None;
    }
    let mut next = state.clone();
    next.broker.requests[task][message] = Presence::Delivered;
    next.dispatchers[d] = Some(Job {
        task,
        message,
        again: false,
        gone: false,
        at: At::Look,
    });
    Some(next)
}

/// The next step of a job but a claim: `place::place`, `place::publish`, `place::end`,
/// `place::settle`.
pub(crate) fn step(protocol: &Protocol, state: &State, d: usize) -> Option<State> {
    let job = state.dispatchers[d]?;
    let mut next = state.clone();
    match job.at {
        At::Look if next.broker.terminals[job.task].is_some() => goes(&mut next, d, At::Settle),
        At::Look => goes(&mut next, d, At::Claim),
        At::Claim => return None,
        At::Publish(grant) => {
            // A duplicate is of the same epoch: an earlier try of its own.
            next.broker.publish_placement(job.task, grant);
            goes(&mut next, d, At::Settle);
        }
        At::GiveBack(grant) => give_back(&mut next, d, job, grant),
        At::End(terminal) => {
            put(protocol, &mut next, job.task, terminal);
            goes(&mut next, d, At::Settle);
        }
        At::Settle => {
            if !job.gone {
                next.broker.requests[job.task][job.message] = Presence::Absent;
            }
            drop_job(&mut next, d);
        }
        At::Write {
            sandbox,
            counter,
            attempt,
        } => {
            note_grant(&mut next, job.task, sandbox);
            let grant = next
                .redis
                .write_grant(job.task, d, sandbox, counter, attempt);
            goes(&mut next, d, At::Publish(grant));
        }
    }
    Some(next)
}

/// `LeaseStore::claim` and `decide::after_claim`. `pick` is the warm sandbox that it would get.
/// `answered` is false where the script ran and its answer was lost.
pub(crate) fn claim(
    protocol: &Protocol,
    state: &State,
    d: usize,
    pick: Option<SandboxId>,
    answered: bool,
) -> Option<State> {
    let job = state.dispatchers[d]?;
    if job.at != At::Claim {
        return None;
    }
    let mut next = state.clone();
    let held = next.redis.live_claim(job.task);
    let claimed = next
        .redis
        .claim(job.task, protocol.attempts, d, job.again, pick);
    let fresh = matches!(claimed, Claim::Granted(_)) && held.is_none();
    // With a sandbox to pick this step is that grant, and nothing else.
    if fresh != pick.is_some() {
        return None;
    }
    if let (true, Some(Mutation::ClaimNotAtomic), Some(sandbox)) = (fresh, protocol.mutation, pick)
    {
        let mut read = state.clone();
        let at = At::Write {
            sandbox,
            counter: state.redis.counter + 1,
            attempt: state.redis.tasks[job.task].attempts + 1,
        };
        goes(&mut read, d, at);
        return answered.then_some(read);
    }
    if let (true, Claim::Granted(grant)) = (fresh, claimed) {
        note_grant_after(state, &mut next, job.task, grant.sandbox);
    }
    if !answered {
        // Tried again with the same nonce.
        return fresh.then_some(next);
    }
    let at = match claimed {
        Claim::Granted(grant) => At::Publish(grant),
        Claim::NoneWarm | Claim::Busy | Claim::NoIncarnation => At::Look,
        Claim::Cancelled => At::End(Terminal::Cancelled),
        Claim::Exhausted => At::End(Terminal::DeadLettered),
        Claim::Finished if next.broker.terminals[job.task].is_some() => At::Settle,
        Claim::Finished => {
            if let Some(job) = &mut next.dispatchers[d] {
                job.again = true;
            }
            At::Look
        }
    };
    goes(&mut next, d, at);
    Some(next)
}

/// A placement whose acknowledgement never came, stored or not.
pub(crate) fn publish_unanswered(state: &State, d: usize, stored: bool) -> Option<State> {
    let job = state.dispatchers[d]?;
    let At::Publish(grant) = job.at else {
        return None;
    };
    let mut next = state.clone();
    if stored {
        next.broker.publish_placement(job.task, grant);
    }
    goes(&mut next, d, At::GiveBack(grant));
    Some(next)
}

/// A crash, or the end of the process. What it held comes again.
pub(crate) fn crash(state: &State, d: usize) -> Option<State> {
    let job = state.dispatchers[d]?;
    let mut next = state.clone();
    let message = &mut next.broker.requests[job.task][job.message];
    if !job.gone && *message == Presence::Delivered {
        *message = Presence::Waiting;
    }
    drop_job(&mut next, d);
    Some(next)
}

/// `cancel::cancel`: the flag first, then the gate where nobody holds the task.
pub(crate) fn cancel(state: &State, task: usize) -> Option<State> {
    let mut next = state.clone();
    next.cancels = state.cancels.checked_sub(1)?;
    next.cancelling[task] |= next.redis.cancel(task) == Cancel::Unplaced;
    Some(next)
}

/// `cancel::write`.
pub(crate) fn write_cancelled(protocol: &Protocol, state: &State, task: usize) -> Option<State> {
    state.cancelling[task].then(|| {
        let mut next = state.clone();
        next.cancelling[task] = false;
        put(protocol, &mut next, task, Terminal::Cancelled);
        next
    })
}

/// `registry::run` and `Fleet::bootstrap`, and a worker that finds no incarnation.
pub(crate) fn bootstrap(state: &State) -> Option<State> {
    if state.redis.incarnation != 0 && state.redis.in_force {
        return None;
    }
    let mut next = state.clone();
    next.broker.incarnations += 1;
    next.redis.install(next.broker.incarnations);
    Some(next)
}

/// `reaper::see_to`: a placement of a dead worker, or of one that nobody knows.
pub(crate) fn see_to(state: &State, place: usize) -> Option<State> {
    let placement = *state.broker.placements.get(place)?;
    let worker = placement.sandbox.worker;
    let orphan = !state.redis.alive[worker] && !state.workers[worker].up;
    if !state.redis.dead[worker] && !orphan {
        return None;
    }
    let mut next = state.clone();
    if next.broker.terminals[placement.task].is_none() {
        let left = (placement.attempt, placement.epoch);
        next.publish_request(placement.task, Some(left));
    }
    next.broker.placements.remove(place);
    Some(next)
}

/// Puts a terminal through the gate and notes whether that changed one.
pub(crate) fn put(protocol: &Protocol, state: &mut State, task: usize, terminal: Terminal) {
    let before = state.broker.terminals[task];
    let gated = protocol.mutation != Some(Mutation::NoTerminalGate);
    state.broker.put_terminal(task, terminal, gated);
    state.seen.broken.terminal_changed |=
        before.is_some() && state.broker.terminals[task] != before;
}

fn goes(state: &mut State, d: usize, at: At) {
    if let Some(job) = &mut state.dispatchers[d] {
        job.at = at;
    }
}

fn drop_job(state: &mut State, d: usize) {
    state.dispatchers[d] = None;
    forget_nonce(state, d);
}

/// `ClaimNonce::new`.
fn forget_nonce(state: &mut State, d: usize) {
    state.redis.new_nonce(d);
    if let Some(redis) = &mut state.on_disk {
        redis.new_nonce(d);
    }
}

fn give_back(state: &mut State, d: usize, job: Job, grant: Grant) {
    state.redis.unclaim(job.task, d, grant);
    forget_nonce(state, d);
    goes(state, d, At::Look);
}

fn note_grant(state: &mut State, task: usize, sandbox: SandboxId) {
    let before = state.clone();
    note_grant_after(&before, state, task, sandbox);
}

/// A grant is exclusive: nobody held the sandbox, and nobody held another for the task.
fn note_grant_after(before: &State, state: &mut State, task: usize, sandbox: SandboxId) {
    let free = before.redis.warm().any(|warm| warm == sandbox);
    let single = before.redis.live_claim(task).is_none();
    state.seen.broken.granted_twice |= !free || !single;
    state.seen.grants[task] += 1;
}

/// A message of REQ that is held comes again although its holder is alive.
pub(crate) fn redeliver(state: &State, task: usize, message: usize) -> Option<State> {
    if state.broker.requests[task][message] != Presence::Delivered {
        return None;
    }
    let mut next = state.clone();
    next.broker.requests[task][message] = Presence::Waiting;
    Some(next)
}

/// Whether a placement may be fetched.
pub(crate) fn waits(stage: Stage) -> bool {
    stage == Stage::Waiting
}
