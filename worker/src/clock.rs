//! The clock that leases are measured with: it goes on while the machine sleeps.
//!
//! `std`'s and the runtime's stand still then, and a worker that wakes up would count on leases
//! that ran out hours ago.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A moment since the machine was started, its sleep included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub(crate) fn now() -> Self {
        // A clock that cannot be read is past every deadline: nothing is counted on.
        let read = clock_gettime(ClockId::CLOCK_BOOTTIME);
        Self(read.map_or(Duration::MAX, Duration::from))
    }

    pub(crate) fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// How long until then; nothing where it has passed.
    pub(crate) fn until(self, later: Self) -> Duration {
        later.0.saturating_sub(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_only_goes_on_and_counts_what_the_machine_slept() {
        let first = BootTime::now();
        let second = BootTime::now();
        assert!(second >= first);
        // Never behind the clock that stands still in sleep.
        let standing: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into();
        assert!(BootTime::now().0 >= standing);
        let later = first.plus(Duration::from_secs(5));
        assert_eq!(first.until(later), Duration::from_secs(5));
        assert_eq!(later.until(first), Duration::ZERO);
    }
}
