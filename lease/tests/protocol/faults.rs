//! What may go wrong, each at any time, as often as the configuration allows.

use crate::dispatcher;
use crate::mishaps;
use crate::model::{Mutation, Protocol};
use crate::redis::Redis;
use crate::state::{SandboxId, State};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    DispatcherCrash(usize),
    WorkerCrash(usize),
    /// The answer to a claim that was granted is lost.
    ClaimUnanswered(usize, SandboxId),
    /// The acknowledgement of a placement is lost, or the placement itself.
    PublishUnanswered {
        d: usize,
        stored: bool,
    },
    /// A request comes again while it is held: acknowledgements and progress are late.
    RequestRedelivered {
        task: usize,
        message: usize,
    },
    /// A lease runs out under a holder that renews it: a clock jumped, or renewals are late.
    ClockDrift(SandboxId),
    /// A worker that is alive is declared dead.
    FalselyReaped(usize),
    /// A worker cannot reach Redis for longer than a lease holds.
    Overdue(usize),
    /// NATS was restarted: ids of acknowledged messages are forgotten.
    IdsForgotten,
    /// NATS lost both work queues.
    QueuesLost,
    RedisFlushed,
    /// From here on nothing that Redis writes reaches its disk ..
    RedisStopsSaving,
    /// .. and now it is started again with what did.
    RedisRestored,
}

impl Fault {
    /// Every fault that could strike, sensible or not; [`apply`] knows.
    pub(crate) fn all(protocol: &Protocol, state: &State, out: &mut Vec<Self>) {
        out.extend([
            Self::IdsForgotten,
            Self::QueuesLost,
            Self::RedisFlushed,
            Self::RedisStopsSaving,
            Self::RedisRestored,
        ]);
        for d in 0..protocol.dispatchers {
            out.push(Self::DispatcherCrash(d));
            out.extend([true, false].map(|stored| Self::PublishUnanswered { d, stored }));
            out.extend(
                state
                    .redis
                    .warm()
                    .map(|pick| Self::ClaimUnanswered(d, pick)),
            );
        }
        for w in 0..protocol.workers {
            out.extend([
                Self::WorkerCrash(w),
                Self::FalselyReaped(w),
                Self::Overdue(w),
            ]);
        }
        for task in 0..protocol.tasks {
            let messages = 0..state.broker.requests[task].len();
            out.extend(messages.map(|message| Self::RequestRedelivered { task, message }));
        }
        let leases = state.redis.sandboxes.iter();
        out.extend(leases.map(|(sandbox, _)| Self::ClockDrift(*sandbox)));
    }

    /// `None` where it would change nothing.
    pub(crate) fn apply(self, protocol: &Protocol, state: &State) -> Option<State> {
        // The second half of a restart was paid for with the first.
        let cost = u8::from(self != Self::RedisRestored);
        let faults = state.faults.checked_sub(cost)?;
        let mut next = match self {
            Self::DispatcherCrash(d) => dispatcher::crash(state, d)?,
            Self::WorkerCrash(w) => mishaps::crash(state, w)?,
            Self::ClaimUnanswered(d, pick) => {
                dispatcher::claim(protocol, state, d, Some(pick), false)?
            }
            Self::PublishUnanswered { d, stored } => {
                dispatcher::publish_unanswered(state, d, stored)?
            }
            Self::RequestRedelivered { task, message } => {
                dispatcher::redeliver(state, task, message)?
            }
            Self::ClockDrift(sandbox) => mishaps::lease_runs_out(state, sandbox, true)?,
            Self::FalselyReaped(w) => {
                let mut next = state.clone();
                (state.workers[w].up && state.redis.alive[w]).then(|| next.redis.reap(w))?;
                next
            }
            Self::Overdue(w) => mishaps::overdue(protocol, state, w)?,
            Self::IdsForgotten => {
                let mut next = state.clone();
                next.broker.forget_ids();
                (next != *state).then_some(next)?
            }
            Self::QueuesLost => {
                let mut next = state.clone();
                next.broker.lose_queues();
                (next != *state).then_some(next)?
            }
            Self::RedisFlushed => (state.redis != Redis::empty())
                .then(|| comes_back(protocol, state, Redis::empty()))?,
            Self::RedisStopsSaving => {
                let mut next = state.clone();
                next.on_disk = Some(Box::new(state.redis.clone()));
                state.on_disk.is_none().then_some(next)?
            }
            Self::RedisRestored => {
                let saved = state.on_disk.as_deref()?;
                comes_back(protocol, state, saved.clone())
            }
        };
        next.faults = faults;
        Some(next)
    }
}

/// Another process answers, with this in memory. Whether it forgot anything it cannot tell.
fn comes_back(protocol: &Protocol, state: &State, mut redis: Redis) -> State {
    let mut next = state.clone();
    let forgot = (0..protocol.tasks)
        .any(|task| redis.tasks[task].attempts < state.redis.tasks[task].attempts);
    next.seen.forgot += u8::from(forgot);
    redis.in_force = protocol.mutation == Some(Mutation::IncarnationKept);
    if redis.in_force && redis.incarnation == 0 {
        redis.incarnation = state.redis.incarnation;
    }
    next.redis = redis;
    next.on_disk = None;
    next
}
