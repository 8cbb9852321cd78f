//! Stable codes for everything that a user can see go wrong.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A code that never changes its meaning. `docs/errors/` has a page for each.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The payload is neither the MessagePack nor the JSON of a request.
    UnparsablePayload,
    /// The payload's schema version is not one that this fleet reads.
    UnsupportedSchema,
    /// A field has a value that is not allowed.
    InvalidField,
    /// A name is not `[A-Za-z0-9_-]{1,64}`, or an id is not a UUID.
    InvalidToken,
    /// The step type is not known.
    UnknownStepType,
    /// A command has no program.
    EmptyArgv,
    /// A NUL byte stands where the kernel cannot take one.
    NulByte,
    /// A path leads out of the sandbox.
    PathEscapes,
    /// A time-out or deadline is zero, or beyond the allowed range.
    InvalidTimeout,
    /// The request is larger than the fleet takes.
    RequestTooLarge,
    /// No pool has this name.
    UnknownPool,
    /// The id was used before with other content.
    IdConflict,
    /// The subject and the payload name different tenants, pools or ids.
    SubjectMismatch,
    /// The tenant has as much as it may have.
    QuotaExceeded,
    /// The deadline passed before the task could end.
    DeadlineExpired,
    /// The sandbox named by the task is gone.
    SandboxLost,
    /// The session had been idle for too long, or had lasted as long as it may.
    SessionExpired,
    /// The session had been closed.
    SessionClosed,
    /// The lease that the task was to run under is no longer held.
    StaleEpoch,
    /// Somebody cancelled the task.
    Cancelled,
    /// Attempts ran out on faults of the infrastructure.
    AttemptsExhausted,
    /// A working directory does not exist in the sandbox.
    WorkDirMissing,
    /// A file does not exist in the sandbox.
    FileNotFound,
    /// A path names something other than a regular file.
    NotAFile,
    /// The sandbox's user may not do this.
    PermissionDenied,
    /// The sandbox's disk limit is reached.
    NoSpace,
    /// A file is larger than one step may carry.
    FileTooLarge,
    /// A limit cannot be enforced on this host.
    LimitUnenforceable,
    /// A sandbox could not be made.
    SandboxCreateFailed,
    /// The sidecar did not answer, or answered nonsense.
    SidecarFailed,
    /// NATS cannot be reached.
    NatsUnreachable,
    /// nats-server is older than the floor.
    NatsTooOld,
    /// A stream or consumer exists with settings that would break promises.
    StreamMismatch,
    /// The results stream is full.
    ResultsFull,
    /// What was to be read has been removed, or its stream was lost.
    ResultsRemoved,
    /// Redis cannot be reached.
    RedisUnreachable,
    /// The Redis server is too old or lacks a needed setting.
    RedisUnsuitable,
    /// A fault that has no better name; the message tells more.
    Internal,
    /// A code of a newer fleet, which this version has no name for: the message
    /// tells more. Never sent.
    #[serde(other)]
    #[schemars(skip)]
    Unrecognised,
}

impl ErrorCode {
    pub const ALL: &[Self] = &[
        Self::UnparsablePayload,
        Self::UnsupportedSchema,
        Self::InvalidField,
        Self::InvalidToken,
        Self::UnknownStepType,
        Self::EmptyArgv,
        Self::NulByte,
        Self::PathEscapes,
        Self::InvalidTimeout,
        Self::RequestTooLarge,
        Self::UnknownPool,
        Self::IdConflict,
        Self::SubjectMismatch,
        Self::QuotaExceeded,
        Self::DeadlineExpired,
        Self::SandboxLost,
        Self::SessionExpired,
        Self::SessionClosed,
        Self::StaleEpoch,
        Self::Cancelled,
        Self::AttemptsExhausted,
        Self::WorkDirMissing,
        Self::FileNotFound,
        Self::NotAFile,
        Self::PermissionDenied,
        Self::NoSpace,
        Self::FileTooLarge,
        Self::LimitUnenforceable,
        Self::SandboxCreateFailed,
        Self::SidecarFailed,
        Self::NatsUnreachable,
        Self::NatsTooOld,
        Self::StreamMismatch,
        Self::ResultsFull,
        Self::ResultsRemoved,
        Self::RedisUnreachable,
        Self::RedisUnsuitable,
        Self::Internal,
    ];

