//! I2: a terminal never changes.

use std::collections::BTreeMap;

use remuda_telemetry::history::{Event, Gate};

use super::{Invariant, Promises, Violation};
use crate::history::{Ends, History, Line};

/// A terminal that somebody saw, and where.
struct Seen<'a> {
    digest: &'a str,
    line: Option<&'a Line>,
}

pub(super) fn check(history: &History, ends: &Ends, promises: &Promises) -> Vec<Violation> {
    // By tenant, task, and stretch between losses of the storage.
    let mut tasks: BTreeMap<(&str, &str, usize), Vec<Seen<'_>>> = BTreeMap::new();
    for line in history.iter() {
        let (Event::TerminalPut {
            tenant,
            task,
            digest,
            gate: Gate::Won,
            ..
        }
        | Event::TerminalRead {
            tenant,
            task,
            digest,
            ..
        }) = &line.event
        else {
            continue;
        };
        let seen = tasks
            .entry((tenant, task, promises.stretch(line.at)))
            .or_default();
        seen.push(Seen {
            digest,
            line: Some(line),
        });
    }
    for terminal in &ends.terminals {
        let key = (
            terminal.tenant.as_str(),
            terminal.task.as_str(),
            promises.stretch(ends.at),
        );
        let digest = &terminal.digest;
        tasks
            .entry(key)
            .or_default()
            .push(Seen { digest, line: None });
    }
    let changed = tasks.into_iter().filter_map(|((_, task, _), seen)| {
        let first = seen.first()?;
        let other = seen.iter().find(|other| other.digest != first.digest)?;
        let what = match other.line {
            Some(_) => "its terminal changed",
            None => "TERM holds another terminal than was seen before",
        };
        let lines = [first.line, other.line].into_iter().flatten();
        Some(Violation::new(Invariant::I2, format!("task {task}"), what).shown_by(lines))
    });
    changed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{Sample, put, read};

    #[test]
    fn another_terminal_is_read_later() {
        let mut sample = Sample::clean();
        sample.add("c/1", read("t", "another"));
        assert_eq!(sample.broken(Invariant::I2), ["its terminal changed"]);
        // Not of this task's tenant: that is I8's.
        let mut sample = Sample::clean();
        sample.add("c/1", read("u", "another"));
        assert!(sample.broken(Invariant::I2).is_empty());
    }

    #[test]
    fn two_writers_win() {
        let mut sample = Sample::clean();
        sample.add("d/1", put("cancelled", Gate::Won));
        assert_eq!(sample.broken(Invariant::I2), ["its terminal changed"]);
        let mut sample = Sample::clean();
        sample.add("d/1", put("cancelled", Gate::Lost));
        sample.add("d/1", put("cancelled", Gate::Unknown));
        sample.add("w/1", put("d", Gate::Won));
        assert!(sample.broken(Invariant::I2).is_empty());
    }

    #[test]
    fn the_stream_holds_another_one() {
        let mut sample = Sample::clean();
        sample.ends.terminals[0].digest = "another".into();
        let broken = sample.broken(Invariant::I2);
        assert_eq!(broken, ["TERM holds another terminal than was seen before"]);
        sample.promises.storage_lost = vec![50_000_000_000];
        assert!(sample.broken(Invariant::I2).is_empty());
    }
}
