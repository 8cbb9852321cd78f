//! What a batch's results add up to.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use broker_schema::Terminal;

use super::record::Micros;
use crate::quantile::{Latencies, human};
use crate::table::{Align, Table};

#[derive(Debug, Default)]
pub(crate) struct Summary {
    outcomes: BTreeMap<&'static str, u64>,
    queued: Latencies,
    sandbox: Latencies,
    run: Latencies,
    total: Latencies,
    done: u64,
    without_terminal: u64,
    took: Duration,
}

impl Summary {
    pub(crate) fn add(&mut self, terminal: &Terminal) {
        *self.outcomes.entry(terminal.outcome.as_str()).or_insert(0) += 1;
        self.done += 1;
        let micros = Micros::of(&terminal.times);
        for (latencies, value) in [
            (&mut self.queued, micros.queued),
            (&mut self.sandbox, micros.sandbox),
            (&mut self.run, micros.run),
            (&mut self.total, Some(micros.total)),
        ] {
            if let Some(value) = value {
                latencies.add(value);
            }
        }
    }

    /// A task whose end is not known.
    pub(crate) fn add_unknown(&mut self) {
        self.without_terminal += 1;
    }

    pub(crate) fn finish(&mut self, took: Duration) {
        self.took = took;
    }

    pub(crate) fn complete(&self) -> bool {
        self.without_terminal == 0
    }

    fn rate(&self) -> f64 {
        self.done as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut outcomes = Table::new([("OUTCOME", Align::Left), ("TASKS", Align::Right)]);
        for (outcome, count) in &self.outcomes {
            outcomes.row([(*outcome).to_owned(), count.to_string()]);
        }
        if self.without_terminal > 0 {
            outcomes.row(["(unknown)".to_owned(), self.without_terminal.to_string()]);
        }
        let mut latencies = Table::new([
            ("LATENCY", Align::Left),
            ("P50", Align::Right),
            ("P90", Align::Right),
            ("P99", Align::Right),
        ]);
        for (name, measured) in [
            ("queued", &self.queued),
            ("sandbox", &self.sandbox),
            ("run", &self.run),
            ("total", &self.total),
        ] {
            if let Some(found) = measured.quantiles() {
                latencies.row([
                    name.to_owned(),
                    human(found.p50),
                    human(found.p90),
                    human(found.p99),
                ]);
            }
        }
        writeln!(f, "{outcomes}\n")?;
        if !latencies.is_empty() {
            writeln!(f, "{latencies}\n")?;
        }
        write!(
            f,
            "{} tasks in {:.1} s, {:.1} tasks/s",
            self.done,
            self.took.as_secs_f64(),
            self.rate()
        )
    }
}
