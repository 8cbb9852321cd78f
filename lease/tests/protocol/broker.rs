//! NATS: two work queues, the memory for message ids, the terminal gate, the incarnation's
//! sequence. Acknowledgements are not fenced: whoever sends one settles the message.

use std::collections::BTreeSet;

use crate::state::{Epoch, Grant, REQUESTS, SandboxId, TASKS, Terminal};

/// Where a message of REQ is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Presence {
    #[default]
    Absent,
    Waiting,
    Delivered,
}

/// A message of RUN. Its id is `tenant/task/attempt/epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Placement {
    pub(crate) task: usize,
    pub(crate) attempt: u8,
    pub(crate) epoch: Epoch,
    pub(crate) sandbox: SandboxId,
    pub(crate) stage: Stage,
}

/// How far a worker is with a placement. All but `Waiting` are its memory: when it dies the
/// server delivers the message again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    Waiting,
    /// A holder runs it.
    Held,
    /// It cannot run here.
    Refused,
    /// Its request is queued again; only the acknowledgement is left.
    Returned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Published {
    Stored,
    Duplicate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Won,
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Broker {
    /// REQ, by task and message: 0 is the client's, n what attempt n left behind.
    pub(crate) requests: [[Presence; REQUESTS]; TASKS],
    /// The message ids of REQ that the server remembers: task, message, and the epoch of the
    /// attempt that left it behind; of the client's none.
    pub(crate) request_ids: BTreeSet<(usize, usize, Epoch)>,
    /// RUN, sorted.
    pub(crate) placements: Vec<Placement>,
    /// The tasks and epochs whose placements the server remembers; an epoch has one attempt.
    pub(crate) placement_ids: BTreeSet<(usize, Epoch)>,
    pub(crate) terminals: [Option<Terminal>; TASKS],
    /// Last sequence of INC. Never lost.
    pub(crate) incarnations: u8,
}

impl Broker {
    pub(crate) fn new() -> Self {
        Self {
            requests: Default::default(),
            request_ids: BTreeSet::new(),
            placements: Vec::new(),
            placement_ids: BTreeSet::new(),
            terminals: [None; TASKS],
            incarnations: 0,
        }
    }

    /// A publish with a message id.
    pub(crate) fn publish_request(
        &mut self,
        task: usize,
        message: usize,
        epoch: Epoch,
    ) -> Published {
        if !self.request_ids.insert((task, message, epoch)) {
            return Published::Duplicate;
        }
        self.requests[task][message] = Presence::Waiting;
        Published::Stored
    }

    /// `place::publish`.
    pub(crate) fn publish_placement(&mut self, task: usize, grant: Grant) -> Published {
        if !self.placement_ids.insert((task, grant.epoch)) {
            return Published::Duplicate;
        }
        self.placements.push(Placement {
            task,
            attempt: grant.attempt,
            epoch: grant.epoch,
            sandbox: grant.sandbox,
            stage: Stage::Waiting,
        });
        self.placements.sort_unstable();
        Published::Stored
    }

    /// `Broker::put_terminal`. Without its gate the stream keeps the last terminal.
    pub(crate) fn put_terminal(&mut self, task: usize, terminal: Terminal, gated: bool) -> Gate {
        match self.terminals[task] {
            Some(first) if first == terminal => Gate::Won,
            Some(_) if gated => Gate::Lost,
            _ => {
                self.terminals[task] = Some(terminal);
                Gate::Won
            }
        }
    }

    pub(crate) fn stage(&mut self, place: usize, stage: Stage) {
        self.placements[place].stage = stage;
        self.placements.sort_unstable();
    }

    /// The place of what a holder runs; `None` when somebody else has settled it.
    pub(crate) fn held(&self, sandbox: SandboxId, epoch: Epoch) -> Option<usize> {
        self.placements.iter().position(|placement| {
            placement.stage == Stage::Held
                && placement.sandbox == sandbox
                && placement.epoch == epoch
        })
    }

    /// What a worker has in hand comes again once its `ack_wait` has passed.
    pub(crate) fn redeliver_placements(&mut self, worker: usize) {
        for placement in &mut self.placements {
            if placement.sandbox.worker == worker {
                placement.stage = Stage::Waiting;
            }
        }
        self.placements.sort_unstable();
    }

    /// A restart, or the end of the duplicate window: only stored messages' ids are remembered.
    pub(crate) fn forget_ids(&mut self) {
        let requests = &self.requests;
        self.request_ids
            .retain(|(task, message, _)| requests[*task][*message] != Presence::Absent);
        let placements = self.placements.iter();
        self.placement_ids = placements
            .map(|placement| (placement.task, placement.epoch))
            .collect();
    }

    /// The work queues are lost, as in a power cut without `sync_interval: always`.
    pub(crate) fn lose_queues(&mut self) {
        self.requests = Default::default();
        self.placements.clear();
        self.forget_ids();
    }
}
