//! I8: a tenant never reads or touches another's subjects, files, processes.

use std::collections::{BTreeMap, BTreeSet};

use remuda_telemetry::history::Event;

use super::{Invariant, Violation};
use crate::history::{Ends, History, Line};

pub(super) fn check(history: &History, ends: &Ends) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut owners: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in history.iter() {
        if let Event::Submitted { tenant, task, .. } = &line.event {
            owners.entry(task).or_default().insert(tenant);
        }
    }
    let stranger = |tenant: &str, task: &str| {
        owners
            .get(task)
            .is_some_and(|owners| !owners.contains(tenant))
    };
    for line in history.iter() {
        let (tenant, task, did) = match &line.event {
            Event::TerminalRead { tenant, task, .. } => (tenant, task, "read the terminal"),
            Event::OutputRead { tenant, task, .. } => (tenant, task, "read the output"),
            Event::Claimed { tenant, task, .. } => (tenant, task, "was given a sandbox for it"),
            Event::TerminalPut { tenant, task, .. } => (tenant, task, "was told its end"),
            _ => continue,
        };
        if stranger(tenant, task) {
            let what = format!("tenant {tenant}, who did not submit it, {did}");
            found
                .push(Violation::new(Invariant::I8, format!("task {task}"), what).shown_by([line]));
        }
    }
    found.extend(sandboxes(history));
    let stored = ends
        .terminals
        .iter()
        .map(|stored| ("terminal", &stored.tenant, &stored.task))
        .chain(
            ends.frames
                .iter()
                .map(|stored| ("output", &stored.tenant, &stored.task)),
        );
    let strange: BTreeSet<_> = stored
        .filter(|(_, tenant, task)| stranger(tenant, task))
        .collect();
    for (kind, tenant, task) in strange {
        let what = format!("its {kind} is stored for tenant {tenant}, who did not submit it");
        found.push(Violation::new(Invariant::I8, format!("task {task}"), what));
    }
    for stored in &ends.terminals {
        let said = stored.terminal.tenant.as_str();
        if said != stored.tenant {
            let what = format!(
                "its terminal names tenant {said} and is stored for tenant {}",
                stored.tenant
            );
            let about = format!("task {}", stored.task);
            found.push(Violation::new(Invariant::I8, about, what));
        }
    }
    found
}

/// No sandbox is two tenants', unless everything of the first was taken away in between.
fn sandboxes(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut tenants: BTreeMap<&str, (&str, &Line)> = BTreeMap::new();
    for line in history.iter() {
        match &line.event {
            Event::Reset { sandbox, .. } => {
                tenants.remove(sandbox.as_str());
            }
            Event::Adopted {
                sandbox, tenant, ..
            }
            | Event::Operation {
                sandbox, tenant, ..
            } => {
                let (first, before) = *tenants.entry(sandbox).or_insert((tenant, line));
                if first != tenant {
                    let about = format!("sandbox {sandbox}");
                    let what = format!("was tenant {first}'s and is tenant {tenant}'s");
                    found.push(Violation::new(Invariant::I8, about, what).shown_by([before, line]));
                }
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{EPOCH, SANDBOX, Sample, adopted, read};

    #[test]
    fn another_tenant_reads_a_terminal() {
        let mut sample = Sample::clean();
        sample.add("c/2", read("u", "d"));
        let broken = sample.broken(Invariant::I8);
        assert_eq!(
            broken,
            ["tenant u, who did not submit it, read the terminal"]
        );
    }

    #[test]
    fn another_tenant_s_subject_holds_it() {
        let mut sample = Sample::clean();
        sample.ends.frames[0].tenant = "u".into();
        let broken = sample.broken(Invariant::I8);
        assert!(broken[0].starts_with("its output is stored"), "{broken:?}");
        let mut sample = Sample::clean();
        sample.ends.terminals[0].tenant = "u".into();
        assert_eq!(sample.broken(Invariant::I8).len(), 2);
    }

    #[test]
    fn a_sandbox_goes_from_one_tenant_to_another() {
        let mut sample = Sample::clean();
        sample.add("w/1", adopted("u", EPOCH + 1));
        let broken = sample.broken(Invariant::I8);
        assert_eq!(broken, ["was tenant t's and is tenant u's"]);
        let mut sample = Sample::clean();
        sample.add(
            "w/1",
            Event::Reset {
                sandbox: SANDBOX.into(),
                processes: 0,
                evidence: String::new(),
            },
        );
        sample.add("w/1", adopted("u", EPOCH + 1));
        assert!(sample.broken(Invariant::I8).is_empty());
    }
}
