//! Sessions: a sandbox kept across tasks.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Epoch, SandboxId, WorkerId};

/// Keep the sandbox after the task, for the tasks that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SessionOptions {
    /// The session closes after this long without a task, in milliseconds.
    pub idle_timeout_ms: u64,
    /// The session closes this long after it was opened, in milliseconds.
    pub max_life_ms: u64,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            idle_timeout_ms: 600_000,
            max_life_ms: 4 * 3_600_000,
        }
    }
}

/// Where a session lives: what a task for it must name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct SandboxRef {
    pub sandbox: SandboxId,
    pub worker: WorkerId,
    pub epoch: Epoch,
}
