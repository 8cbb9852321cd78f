//! Logs, traces, metrics, health and named tasks, the same in every daemon.

mod chain;
pub mod task;

pub use chain::Chain;
pub use task::TaskGroup;
