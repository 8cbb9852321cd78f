//! What happened, written down for a test to judge afterwards: one JSON object a line, each
//! appended by one write, so that many processes can share a file and one that is killed leaves
//! whole lines.
//!
//! Only debug builds record. In a release build [`History`] is empty, [`History::record`] is
//! nothing, and no option turns it on.

mod event;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub use event::{Call, Event, Gate, Sum};

/// One line of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `CLOCK_BOOTTIME`, nanoseconds: the same for all processes of a machine, never set back.
    pub at: u64,
    /// Which process: `remuda-worker/1234`, `client/77`, `sidecar/<sandbox>`.
    pub who: String,
    #[serde(flatten)]
    pub event: Event,
}

/// Where events go. Clones write to the same file; the default writes nowhere.
#[derive(Debug, Clone, Default)]
pub struct History {
    #[cfg(debug_assertions)]
    log: Option<std::sync::Arc<recording::Log>>,
}

impl History {
    /// Writes an event down, where there is somewhere to write. The event is made only then.
    #[inline]
    pub fn record(&self, event: impl FnOnce() -> Event) {
        #[cfg(debug_assertions)]
        if let Some(log) = &self.log {
            log.append(event());
        }
        #[cfg(not(debug_assertions))]
        let _ = event;
    }

    /// Whether events are written down.
    #[inline]
    pub fn is_on(&self) -> bool {
        #[cfg(debug_assertions)]
        let on = self.log.is_some();
        #[cfg(not(debug_assertions))]
        let on = false;
        on
    }

    /// The history of this process, which [`crate::init()`] began where the options say so.
    pub fn process() -> Self {
        #[cfg(debug_assertions)]
        let history = recording::process();
        #[cfg(not(debug_assertions))]
        let history = Self::default();
        history
    }
}

/// Writes an event into the history of this process.
#[inline]
pub fn record(event: impl FnOnce() -> Event) {
    #[cfg(debug_assertions)]
    recording::with_process(|history| history.record(event));
    #[cfg(not(debug_assertions))]
    let _ = event;
}

/// `CLOCK_BOOTTIME` in nanoseconds, as records have it; 0 where the kernel has none.
pub fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
        let nanos = u64::try_from(time.tv_nsec()).unwrap_or_default();
        seconds * 1_000_000_000 + nanos
    })
}

#[cfg(debug_assertions)]
mod recording;

/// What a release build has instead.
#[cfg(not(debug_assertions))]
impl History {
    pub fn to_file(_: &std::path::Path, _: &str) -> std::io::Result<Self> {
        Err(std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            "a release build records no history",
        ))
    }

    pub fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}
