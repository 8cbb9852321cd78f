//! How long a pool waits after creations that failed: pure.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(30);

/// One pool's failures in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// One more failure. `jitter` is between 0 and 1; the pause is half fixed, half by it.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) -> Duration {
        let doubled = FIRST.saturating_mul(1 << self.failures.min(16));
        let pause = doubled
            .min(LONGEST)
            .mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause);
        pause
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// When the next try may be made.
    pub(super) fn until(&self) -> Instant {
        self.until.unwrap_or_else(Instant::now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_are_spread() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.failed(now, 1.0), FIRST);
        assert_eq!(backoff.failed(now, 1.0), FIRST * 2);
        assert_eq!(backoff.failed(now, 0.0), FIRST * 2, "half of four times");
        assert_eq!(backoff.until(), now + FIRST * 2);
        for _ in 0..100 {
            assert!(backoff.failed(now, 1.0) <= LONGEST);
        }
        assert_eq!(backoff.failed(now, 1.0), LONGEST);
        assert_eq!(backoff.failures(), 104);
    }
}
