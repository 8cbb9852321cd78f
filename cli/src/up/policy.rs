//! What to do when a part dies: pure, so that it can be tested as a table.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// As many deaths within [`WINDOW`] end the fleet.
const MOST_DEATHS: usize = 3;
const WINDOW: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// What to do about a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    RestartAfter(Duration),
    GiveUp,
}

/// The deaths of one part that are not yet forgotten.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    recent: VecDeque<Instant>,
}

impl Deaths {
    pub(super) fn record(&mut self, now: Instant) -> Decision {
        while self
            .recent
            .front()
            .is_some_and(|death| now.duration_since(*death) >= WINDOW)
        {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        if self.recent.len() >= MOST_DEATHS {
            return Decision::GiveUp;
        }
        let doublings = self.recent.len().saturating_sub(1) as u32;
        Decision::RestartAfter(FIRST_WAIT * 4_u32.pow(doublings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_deaths_in_a_minute_are_too_many() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let restart = |millis| Decision::RestartAfter(Duration::from_millis(millis));
        let cases: [(&[u64], Decision); 5] = [
            (&[0], restart(200)),
            (&[0, 10], restart(800)),
            (&[0, 10, 59], Decision::GiveUp),
            (&[0, 10, 61], restart(800)),
            (&[0, 100, 200, 300], restart(200)),
        ];
        for (deaths, expected) in cases {
            let mut record = Deaths::default();
            let last = deaths
                .iter()
                .map(|second| record.record(at(*second)))
                .last();
            assert_eq!(last, Some(expected), "{deaths:?}");
        }
    }
}
