//! The dispatcher: intake, fair queue, claim, placement, pools and reaper.

mod app;
mod cancel;
mod decide;
mod dispatch;
mod error;
mod fleet;
mod intake;
mod lane;
mod load;
mod metrics;
mod options;
mod place;
mod progress;
mod queue;
mod reaper;
mod registry;
mod stray;
mod terminals;

pub use app::{readiness, run, run_with};
pub use error::DispatcherError;
pub use options::{DispatcherOptions, NatsOptions, Streams, Timings};
