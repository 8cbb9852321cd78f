//! Frames: the numbered pieces of a task's output.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Blob, Epoch, ExitStatus, TaskId, TenantId, Terminal};

/// One piece of one attempt's output. Readers order frames and drop repeats by
/// `(attempt, epoch, n)`; a higher attempt replaces everything of a lower one,
/// and so does a higher epoch of the same attempt: a Redis that was flushed
/// counts attempts from the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Frame {
    pub attempt: u32,
    pub epoch: Epoch,
    /// Counts from 0 within the attempt, without gaps.
    pub n: u64,
    /// Index of the step.
    pub step: u32,
    pub kind: FrameKind,
    /// Empty for `exit`.
    #[serde(default)]
    pub data: Blob,
    /// Only with `exit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FrameKind {
    Stdout,
    Stderr,
    /// The step ended.
    Exit,
}

impl Frame {
    /// Most bytes of output in one frame.
    pub const MAX_DATA: usize = 64 * 1024;

    /// The `Nats-Msg-Id` of the frame: `tenant/task/attempt/epoch/n`.
    pub fn message_id(&self, tenant: &TenantId, task: TaskId) -> String {
        let Self {
            attempt, epoch, n, ..
        } = self;
        format!("{tenant}/{task}/{attempt}/{}/{n}", epoch.0)
    }

    /// Whether it is of the attempt that the terminal is of.
    pub fn is_of(&self, terminal: &Terminal) -> bool {
        let lease = terminal.sandbox.as_ref();
        self.attempt == terminal.attempt && lease.is_none_or(|lease| lease.epoch == self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_frames_share_an_id_and_a_repeat_has_its_own_again() {
        let frame = |attempt, epoch, n| Frame {
            attempt,
            epoch,
            n,
            step: 0,
            kind: FrameKind::Stdout,
            data: Blob::default(),
            exit: None,
        };
        let (t, u): (TenantId, TenantId) = ("t".parse().unwrap(), "u".parse().unwrap());
        let task = TaskId::derived(b"one");
        let first = frame(1, Epoch::new(3, 41), 7).message_id(&t, task);
        assert_eq!(first, format!("t/{task}/1/12884901929/7"));
        let cases = [
            (frame(1, Epoch::new(3, 41), 7), &t, task, true),
            (frame(1, Epoch::new(3, 41), 8), &t, task, false),
            (frame(2, Epoch::new(3, 41), 7), &t, task, false),
            // The same attempt, counted again after a flush.
            (frame(1, Epoch::new(4, 1), 7), &t, task, false),
            (frame(1, Epoch::new(3, 41), 7), &u, task, false),
            (
                frame(1, Epoch::new(3, 41), 7),
                &t,
                TaskId::derived(b"two"),
                false,
            ),
        ];
        for (frame, tenant, task, same) in cases {
            let id = frame.message_id(tenant, task);
            assert_eq!(id == first, same, "{id}");
        }
    }
}
