//! The worker: slots, execution, streams, the warm pool and its sandbox backends.

mod answers;
mod app;
pub mod backend;
mod ballot;
mod cancellation;
mod clock;
mod coalesce;
mod control;
mod execute;
mod farewell;
mod fetch;
mod finish;
mod holder;
mod inventory;
mod jobs;
mod load;
mod metrics;
mod options;
mod outcome;
mod output;
mod pool;
mod reconcile;
mod registry;
mod renew;
mod settle;
mod shared;
mod sidecar_client;
pub mod signals;
mod stream;
#[cfg(test)]
mod testing;

pub use app::{READINESS, Worker, WorkerError};
pub use load::LoadError;
pub use options::{InvalidOptions, NatsOptions, Timings, WorkerOptions};
pub use registry::RegistryError;
pub use sidecar_client::CallError;
