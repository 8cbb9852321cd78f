//! How long a session lasts.

use std::time::Duration;

use broker_schema::SessionOptions;
use tokio::time::Instant;

/// An open session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session {
    pub(super) options: SessionOptions,
    /// It closes when there was no task until then.
    pub(super) idle_at: Instant,
    pub(super) ends: Instant,
    /// It would idle for longer if its worker did not leave.
    pub(super) hurried: bool,
}

impl Session {
    pub(super) fn open(options: SessionOptions) -> Self {
        Self {
            options,
            idle_at: after(options.idle_timeout_ms),
            ends: after(options.max_life_ms),
            hurried: false,
        }
    }

    /// A task has ended: from now on it idles.
    pub(super) fn used(&mut self) {
        self.idle_at = after(self.options.idle_timeout_ms);
        self.hurried = false;
    }

    /// Its worker leaves: it goes on for as long as it is in use.
    pub(super) fn hurry(&mut self, grace: Duration) {
        let sooner = Instant::now() + grace;
        if sooner < self.idle_at {
            self.idle_at = sooner;
            self.hurried = true;
        }
    }
}

fn after(millis: u64) -> Instant {
    Instant::now()
        .checked_add(Duration::from_millis(millis))
        .unwrap_or_else(far_future)
}

pub(super) fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}
