//! What is said to a worker: placements, and hints beside them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{SandboxRef, TaskId, TaskRequest, Timestamp};

/// A task and the lease that it runs under: the payload of RUN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Placement {
    pub task: TaskRequest,
    /// SHA-256, hex, of the request's bytes as they were published.
    pub request_digest: String,
    /// Counts from 1; counted when the task was claimed.
    pub attempt: u32,
    pub sandbox: SandboxRef,
    pub dispatched_at: Timestamp,
}

impl Placement {
    /// The `Nats-Msg-Id` of the placement: `tenant/task/attempt`.
    pub fn message_id(&self) -> String {
        format!("{}/{}/{}", self.task.tenant, self.task.id, self.attempt)
    }
}

/// A hint to one worker. Losing one costs time and nothing else: renewals and
/// the registry carry the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ControlMessage {
    /// End this task.
    Cancel(TaskId),
    /// Take nothing new, finish, leave.
    Drain,
    /// Read the pools and targets again.
    Pools,
}
