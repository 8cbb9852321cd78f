//! The protocol as a state machine: who may do what next, and what must hold whatever they do.

use stateright::{Model, Property};

use crate::broker::Broker;
use crate::faults::Fault;
use crate::redis::Redis;
use crate::state::{DISPATCHERS, Epoch, REQUESTS, SandboxId, Seen, State, TASKS};
use crate::worker::Worker;
use crate::{dispatcher, mishaps, properties, worker};

/// A configuration that is explored to its end.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) tasks: usize,
    pub(crate) workers: usize,
    pub(crate) dispatchers: usize,
    /// Most attempts at a task.
    pub(crate) attempts: u8,
    pub(crate) faults: u8,
    pub(crate) cancels: u8,
    /// Sandboxes are reset and offered again, as the design allows; otherwise destroyed, as the
    /// worker does today.
    pub(crate) reset_in_place: bool,
    pub(crate) mutation: Option<Mutation>,
}

/// A part of the protocol that is left out, to see that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// TERM keeps the last terminal instead of the first.
    NoTerminalGate,
    /// Sidecars accept any epoch.
    NoEpochCheck,
    /// A claim reads with one command and writes with another.
    ClaimNotAtomic,
    /// Redis goes on under the old incarnation after a restart or a flush.
    IncarnationKept,
    /// Workers know a placement again by task and attempt alone.
    JobsWithoutEpoch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// The client's outbox, which has no terminal yet, publishes again: `Tracked::look`.
    Resubmit(usize),
    Cancel(usize),
    WriteCancelled(usize),
    FetchRequest {
        d: usize,
        task: usize,
        message: usize,
    },
    Dispatch(usize),
    Claim {
        d: usize,
        pick: Option<SandboxId>,
    },
    Bootstrap,
    Reap(usize),
    SeeTo(usize),
    FetchPlacement(usize),
    Send(usize),
    Arrive(usize, Epoch),
    Conclude(usize),
    Renew(usize),
    Refuse(usize),
    SettleReturned(usize),
    Beat(usize),
    Start(usize),
    LeaseRunsOut(SandboxId),
    /// Ten minutes pass in which nothing else helped.
    DuplicateWindowPasses,
    Fault(Fault),
}

impl Protocol {
    pub(crate) fn initial(&self) -> State {
        let mut broker = Broker::new();
        for task in 0..self.tasks {
            broker.publish_request(task, 0, Epoch::default());
        }
        let mut state = State {
            broker,
            redis: Redis::empty(),
            on_disk: None,
            dispatchers: [None; DISPATCHERS],
            workers: std::array::from_fn(|w| Worker::new(w, w < self.workers)),
            faults: self.faults,
            cancels: self.cancels,
            cancelling: [false; TASKS],
            seen: Seen::default(),
        };
        // A fleet that is up: what comes before is the same as after a flush.
        state = dispatcher::bootstrap(&state).unwrap_or(state);
        for w in 0..self.workers {
            state = worker::beat(&state, w).unwrap_or(state);
        }
        state
    }

    /// What may happen without anything going wrong.
    pub(crate) fn steps(&self, state: &State, out: &mut Vec<Action>) {
        out.push(Action::Bootstrap);
        for task in 0..self.tasks {
            out.extend([Action::Resubmit(task), Action::WriteCancelled(task)]);
        }
        for d in 0..self.dispatchers {
            out.push(Action::Dispatch(d));
            out.push(Action::Claim { d, pick: None });
            for sandbox in state.redis.warm() {
                let pick = Some(sandbox);
                out.push(Action::Claim { d, pick });
            }
            for task in 0..self.tasks {
                let messages = 0..REQUESTS;
                out.extend(messages.map(|message| Action::FetchRequest { d, task, message }));
            }
        }
        for place in 0..state.broker.placements.len() {
            out.extend([
                Action::SeeTo(place),
                Action::FetchPlacement(place),
                Action::Refuse(place),
                Action::SettleReturned(place),
            ]);
        }
        for w in 0..self.workers {
            out.extend([
                Action::Reap(w),
                Action::Send(w),
                Action::Conclude(w),
                Action::Renew(w),
                Action::Beat(w),
                Action::Start(w),
            ]);
            let operations = state.workers[w].operations.iter();
            out.extend(operations.map(|epoch| Action::Arrive(w, *epoch)));
        }
        let leases = state.redis.sandboxes.iter();
        out.extend(leases.map(|(sandbox, _)| Action::LeaseRunsOut(*sandbox)));
    }

    pub(crate) fn over(&self, state: &State) -> bool {
        (0..self.tasks).all(|task| state.broker.terminals[task].is_some())
    }

    fn apply(&self, state: &State, action: Action) -> Option<State> {
        match action {
            Action::Resubmit(task) => {
                let mut next = state.clone();
                let unread = state.broker.terminals[task].is_none();
                (unread
                    && !next
                        .broker
                        .request_ids
                        .contains(&(task, 0, Epoch::default())))
                .then(|| next.publish_request(task, None))?;
                Some(next)
            }
            Action::Cancel(task) => dispatcher::cancel(state, task),
            Action::WriteCancelled(task) => dispatcher::write_cancelled(self, state, task),
            Action::FetchRequest { d, task, message } => dispatcher::fetch(state, d, task, message),
            Action::Dispatch(d) => dispatcher::step(self, state, d),
            Action::Claim { d, pick } => dispatcher::claim(self, state, d, pick, true),
            Action::Bootstrap => dispatcher::bootstrap(state),
            Action::Reap(w) => {
                let known = state.redis.alive[w]
                    || state.redis.sandboxes.iter().any(|(id, _)| id.worker == w);
                (!state.workers[w].up && known).then(|| {
                    let mut next = state.clone();
                    next.redis.reap(w);
                    next
                })
            }
            Action::SeeTo(place) => dispatcher::see_to(state, place),
            Action::FetchPlacement(place) => worker::fetch(self, state, place),
            Action::Send(w) => worker::send(state, w),
            Action::Arrive(w, epoch) => worker::arrive(self, state, w, epoch),
            Action::Conclude(w) => worker::conclude(self, state, w),
            Action::Renew(w) => worker::renew(self, state, w),
            Action::Refuse(place) => worker::refuse(state, place),
            Action::SettleReturned(place) => worker::settle_returned(self, state, place),
            Action::Beat(w) => worker::beat(state, w),
            Action::Start(w) => mishaps::start(state, w),
            Action::LeaseRunsOut(sandbox) => mishaps::lease_runs_out(state, sandbox, false),
            Action::DuplicateWindowPasses => {
                // Ten minutes: everything else that could happen has happened by then.
                let mut steps = Vec::new();
                self.steps(state, &mut steps);
                let rests = steps
                    .into_iter()
                    .filter_map(|step| self.apply(state, step))
                    .all(|next| next == *state);
                let mut next = state.clone();
                next.broker.forget_ids();
                (rests && next != *state).then_some(next)
            }
            Action::Fault(fault) => fault.apply(self, state),
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.initial()]
    }

    fn actions(&self, state: &State, out: &mut Vec<Action>) {
        self.steps(state, out);
        if self.over(state) {
            // What is under way comes to rest; nothing more goes wrong.
            return;
        }
        out.push(Action::DuplicateWindowPasses);
        out.extend((0..self.tasks).map(Action::Cancel));
        let mut faults = Vec::new();
        Fault::all(self, state, &mut faults);
        out.extend(faults.into_iter().map(Action::Fault));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        self.apply(last, action).map(State::canonical)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
