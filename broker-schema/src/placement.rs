//! What is said to a worker: placements, and hints beside them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{SandboxRef, TaskId, TaskRequest, TenantId, Timestamp};

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
    /// The `Nats-Msg-Id` of the placement: `tenant/task/attempt/epoch`. Attempts alone are not
    /// enough: a Redis that was flushed counts them from the beginning.
    pub fn message_id(&self) -> String {
        let (task, epoch) = (self.task.message_id(), self.sandbox.epoch.0);
        format!("{task}/{}/{epoch}", self.attempt)
    }

    /// The `Nats-Msg-Id` of its request where that is queued again:
    /// `tenant/task/retry-attempt/epoch`. The same whoever does it.
    pub fn retry_id(&self) -> String {
        let (task, epoch) = (self.task.message_id(), self.sandbox.epoch.0);
        format!("{task}/retry-{}/{epoch}", self.attempt)
    }
}

/// A hint to one worker. Losing one costs time and nothing else: renewals and
/// the registry carry the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ControlMessage {
    /// As older dispatchers say it, without whose task it is: it could be
    /// another tenant's. Look at the leases, which tell.
    Cancel(TaskId),
    /// End this task of this tenant.
    CancelTask { tenant: TenantId, task: TaskId },
    /// Take nothing new, finish, leave.
    Drain,
    /// Read the pools and targets again.
    Pools,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, SandboxId};

    #[test]
    fn an_attempt_that_is_counted_again_has_ids_of_its_own() {
        let placement = |attempt, epoch| Placement {
            task: TaskRequest {
                id: TaskId::derived(b"one"),
                ..TaskRequest::new(
                    "t".parse().unwrap(),
                    "r".parse().unwrap(),
                    "p".parse().unwrap(),
                    Vec::new(),
                )
            },
            request_digest: String::new(),
            attempt,
            sandbox: SandboxRef {
                sandbox: SandboxId::new(),
                worker: "w".parse().unwrap(),
                epoch,
            },
            dispatched_at: Timestamp::now(),
        };
        let first = placement(1, Epoch::new(3, 41));
        let task = first.task.id;
        assert_eq!(first.message_id(), format!("t/{task}/1/12884901929"));
        assert_eq!(first.retry_id(), format!("t/{task}/retry-1/12884901929"));
        for (other, same) in [
            (placement(1, Epoch::new(3, 41)), true),
            (placement(2, Epoch::new(3, 42)), false),
            // The same attempt, counted again after a flush.
            (placement(1, Epoch::new(4, 1)), false),
        ] {
            assert_eq!(other.message_id() == first.message_id(), same);
            assert_eq!(other.retry_id() == first.retry_id(), same);
            assert_ne!(other.message_id(), first.retry_id());
        }
    }
}
