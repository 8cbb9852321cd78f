//! Logs, traces, metrics, health and named tasks, the same in every daemon.

mod chain;
pub mod failpoint;
pub mod history;
mod http;
mod init;
mod log;
pub mod metrics;
mod options;
pub mod propagate;
mod runtime_thread;
pub mod task;

pub use chain::Chain;
pub use http::Readiness;
pub use init::{Telemetry, TelemetryError, init};
pub use options::{LogFormat, TelemetryOptions};
pub use propagate::{RemoteSpan, TraceHeaders};
pub use task::TaskGroup;
