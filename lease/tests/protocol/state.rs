//! Everything that the protocol's parties remember, and what has happened so far.

use crate::broker::{Broker, Published};
use crate::dispatcher::Dispatcher;
use crate::redis::Redis;
use crate::worker::Worker;

/// Most tasks, workers and dispatchers that a configuration may have.
pub(crate) const TASKS: usize = 2;
pub(crate) const WORKERS: usize = 2;
pub(crate) const DISPATCHERS: usize = 2;
/// Request messages of one task: the client's, and one that each attempt may leave behind.
pub(crate) const REQUESTS: usize = 4;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Epoch {
    pub(crate) incarnation: u8,
    pub(crate) counter: u8,
}

/// A sandbox: the nth that its worker made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SandboxId {
    pub(crate) worker: usize,
    pub(crate) made: u8,
}

/// What a claim gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Grant {
    pub(crate) sandbox: SandboxId,
    pub(crate) epoch: Epoch,
    pub(crate) attempt: u8,
}

/// The end of a task. Two attempts never have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Terminal {
    Done { attempt: u8, epoch: Epoch },
    Cancelled,
    DeadLettered,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) broker: Broker,
    pub(crate) redis: Redis,
    /// What Redis would come back with if it were started again now.
    pub(crate) on_disk: Option<Box<Redis>>,
    pub(crate) dispatchers: [Dispatcher; DISPATCHERS],
    pub(crate) workers: [Worker; WORKERS],
    /// Faults and cancellations that may still come.
    pub(crate) faults: u8,
    pub(crate) cancels: u8,
    /// Cancellations that found their task nowhere and go to the gate.
    pub(crate) cancelling: [bool; TASKS],
    pub(crate) seen: Seen,
}

/// What the properties are judged by and no party knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Seen {
    /// Grants made for each task.
    pub(crate) grants: [u8; TASKS],
    /// How often Redis forgot attempts.
    pub(crate) forgot: u8,
    /// Under which epoch which sandbox has accepted something.
    pub(crate) acted: Vec<(Epoch, SandboxId)>,
    pub(crate) broken: Broken,
}

/// Invariants that an event, not a state, breaks. Once broken always broken.
#[expect(clippy::struct_excessive_bools, reason = "one for each invariant")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken {
    /// A stored terminal was replaced by another.
    pub(crate) terminal_changed: bool,
    /// A sandbox accepted an epoch below one that it had accepted.
    pub(crate) epoch_went_back: bool,
    /// Two sandboxes acted under one epoch.
    pub(crate) epoch_shared: bool,
    /// A sandbox or a task was granted while somebody else held it.
    pub(crate) granted_twice: bool,
}

impl State {
    /// `Client::submit`, `finish::hand_back`, `reaper::again`: a message of REQ, stored unless
    /// its id is remembered. It is a new one: who holds an older one of the same number settles
    /// that. `left` is the attempt that it is what is left of.
    pub(crate) fn publish_request(&mut self, task: usize, left: Option<(u8, Epoch)>) {
        let (attempt, epoch) = left.unwrap_or_default();
        let message = usize::from(attempt);
        if self.broker.publish_request(task, message, epoch) == Published::Duplicate {
            return;
        }
        for job in self.dispatchers.iter_mut().flatten() {
            job.gone |= job.task == task && job.message == message;
        }
    }

    /// Dispatchers have no names: of two states that differ in their order one stands for both.
    pub(crate) fn canonical(mut self) -> Self {
        if self.dispatchers[0] < self.dispatchers[1] {
            self.dispatchers.swap(0, 1);
            self.redis.swap_nonces();
            if let Some(redis) = &mut self.on_disk {
                redis.swap_nonces();
            }
        }
        self
    }
}

impl Seen {
    /// A sidecar has accepted an operation.
    pub(crate) fn act(&mut self, epoch: Epoch, sandbox: SandboxId) {
        for &(other, by) in &self.acted {
            self.broken.epoch_went_back |= by == sandbox && other > epoch;
            self.broken.epoch_shared |= by != sandbox && other == epoch;
        }
        if let Err(place) = self.acted.binary_search(&(epoch, sandbox)) {
            self.acted.insert(place, (epoch, sandbox));
        }
    }
}
