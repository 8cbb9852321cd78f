//! I1: every accepted task reaches exactly one terminal, within a bound after faults end.

use std::collections::BTreeMap;
use std::time::Duration;

use remuda_telemetry::history::{Event, Gate};

use super::{Invariant, Promises, Violation};
use crate::history::{Ends, History, Line};

type Key<'a> = (&'a str, &'a str);

/// What is known of one accepted task.
#[derive(Default)]
struct Known<'a> {
    accepted: Option<&'a Line>,
    /// The first sign of a terminal.
    ended: Option<&'a Line>,
    /// Where it was read, last.
    read: Option<&'a Line>,
}

pub(super) fn check(history: &History, ends: &Ends, promises: &Promises) -> Vec<Violation> {
    let mut stored: BTreeMap<Key<'_>, usize> = BTreeMap::new();
    for terminal in &ends.terminals {
        let key = (terminal.tenant.as_str(), terminal.task.as_str());
        *stored.entry(key).or_default() += 1;
    }
    let mut found = Vec::new();
    for ((_, task), count) in stored.iter().filter(|(_, count)| **count > 1) {
        let what = format!("has {count} terminals");
        let puts = history.iter().filter(
            |line| matches!(&line.event, Event::TerminalPut { task: put, .. } if put == task),
        );
        found.push(violation(task, what).shown_by(puts));
    }
    for ((tenant, task), known) in known(history) {
        let Some(accepted) = known.accepted else {
            continue;
        };
        if !stored.contains_key(&(tenant, task)) {
            // It had its terminal, and then the storage was lost.
            let lost_later = known
                .read
                .is_some_and(|line| promises.stretch(line.at) < promises.stretch(ends.at));
            if !lost_later {
                let lines = [Some(accepted), known.ended].into_iter().flatten();
                found.push(violation(task, "was accepted and has no terminal").shown_by(lines));
            }
            continue;
        }
        let due = accepted.at.max(promises.faults_ended)
            + u64::try_from(promises.within.as_nanos()).unwrap_or(u64::MAX);
        match known.ended {
            Some(ended) if ended.at > due => {
                let late = Duration::from_nanos(ended.at - due);
                let what = format!("had its terminal {late:.1?} too late");
                found.push(violation(task, what).shown_by([accepted, ended]));
            }
            _ => {}
        }
    }
    found
}

fn violation(task: &str, what: impl Into<String>) -> Violation {
    Violation::new(Invariant::I1, format!("task {task}"), what)
}

fn known(history: &History) -> BTreeMap<Key<'_>, Known<'_>> {
    let mut tasks: BTreeMap<Key<'_>, Known<'_>> = BTreeMap::new();
    for line in history.iter() {
        match &line.event {
            Event::Accepted { tenant, task, .. } => {
                let known = tasks.entry((tenant, task)).or_default();
                known.accepted.get_or_insert(line);
            }
            Event::TerminalPut {
                tenant,
                task,
                gate: Gate::Won,
                ..
            } => {
                let known = tasks.entry((tenant, task)).or_default();
                known.ended.get_or_insert(line);
            }
            Event::TerminalRead { tenant, task, .. } => {
                let known = tasks.entry((tenant, task)).or_default();
                known.ended.get_or_insert(line);
                known.read = Some(line);
            }
            _ => {}
        }
    }
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::Sample;

    #[test]
    fn no_terminal() {
        let mut sample = Sample::clean();
        sample.ends.terminals.clear();
        let broken = sample.broken(Invariant::I1);
        assert_eq!(broken, ["was accepted and has no terminal"]);
        // Nobody was promised anything for what was never accepted.
        sample.without(|event| matches!(event, Event::Accepted { .. }));
        assert!(sample.broken(Invariant::I1).is_empty());
    }

    #[test]
    fn a_terminal_that_was_read_before_the_storage_was_lost() {
        let mut sample = Sample::clean();
        sample.ends.terminals.clear();
        sample.promises.storage_lost = vec![50_000_000_000];
        assert!(sample.broken(Invariant::I1).is_empty());
        sample.promises.storage_lost = vec![1];
        assert_eq!(sample.broken(Invariant::I1).len(), 1);
    }

    #[test]
    fn two_terminals() {
        let mut sample = Sample::clean();
        let second = sample.ends.terminals[0].clone();
        sample.ends.terminals.push(second);
        assert_eq!(sample.broken(Invariant::I1), ["has 2 terminals"]);
        let shown = &sample.check()[0];
        assert!(shown.events[0].contains("terminal_put"), "{shown}");
    }

    #[test]
    fn a_terminal_that_comes_too_late() {
        let mut sample = Sample::clean();
        // Eight seconds from the acceptance to the terminal.
        sample.promises.within = Duration::from_secs(7);
        assert_eq!(
            sample.broken(Invariant::I1),
            ["had its terminal 1.0s too late"]
        );
        sample.promises.faults_ended = 5_000_000_000;
        assert!(sample.broken(Invariant::I1).is_empty());
    }
}
