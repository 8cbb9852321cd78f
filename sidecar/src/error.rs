//! What a call can fail with, its stable code and its gRPC status.

use nix::errno::Errno;
use remuda_proto::{ERROR_CODE_KEY, code};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Why a call was refused or failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Failure {
    #[error("epoch {given} is superseded by {highest}")]
    StaleEpoch { given: u64, highest: u64 },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: &'static str },
    #[error("work_dir {path}: {}", errno.desc())]
    WorkDirMissing { path: String, errno: Errno },
    #[error("path {path} leads out of the root")]
    PathEscapes { path: String },
    #[error("path {path} is not a regular file: {what}")]
    NotAFile { path: String, what: &'static str },
    #[error("{operation} {path}: {}", errno.desc())]
    File {
        operation: &'static str,
        path: String,
        errno: Errno,
    },
    #[error("process {pid} is not one of this sandbox's commands")]
    NoSuchProcess { pid: i32 },
    #[error("cannot start a process: {step}: {}", errno.desc())]
    Spawn { step: &'static str, errno: Errno },
    #[error("processes outlived SIGKILL for {seconds} s")]
    Kill { seconds: u64 },
    #[error("cannot empty {folder}: {reason}")]
    Reset { folder: String, reason: String },
}

impl Failure {
    pub(crate) fn invalid(field: impl Into<String>, reason: &'static str) -> Self {
        Self::Invalid {
            field: field.into(),
            reason,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::StaleEpoch { .. } => code::STALE_EPOCH,
            Self::Invalid { .. } => code::INVALID_ARGUMENT,
            Self::WorkDirMissing { .. } => code::WORK_DIR_MISSING,
            Self::PathEscapes { .. } => code::PATH_ESCAPES,
            Self::NotAFile { .. } => code::NOT_A_FILE,
            Self::File { errno, .. } => match errno {
                Errno::ENOENT | Errno::ENOTDIR => code::NOT_FOUND,
                Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ETXTBSY => {
                    code::PERMISSION_DENIED
                }
                Errno::ENOSPC | Errno::EDQUOT => code::NO_SPACE,
                Errno::EFBIG => code::TOO_LARGE,
                Errno::ENAMETOOLONG | Errno::EINVAL => code::INVALID_ARGUMENT,
                Errno::ELOOP | Errno::EXDEV => code::PATH_ESCAPES,
                Errno::EISDIR | Errno::ENXIO => code::NOT_A_FILE,
                _ => code::IO_ERROR,
            },
            Self::NoSuchProcess { .. } => code::NO_SUCH_PROCESS,
            Self::Spawn { .. } => code::SPAWN_FAILED,
            Self::Kill { .. } => code::KILL_FAILED,
            Self::Reset { .. } => code::RESET_FAILED,
        }
    }

    fn grpc(&self) -> Code {
        match self.code() {
            code::STALE_EPOCH | code::NOT_A_FILE => Code::FailedPrecondition,
            code::INVALID_ARGUMENT
            | code::WORK_DIR_MISSING
            | code::PATH_ESCAPES
            | code::TOO_LARGE => Code::InvalidArgument,
            code::NOT_FOUND | code::NO_SUCH_PROCESS => Code::NotFound,
            code::PERMISSION_DENIED => Code::PermissionDenied,
            code::NO_SPACE => Code::ResourceExhausted,
            _ => Code::Internal,
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let mut metadata = MetadataMap::new();
        metadata.insert(ERROR_CODE_KEY, MetadataValue::from_static(failure.code()));
        Self::with_metadata(failure.grpc(), failure.to_string(), metadata)
    }
}

/// A hostile path as part of a message: printable and short.
pub(crate) fn shown(path: &[u8]) -> String {
    const LONGEST: usize = 256;
    let mut text = path
        .get(..LONGEST)
        .unwrap_or(path)
        .escape_ascii()
        .to_string();
    if path.len() > LONGEST {
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_statuses() {
        let file = |errno| Failure::File {
            operation: "open",
            path: "x".into(),
            errno,
        };
        for (failure, code, grpc) in [
            (
                Failure::StaleEpoch {
                    given: 1,
                    highest: 2,
                },
                "stale_epoch",
                Code::FailedPrecondition,
            ),
            (file(Errno::ENOENT), "not_found", Code::NotFound),
            (file(Errno::EDQUOT), "no_space", Code::ResourceExhausted),
            (
                file(Errno::EROFS),
                "permission_denied",
                Code::PermissionDenied,
            ),
            (file(Errno::EXDEV), "path_escapes", Code::InvalidArgument),
            (file(Errno::EIO), "io_error", Code::Internal),
            (Failure::Kill { seconds: 5 }, "kill_failed", Code::Internal),
        ] {
            let status = Status::from(failure);
            assert_eq!(status.code(), grpc, "{code}");
            assert_eq!(status.metadata().get(ERROR_CODE_KEY).unwrap(), code);
        }
    }

    #[test]
    fn shows_hostile_paths() {
        assert_eq!(shown(b"a\n\xff"), "a\\n\\xff");
        assert_eq!(shown(&[b'a'; 300]).len(), 259);
    }
}
