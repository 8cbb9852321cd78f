//! The terminal: the one final result of a task.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Attribution, Blob, ErrorInfo, ExitStatus, GroupId, Outcome, PoolId, RunId, SandboxRef, TaskId,
    TenantId, Timestamp,
};

/// The one final result of a task. Says what happened so that no trainer has
/// to guess.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Terminal {
    pub task: TaskId,
    pub tenant: TenantId,
    pub run: RunId,
    pub pool: PoolId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// SHA-256 of the request's bytes, hex: which request this answers.
    /// Empty where the request could not be read.
    #[serde(default)]
    pub request_digest: String,
    /// The attempt that this is the end of; 0 where none was made.
    pub attempt: u32,
    pub outcome: Outcome,
    pub attribution: Attribution,
    /// What the outcome and its attribution rest on, for people.
    #[serde(default)]
    pub evidence: String,
    /// Of the last command that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorInfo>,
    #[serde(default)]
    pub steps: Vec<StepResult>,
    /// Frames that were published for this attempt, all of them before this.
    #[serde(default)]
    pub frames: u64,
    #[serde(default)]
    pub usage: Usage,
    #[serde(default)]
    pub times: Times,
    /// Where it ran; the session's address where the sandbox was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxRef>,
    /// Whether the sandbox was kept as a session.
    #[serde(default)]
    pub kept: bool,
}

impl Terminal {
    /// Whether the result says something about the sandboxed code. Where it
    /// does not, a trainer masks the sample instead of rewarding it.
    pub fn valid(&self) -> bool {
        self.attribution != Attribution::Infrastructure
    }

    /// Whether it counts as one of a group's valid results: it is valid, and
    /// the task was not kept from ending by itself.
    pub fn counts_for_group(&self) -> bool {
        let ended = !matches!(
            self.outcome,
            Outcome::Cancelled | Outcome::Expired | Outcome::Rejected
        );
        self.valid() && ended
    }
}

/// How one step ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepResult {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// 0 for a file step that worked.
    pub exit: ExitStatus,
    #[serde(default)]
    pub timed_out: bool,
    #[serde(default)]
    pub oom_killed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorInfo>,
    #[serde(default)]
    pub stdout: Output,
    #[serde(default)]
    pub stderr: Output,
    #[serde(default)]
    pub usage: Usage,
}

/// One output stream of a step: its beginning, its end, and what it adds up to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// Bytes that the step wrote.
    pub bytes: u64,
    /// Bytes beyond the output limit, read and dropped: never in a frame.
    #[serde(default)]
    pub dropped: u64,
    /// SHA-256, hex, of the bytes that were kept (`bytes - dropped`), which are
    /// also those of the frames. Empty for no bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sha256: String,
    /// The first bytes: all that were kept where `tail` is absent.
    #[serde(default)]
    pub head: Blob,
    /// The last bytes, where head and tail together are not all that were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<Blob>,
}

impl Output {
    /// Whether the step wrote more than its limit.
    pub fn truncated(&self) -> bool {
        self.dropped > 0
    }

    /// All bytes that were kept, where the terminal carries them.
    pub fn whole(&self) -> Option<&[u8]> {
        self.tail.is_none().then_some(self.head.as_slice())
    }
}

/// What was used. Times in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    pub wall_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    /// Most memory of everything in the sandbox, where the kernel counts it;
    /// else the largest resident set of a command. Bytes.
    pub peak_memory_bytes: u64,
}

/// When a task came to where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Times {
    /// The requester published it.
    pub queued: Timestamp,
    /// A sandbox was claimed for it, or it went straight to its session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatched: Option<Timestamp>,
    /// The worker began its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    pub finished: Timestamp,
}
