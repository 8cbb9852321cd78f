//! Frames: the numbered pieces of a task's output.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Blob, Epoch, ExitStatus};

/// One piece of one attempt's output. Readers order frames and drop repeats by
/// `(attempt, n)`; a higher attempt replaces everything of a lower one.
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

    /// The `Nats-Msg-Id` of the frame: `task/attempt/n`.
    pub fn message_id(&self, task: crate::TaskId) -> String {
        format!("{task}/{}/{}", self.attempt, self.n)
    }
}
