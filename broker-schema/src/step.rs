//! Steps: what a task does, one after the other.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Blob;

/// One command, file patch or file read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// A name for people; results carry it back.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub action: StepKind,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StepKind {
    Command(Command),
    FilePatch(FilePatch),
    FileRead(FileRead),
}

impl StepKind {
    /// As it travels, e.g. `file_patch`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
            Self::FilePatch(_) => "file_patch",
            Self::FileRead(_) => "file_read",
        }
    }
}

/// Run a program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Command {
    /// The program, found by `PATH` where it has no slash, and its arguments.
    pub argv: Vec<Blob>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Blob>,
    /// Default `/workspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_dir: Option<String>,
    #[serde(default, skip_serializing_if = "Blob::is_empty")]
    pub stdin: Blob,
    /// Milliseconds; default what is left of the task's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Bytes kept of stdout and of stderr each; the rest is read and dropped.
    /// Default 8 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit: Option<u64>,
}

/// Write a file whole, making its parent folders.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FilePatch {
    /// Absolute, or relative to `/workspace`.
    pub path: String,
    pub content: Blob,
    /// Permission bits; default 0o644.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// Read a file; its content is the step's stdout.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileRead {
    /// Absolute, or relative to `/workspace`.
    pub path: String,
    #[serde(default)]
    pub offset: u64,
    /// Most bytes to read; default 8 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
}

impl Step {
    /// A command step from its arguments.
    pub fn command<A: AsRef<[u8]>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            name: String::new(),
            action: StepKind::Command(Command {
                argv: argv.into_iter().map(|a| a.as_ref().into()).collect(),
                ..Command::default()
            }),
        }
    }

    /// A step that writes a file.
    pub fn write(path: impl Into<String>, content: impl Into<Blob>) -> Self {
        Self {
            name: String::new(),
            action: StepKind::FilePatch(FilePatch {
                path: path.into(),
                content: content.into(),
                mode: None,
            }),
        }
    }
}
