//! Wall-clock time as it travels.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Microseconds since 1970-01-01 UTC. For people and for differences between
/// events of one machine; never for deciding who holds a lease.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

/// What this process adds to its machine's clock, in microseconds.
static CORRECTION: AtomicI64 = AtomicI64::new(0);

impl Timestamp {
    /// Now, by the clock that this process goes by: its machine's, or one that
    /// it was [`correct`](Self::correct)ed to.
    pub fn now() -> Self {
        let correction = CORRECTION.load(Ordering::Relaxed);
        Self(Self::of_this_machine().0.saturating_add_signed(correction))
    }

    /// Now, by the machine's clock, whatever it says.
    pub fn of_this_machine() -> Self {
        SystemTime::now().into()
    }

    /// Makes [`now`](Self::now) go by a clock that is this far ahead of the
    /// machine's. Daemons whose machine has the wrong time go by the fleet's.
    pub fn correct(ahead_us: i64) {
        CORRECTION.store(ahead_us, Ordering::Relaxed);
    }

    /// Zero where `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(micros))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let micros = time
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros();
        Self(u64::try_from(micros).unwrap_or(u64::MAX))
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        UNIX_EPOCH + Duration::from_micros(time.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_a_day_off_is_corrected() {
        const DAY: i64 = 24 * 3600 * 1_000_000;
        Timestamp::correct(-DAY);
        let (machine, now) = (Timestamp::of_this_machine(), Timestamp::now());
        Timestamp::correct(0);
        let behind = machine.since(now);
        assert!(behind > Duration::from_secs(23 * 3600), "{behind:?}");
        // As far as it goes, and no further.
        assert_eq!(Timestamp(5).plus(Duration::MAX), Timestamp(u64::MAX));
    }
}
