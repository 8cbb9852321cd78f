//! How a task ended, and whose doing it was.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// Every step exited with 0.
    Succeeded,
    /// A step exited with something else; the terminal's `exit` tells.
    Failed,
    /// A step or the attempt took longer than it may.
    TimedOut,
    /// The kernel killed a process of the step for want of memory.
    OomKilled,
    /// Somebody cancelled it.
    Cancelled,
    /// Its deadline passed first.
    Expired,
    /// The request cannot be run; the terminal's `error` tells.
    Rejected,
    /// The session's sandbox is gone.
    SandboxLost,
    /// The infrastructure failed it more often than it may.
    DeadLettered,
}

impl Outcome {
    /// As it travels, e.g. `timed_out`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::OomKilled => "oom_killed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Rejected => "rejected",
            Self::SandboxLost => "sandbox_lost",
            Self::DeadLettered => "dead_lettered",
        }
    }

    /// Whose doing an end like this is, before any evidence says otherwise.
    /// What sandboxed code can cause is never the infrastructure's.
    pub fn default_attribution(self) -> Attribution {
        match self {
            Self::Succeeded | Self::Failed | Self::TimedOut | Self::OomKilled => {
                Attribution::Policy
            }
            Self::Cancelled | Self::Expired | Self::Rejected => Attribution::User,
            Self::SandboxLost | Self::DeadLettered => Attribution::Infrastructure,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whose doing an outcome was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Attribution {
    /// The code that ran in the sandbox: the model's.
    Policy,
    /// Whoever asked: a bad request, a cancellation, a deadline.
    User,
    /// The fleet or the machine under it: the sample says nothing.
    Infrastructure,
}

impl Attribution {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::User => "user",
            Self::Infrastructure => "infrastructure",
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct ExitStatus {
    /// 0 to 255; 127 not found, 126 not executable, 128 + n by signal n.
    pub code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
}

impl ExitStatus {
    pub const fn code(code: i32) -> Self {
        Self { code, signal: None }
    }

    pub const fn success(self) -> bool {
        self.code == 0
    }
}
