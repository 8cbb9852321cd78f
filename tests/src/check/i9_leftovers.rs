//! I9: after everything ends, cgroups, mounts, namespaces, processes and descriptors are back
//! where they were.

use std::collections::{BTreeMap, BTreeSet};

use remuda_telemetry::history::Event;

use super::{Invariant, Violation};
use crate::history::{Ends, History, Line};

pub(super) fn check(history: &History, ends: &Ends) -> Vec<Violation> {
    let left = ends
        .leftovers
        .iter()
        .map(|what| Violation::new(Invariant::I9, "the host", what));
    let mut found: Vec<Violation> = left.collect();
    let mut held: BTreeMap<(&str, &str), &Line> = BTreeMap::new();
    let mut gone: BTreeSet<&str> = BTreeSet::new();
    for line in history.iter() {
        match &line.event {
            Event::Created { sandbox, .. } => {
                held.insert((&line.who, sandbox), line);
            }
            Event::Destroyed { sandbox, clean } => {
                held.remove(&(line.who.as_str(), sandbox.as_str()));
                if !clean {
                    let about = format!("sandbox {sandbox}");
                    let what = "something of it is left over";
                    found.push(Violation::new(Invariant::I9, about, what).shown_by([line]));
                }
            }
            Event::Left => {
                gone.insert(&line.who);
            }
            _ => {}
        }
    }
    // One that was killed could not say what became of its sandboxes: the host tells.
    for ((who, sandbox), line) in held {
        if gone.contains(who) {
            let what = format!("{who} has left and did not destroy it");
            let about = format!("sandbox {sandbox}");
            found.push(Violation::new(Invariant::I9, about, what).shown_by([line]));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{OTHER_SANDBOX, SANDBOX, Sample, created};

    #[test]
    fn what_the_host_still_has() {
        let mut sample = Sample::clean();
        sample.ends.leftovers = vec!["cgroup /sys/fs/cgroup/remuda/x".into()];
        let broken = sample.broken(Invariant::I9);
        assert_eq!(broken, ["cgroup /sys/fs/cgroup/remuda/x"]);
    }

    #[test]
    fn a_sandbox_that_was_not_destroyed() {
        let mut sample = Sample::clean();
        sample.insert(
            |event| matches!(event, Event::Submitted { .. }),
            created(OTHER_SANDBOX),
        );
        // Another process's, which was killed.
        assert!(sample.broken(Invariant::I9).is_empty());
        sample.add("x/1", Event::Left);
        let broken = sample.broken(Invariant::I9);
        assert_eq!(broken, ["x/1 has left and did not destroy it"]);
    }

    #[test]
    fn a_sandbox_of_which_something_is_left() {
        let mut sample = Sample::clean();
        sample.change(|event| match event {
            Event::Destroyed { clean, .. } => {
                *clean = false;
                true
            }
            _ => false,
        });
        assert_eq!(
            sample.broken(Invariant::I9),
            ["something of it is left over"]
        );
        assert!(sample.check()[0].about.contains(SANDBOX));
    }
}
