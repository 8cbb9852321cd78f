//! The worker: slots, execution, streams, the warm pool and its sandbox backends.

pub mod backend;
mod coalesce;
mod inventory;
mod jobs;
mod options;
mod output;
mod sidecar_client;

pub use options::{InvalidOptions, NatsOptions, Timings, WorkerOptions};
pub use sidecar_client::CallError;
