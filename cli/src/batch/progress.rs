//! How far a batch is, on standard error: a bar for a person, a line every few
//! seconds for a log.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::out;

/// How often a log is told.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Where all tasks are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) done: u64,
    /// Not ended, as far as this command knows.
    pub(crate) submitted: u64,
    /// Of the submitted, how many hold a sandbox; none where nobody says.
    pub(crate) running: Option<u64>,
    /// All there are, where that is known.
    pub(crate) total: Option<u64>,
}

impl Counts {
    /// `12/100 done, 4 running, 84 queued, 31.0/s, 3 seconds left`.
    fn line(&self, elapsed: Duration) -> String {
        let rate = self.done as f64 / elapsed.as_secs_f64().max(1e-3);
        let done = match self.total {
            Some(total) => format!("{}/{total} done", self.done),
            None => format!("{} done", self.done),
        };
        let left = match self.total {
            Some(total) => total.saturating_sub(self.done),
            None => self.submitted,
        };
        let rest = match self.running {
            Some(running) => {
                let running = running.min(left);
                format!("{running} running, {} queued", left - running)
            }
            None => format!("{left} running or queued"),
        };
        let mut text = format!("{done}, {rest}, {rate:.1}/s");
        if self.total.is_some() && self.done > 0 && left > 0 {
            let seconds = (left as f64 / rate).min(1e9);
            let left = HumanDuration(Duration::from_secs_f64(seconds));
            // Written to a String: cannot fail.
            let _ = write!(text, ", {left} left");
        }
        text
    }
}

#[derive(Debug)]
pub(crate) struct Progress {
    /// None where standard error is no terminal.
    bar: Option<ProgressBar>,
    began: Instant,
    told: Instant,
}

impl Progress {
    pub(crate) fn start(total: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            bar: std::io::stderr().is_terminal().then(|| bar(total)),
            began: now,
            told: now,
        }
    }

    pub(crate) fn show(&mut self, counts: &Counts) {
        let now = Instant::now();
        let line = || counts.line(now - self.began);
        match &self.bar {
            Some(bar) => {
                bar.set_position(counts.done);
                bar.set_message(line());
            }
            None if now - self.told >= LOG_INTERVAL => {
                out::note(line());
                self.told = now;
            }
            None => {}
        }
    }

    /// Says something without breaking the bar.
    pub(crate) fn say(&self, text: impl std::fmt::Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| out::note(text)),
            None => out::note(text),
        }
    }

    /// Writes to standard output while the bar is out of the way.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) if std::io::stdout().is_terminal() => bar.suspend(write),
            _ => write(),
        }
    }

    /// The bar goes; how long it took.
    pub(crate) fn finish(self) -> Duration {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.began.elapsed()
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    let shape = if total.is_some() {
        "{bar:24} {msg}"
    } else {
        "{spinner} {msg}"
    };
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(
        ProgressStyle::with_template(shape).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_done_running_queued_rate_and_time_left() {
        let counts = Counts {
            done: 20,
            submitted: 30,
            running: Some(8),
            total: Some(100),
        };
        assert_eq!(
            counts.line(Duration::from_secs(2)),
            "20/100 done, 8 running, 72 queued, 10.0/s, 8 seconds left"
        );
        let unknown = Counts {
            running: None,
            total: None,
            ..counts
        };
        assert_eq!(
            unknown.line(Duration::from_secs(2)),
            "20 done, 30 running or queued, 10.0/s"
        );
    }
}
