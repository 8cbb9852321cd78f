//! How many tasks a submitter keeps under way, by the credit of their pool. Pure.

use std::time::Duration;

use broker_schema::Credit;

/// Grows while tasks would hardly wait, shrinks while they would wait for
/// long: enough is under way to keep the pool busy, and hardly more, so that
/// what is submitted last runs soon and others are not crowded out.
#[derive(Debug, Clone, PartialEq)]
pub struct Pacer {
    most: usize,
    allowed: usize,
    target: Duration,
}

/// How long a task may wait before a submitter holds back.
const TARGET: Duration = Duration::from_secs(2);

impl Pacer {
    /// Begins with one task under way, and never allows more than `most`.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            allowed: 1,
            target: TARGET,
        }
    }

    /// The same with another wait to aim at.
    #[must_use]
    pub fn with_target(mut self, target: Duration) -> Self {
        self.target = target;
        self
    }

    /// Whether one more may be submitted while so many are under way.
    pub fn allows(&self, under_way: usize) -> bool {
        under_way < self.allowed
    }

    /// How many may be under way.
    pub fn allowed(&self) -> usize {
        self.allowed
    }

    /// Takes in what the pool has to give while `under_way` of ours are.
    pub fn observe(&mut self, credit: &Credit, under_way: usize) {
        let free = usize::try_from(credit.free).unwrap_or(usize::MAX);
        let waits = credit.expected_wait_ms.map(Duration::from_millis);
        let queued = usize::try_from(credit.queued).unwrap_or(usize::MAX);
        let in_use = under_way.saturating_add(1) >= self.allowed;
        let quarter = self.allowed / 4;
        let allowed = match waits {
            // Half of what is too many, and a quarter of ours at most: others queue too.
            Some(wait) if wait > self.target => {
                let fits = self.target.as_secs_f64() / wait.as_secs_f64();
                let beyond = (queued as f64 * (1.0 - fits) / 2.0) as usize;
                self.allowed - beyond.min(quarter)
            }
            // Nobody can tell yet: a queue as long as the pool is too long.
            None if credit.queued > credit.max => self.allowed - quarter,
            _ if !in_use => self.allowed,
            // Nothing waits: double, and use what is free.
            None | Some(Duration::ZERO) => {
                let idle = free.saturating_sub(queued);
                (self.allowed.saturating_mul(2)).max(under_way.saturating_add(idle))
            }
            Some(wait) if wait < self.target / 2 => self.allowed + quarter.max(1),
            Some(_) => self.allowed,
        };
        self.allowed = allowed.clamp(1, self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::Timestamp;
    use proptest::prelude::*;

    fn credit(free: u64, queued: u64, wait: Option<u64>) -> Credit {
        Credit {
            pool: "p".parse().unwrap(),
            free,
            leased: 0,
            max: 16,
            queued,
            expected_wait_ms: wait,
            at: Timestamp::now(),
        }
    }

    #[test]
    fn what_is_free_is_used_at_once_and_a_queue_is_not_made_longer() {
        let mut pacer = Pacer::new(100);
        assert!(pacer.allows(0) && !pacer.allows(1));
        pacer.observe(&credit(12, 0, Some(0)), 0);
        assert_eq!(pacer.allowed(), 12);
        // In use and hardly waiting: more.
        pacer.observe(&credit(0, 3, Some(200)), 12);
        assert_eq!(pacer.allowed(), 15);
        pacer.observe(&credit(0, 80, Some(9000)), 15);
        assert_eq!(pacer.allowed(), 12);
        // Not in use: no reason for more.
        pacer.observe(&credit(4, 0, Some(0)), 3);
        assert_eq!(pacer.allowed(), 12);
        pacer.observe(&credit(0, 17, None), 12);
        assert_eq!(pacer.allowed(), 9);
        // A little beyond: a little less.
        pacer.observe(&credit(0, 10, Some(3000)), 9);
        assert_eq!(pacer.allowed(), 8);
    }

    proptest! {
        /// One may always go on, and never more than were allowed at all.
        #[test]
        fn it_stays_within_its_bounds(
            most in 0..500_usize,
            told in prop::collection::vec(
                (any::<u64>(), any::<u64>(), prop::option::of(any::<u64>()), 0..600_usize), 0..50),
        ) {
            let mut pacer = Pacer::new(most);
            for (free, queued, wait, under_way) in told {
                pacer.observe(&credit(free, queued, wait), under_way);
                prop_assert!((1..=most.max(1)).contains(&pacer.allowed()));
                prop_assert!(pacer.allows(0));
            }
        }

        /// Against a pool of a fixed speed the queue settles near what the target allows.
        #[test]
        fn it_settles(per_second in 5..200_u64, sandboxes in 1..32_u64) {
            let mut pacer = Pacer::new(100_000);
            let mut lengths = Vec::new();
            for _ in 0..120 {
                let under_way = pacer.allowed() as u64;
                let queued = under_way.saturating_sub(sandboxes);
                let free = sandboxes.saturating_sub(under_way);
                let wait = if free > 0 { 0 } else { queued * 1000 / per_second };
                pacer.observe(&credit(free, queued, Some(wait)), under_way as usize);
                lengths.push(wait);
            }
            let late = &lengths[100..];
            prop_assert!(late.iter().all(|wait| *wait < 3200), "{late:?}");
            prop_assert!(late.iter().any(|wait| *wait > 300), "the pool idles: {late:?}");
        }
    }
}