    /// As it travels, e.g. `unknown_pool`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnparsablePayload => "unparsable_payload",
            Self::UnsupportedSchema => "unsupported_schema",
            Self::InvalidField => "invalid_field",
            Self::InvalidToken => "invalid_token",
            Self::UnknownStepType => "unknown_step_type",
            Self::EmptyArgv => "empty_argv",
            Self::NulByte => "nul_byte",
            Self::PathEscapes => "path_escapes",
            Self::InvalidTimeout => "invalid_timeout",
            Self::RequestTooLarge => "request_too_large",
            Self::UnknownPool => "unknown_pool",
            Self::IdConflict => "id_conflict",
            Self::SubjectMismatch => "subject_mismatch",
            Self::QuotaExceeded => "quota_exceeded",
            Self::DeadlineExpired => "deadline_expired",
            Self::SandboxLost => "sandbox_lost",
            Self::SessionExpired => "session_expired",
            Self::SessionClosed => "session_closed",
            Self::StaleEpoch => "stale_epoch",
            Self::Cancelled => "cancelled",
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::WorkDirMissing => "work_dir_missing",
            Self::FileNotFound => "file_not_found",
            Self::NotAFile => "not_a_file",
            Self::PermissionDenied => "permission_denied",
            Self::NoSpace => "no_space",
            Self::FileTooLarge => "file_too_large",
            Self::LimitUnenforceable => "limit_unenforceable",
            Self::SandboxCreateFailed => "sandbox_create_failed",
            Self::SidecarFailed => "sidecar_failed",
            Self::NatsUnreachable => "nats_unreachable",
            Self::NatsTooOld => "nats_too_old",
            Self::StreamMismatch => "stream_mismatch",
            Self::ResultsFull => "results_full",
            Self::ResultsRemoved => "results_removed",
            Self::RedisUnreachable => "redis_unreachable",
            Self::RedisUnsuitable => "redis_unsuitable",
            Self::Internal => "internal",
            Self::Unrecognised => "unrecognised",
        }
    }

    /// Whether the same request may succeed later without being changed.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Self::QuotaExceeded
                | Self::StaleEpoch
                | Self::SandboxCreateFailed
                | Self::SidecarFailed
                | Self::NatsUnreachable
                | Self::ResultsFull
                | Self::RedisUnreachable
                | Self::Internal
        )
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, for a program (`code`) and for a person (the rest).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorInfo {
    pub code: ErrorCode,
    /// What, where, and what to do.
    pub message: String,
    /// The field of the request, e.g. `steps[2].argv`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl ErrorInfo {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            field: None,
        }
    }

    #[must_use]
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }
}

impl fmt::Display for ErrorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.code)?;
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_travel_under_the_names_they_print() {
        for code in ErrorCode::ALL {
            assert_eq!(
                serde_json::to_value(code).unwrap(),
                serde_json::json!(code.as_str())
            );
        }
    }

    #[test]
    fn a_newer_fleets_code_does_not_make_its_terminal_unreadable() {
        let newer = serde_json::json!({"code": "not_yet_invented", "message": "why"});
        let read: ErrorInfo = serde_json::from_value(newer.clone()).unwrap();
        assert_eq!(read.code, ErrorCode::Unrecognised);
        assert_eq!(read.message, "why");
        let packed = rmp_serde::to_vec_named(&newer).unwrap();
        assert_eq!(rmp_serde::from_slice::<ErrorInfo>(&packed).unwrap(), read);
    }
}
