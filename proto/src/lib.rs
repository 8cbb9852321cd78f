//! The generated code of `sidecar.proto`, and the names that both ends share.

/// `remuda.sidecar.v1`, as tonic generates it.
#[allow(
    clippy::pedantic,
    clippy::large_futures,
    unreachable_pub,
    missing_debug_implementations,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("remuda.sidecar.v1");
}

/// Metadata key of the stable error code on a failed call.
pub const ERROR_CODE_KEY: &str = "remuda-code";

/// Largest message that either end accepts, in bytes: a file of the largest
/// request and its envelope.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// The only descriptor, besides the standard ones, that a sidecar is given by
/// number: its end of the socket to the worker.
pub const SIDECAR_FD: i32 = 3;

/// The values of [`ERROR_CODE_KEY`] that a sidecar answers with. They are part
/// of the protocol: a code is never renamed and never given a second meaning.
pub mod code {
    /// The call's epoch is lower than one that was seen.
    pub const STALE_EPOCH: &str = "stale_epoch";
    /// A field of the request cannot be used; the message names it.
    pub const INVALID_ARGUMENT: &str = "invalid_argument";
    /// The working directory does not exist or is not a directory.
    pub const WORK_DIR_MISSING: &str = "work_dir_missing";
    /// The path leads out of the root.
    pub const PATH_ESCAPES: &str = "path_escapes";
    /// The path names something other than a regular file.
    pub const NOT_A_FILE: &str = "not_a_file";
    /// Nothing is there.
    pub const NOT_FOUND: &str = "not_found";
    /// The user of the sandbox may not do that.
    pub const PERMISSION_DENIED: &str = "permission_denied";
    /// The sandbox's disk, inodes or quota are used up.
    pub const NO_SPACE: &str = "no_space";
    /// The file is larger than the file system or the limits allow.
    pub const TOO_LARGE: &str = "too_large";
    /// Another failure of the sandbox's file system.
    pub const IO_ERROR: &str = "io_error";
    /// No such process in the sandbox, or not one of the user's.
    pub const NO_SUCH_PROCESS: &str = "no_such_process";
    /// The sandbox could not start a process.
    pub const SPAWN_FAILED: &str = "spawn_failed";
    /// A process outlived SIGKILL.
    pub const KILL_FAILED: &str = "kill_failed";
    /// The sandbox could not be emptied: destroy it.
    pub const RESET_FAILED: &str = "reset_failed";
}
