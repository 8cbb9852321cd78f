//! Every point there is.

/// Points of a dispatcher.
pub mod dispatcher {
    /// A request was fetched and nothing is known of it yet.
    pub const FETCHED: &str = "dispatcher.fetched";
    /// Redis has granted the claim; no placement is published.
    pub const CLAIMED: &str = "dispatcher.claimed";
    /// RUN has the placement; REQ has the request too.
    pub const PLACED: &str = "dispatcher.placed";
    /// REQ has let the request go.
    pub const SETTLED: &str = "dispatcher.settled";
    /// A terminal of the dispatcher's is stored; REQ has the request too.
    pub const ENDED: &str = "dispatcher.ended";
    /// A dead letter is stored; its task has no terminal yet.
    pub const DEAD_LETTERED: &str = "dispatcher.dead_lettered";
    /// A dead worker's task is in REQ again; RUN has its placement too.
    pub const REQUEUED: &str = "dispatcher.requeued";
    /// Redis knows that a task is cancelled; nobody was told.
    pub const CANCEL_FLAGGED: &str = "dispatcher.cancel_flagged";

    /// Those that every one-shot task passes, in its order.
    pub const STEPS: [&str; 4] = [FETCHED, CLAIMED, PLACED, SETTLED];
    /// Those that some pass.
    pub const SIDE_STEPS: [&str; 4] = [ENDED, DEAD_LETTERED, REQUEUED, CANCEL_FLAGGED];

    /// Mutation: TERM is made without its gate, and keeps every terminal.
    pub const NO_GATE: &str = "dispatcher.mutation.terminal_gate";
    /// Mutation: a claim sees neither the attempts nor the lease of its task.
    pub const NO_CLAIM: &str = "dispatcher.mutation.claim";

    pub(super) const OTHERS: [&str; 2] = [NO_GATE, NO_CLAIM];
}

/// Points of a worker.
pub mod worker {
    /// A sandbox was made; it is not offered.
    pub const CREATED: &str = "worker.created";
    /// Redis has the offer; the worker has not noted it.
    pub const OFFERED: &str = "worker.offered";
    /// A placement was fetched and nothing is known of it yet.
    pub const FETCHED: &str = "worker.fetched";
    /// Its sandbox is leased; nothing runs.
    pub const ADOPTED: &str = "worker.adopted";
    /// A command runs.
    pub const COMMAND_BEGAN: &str = "worker.command_began";
    /// A frame is on its way; its acknowledgement is not there. Only where there are frames.
    pub const FRAME_SENT: &str = "worker.frame_sent";
    /// All frames are stored; there is no terminal.
    pub const FRAMES_ACKED: &str = "worker.frames_acked";
    /// The terminal is stored; RUN has the placement too.
    pub const TERMINAL_STORED: &str = "worker.terminal_stored";
    /// RUN has let the placement go; the lease is held.
    pub const SETTLED: &str = "worker.settled";
    /// The lease is free; the sandbox is there.
    pub const RELEASED: &str = "worker.released";
    /// The sandbox is gone.
    pub const DESTROYED: &str = "worker.destroyed";
    /// The lease of a task that goes back is free; REQ does not have it yet.
    pub const HANDING_BACK: &str = "worker.handing_back";
    /// A task that goes back is in REQ; RUN has its placement too.
    pub const HANDED_BACK: &str = "worker.handed_back";

    /// Those that every one-shot task with frames passes, its sandbox's included, in its order.
    pub const STEPS: [&str; 11] = [
        CREATED,
        OFFERED,
        FETCHED,
        ADOPTED,
        COMMAND_BEGAN,
        FRAME_SENT,
        FRAMES_ACKED,
        TERMINAL_STORED,
        SETTLED,
        RELEASED,
        DESTROYED,
    ];
    /// Those that some pass.
    pub const SIDE_STEPS: [&str; 2] = [HANDING_BACK, HANDED_BACK];

    /// Fault: a frame is lost on its way, and its acknowledgement never comes.
    pub const FRAME_LOST: &str = "worker.frame_lost";
    /// Fault: after a command, a call under a superseded epoch, as a holder would make it that
    /// has not noticed.
    pub const ZOMBIE: &str = "worker.zombie";
    /// Mutation: a frame whose acknowledgement failed counts as stored.
    pub const NO_FRAME_ACK: &str = "worker.mutation.frame_ack";
    /// Mutation: a used sandbox is offered again as it is.
    pub const NO_RESET: &str = "worker.mutation.reset";

    pub(super) const OTHERS: [&str; 4] = [FRAME_LOST, ZOMBIE, NO_FRAME_ACK, NO_RESET];
}

/// Points of a sidecar, which its worker tells it.
pub mod sidecar {
    /// A command is about to be started. `pause` makes the sidecar hang.
    pub const EXECUTE: &str = "sidecar.execute";
    /// Fault: a command is answered with what is no answer.
    pub const GARBAGE: &str = "sidecar.garbage";
    /// Mutation: every epoch is let in.
    pub const NO_EPOCH_CHECK: &str = "sidecar.mutation.epoch_check";

    pub(super) const ALL: [&str; 3] = [EXECUTE, GARBAGE, NO_EPOCH_CHECK];
}

/// Whether there is such a point.
pub fn known(name: &str) -> bool {
    let all: [&[&str]; 7] = [
        &dispatcher::STEPS,
        &dispatcher::SIDE_STEPS,
        &dispatcher::OTHERS,
        &worker::STEPS,
        &worker::SIDE_STEPS,
        &worker::OTHERS,
        &sidecar::ALL,
    ];
    all.iter().any(|names| names.contains(&name))
}
