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
