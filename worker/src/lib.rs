//! The worker: slots, execution, streams, the warm pool and its sandbox backends.

pub mod backend;
mod sidecar_client;

pub use sidecar_client::CallError;
