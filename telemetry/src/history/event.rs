//! The events of a history. Ids are texts here: a history is read after the fact, by who takes
//! nothing for granted.

use serde::{Deserialize, Serialize};

/// What happened. The name of the variant, in snake case, stands in the field `event`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    // A client's.
    /// A request is about to be published.
    Submitted {
        tenant: String,
        run: String,
        task: String,
        request_digest: String,
    },
    /// Its PubAck came.
    Accepted {
        tenant: String,
        task: String,
        sequence: u64,
        duplicate: bool,
    },
    /// A terminal was read, live or stored.
    TerminalRead {
        tenant: String,
        task: String,
        attempt: u32,
        outcome: String,
        digest: String,
    },
    /// All of a task's output was read, and agreed with its terminal.
    OutputRead {
        tenant: String,
        task: String,
        attempt: u32,
        streams: Vec<Sum>,
    },
    /// It did not agree, also when it was read a second time.
    OutputDamaged {
        tenant: String,
        task: String,
        detail: String,
    },

    // A dispatcher's.
    /// A claim was granted: one attempt, counted.
    Claimed {
        tenant: String,
        task: String,
        attempt: u32,
        /// Most attempts that this task may have.
        limit: u32,
        sandbox: String,
        epoch: u64,
        worker: String,
    },
    /// A placement was stored.
    Placed {
        tenant: String,
        task: String,
        attempt: u32,
        sandbox: String,
        epoch: u64,
        worker: String,
        duplicate: bool,
    },

    // A dispatcher's or a worker's.
    /// A terminal went to the gate.
    TerminalPut {
        tenant: String,
        task: String,
        attempt: u32,
        outcome: String,
        digest: String,
        gate: Gate,
    },
    /// A daemon has ended as it should: from here on it holds nothing.
    Left,

    // A worker's.
    /// A sandbox was made, and its sidecar has said what it finds in it.
    Created {
        sandbox: String,
        processes: u32,
        max_epoch: u64,
    },
    /// A used sandbox was reset, and its sidecar has said what it finds in it.
    Reset {
        sandbox: String,
        processes: u32,
        /// What was taken away: files, layers.
        evidence: String,
    },
    /// An idle sandbox is about to be offered to Redis.
    Offered { sandbox: String },
    /// A placement found its sandbox, which is leased from here on.
    Adopted {
        sandbox: String,
        epoch: u64,
        worker: String,
        tenant: String,
        task: String,
        attempt: u32,
    },
    /// A call is about to be made to a sidecar for a step.
    Operation {
        sandbox: String,
        epoch: u64,
        worker: String,
        tenant: String,
        task: String,
        attempt: u32,
        step: u32,
        call: Call,
    },
    /// The sidecar says that a command runs. With the sandbox, `pid` and `began` name it.
    CommandBegan {
        sandbox: String,
        task: String,
        attempt: u32,
        step: u32,
        pid: i32,
        began: u64,
    },
    /// The sidecar's word of its end came: all that it printed came before it.
    CommandEnded {
        sandbox: String,
        task: String,
        attempt: u32,
        step: u32,
        pid: i32,
        began: u64,
    },
    /// All frames of an attempt are acknowledged.
    FramesAcked {
        task: String,
        attempt: u32,
        frames: u64,
    },
    /// An attempt goes back to the dispatcher.
    HandedBack {
        tenant: String,
        task: String,
        attempt: u32,
        why: String,
    },
    /// An attempt ends without a word: its lease cannot be counted on.
    Quiet { task: String, attempt: u32 },
    /// Redis said that a lease is gone.
    LeaseLost { sandbox: String, epoch: u64 },
    /// A sandbox was destroyed; `clean` where nothing of it is left.
    Destroyed { sandbox: String, clean: bool },

    // A sidecar's.
    /// A call came to the epoch gate.
    Entered {
        sandbox: String,
        epoch: u64,
        /// The highest epoch before this call.
        highest: u64,
        call: Call,
        accepted: bool,
        /// Processes of an older holder that were ended.
        killed: u32,
    },
    /// What was passed on of a command's output.
    Wrote {
        sandbox: String,
        epoch: u64,
        pid: i32,
        began: u64,
        stdout_bytes: u64,
        stdout_sha256: String,
        stderr_bytes: u64,
        stderr_sha256: String,
        /// Up to its end; else somebody stopped listening.
        whole: bool,
    },
}

/// What became of a terminal at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    Won,
    Lost,
    /// It may be stored or not.
    Unknown,
}

/// A call to a sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    Adopt,
    Execute,
    WriteFile,
    ReadFile,
    Signal,
    Reset,
}

/// What one output stream of one step adds up to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Sum {
    pub step: u32,
    /// `stdout` or `stderr`.
    pub kind: String,
    pub bytes: u64,
    /// Hex; empty for no bytes.
    pub sha256: String,
}
