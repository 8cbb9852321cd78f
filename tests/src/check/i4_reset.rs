//! I4: no sandbox is offered again without a verified reset: fresh layer, empty cgroup, no
//! process.

use std::collections::BTreeMap;

use remuda_telemetry::history::{Call, Event};

use super::{Invariant, Violation};
use crate::history::{History, Line};

/// What a sandbox is, as far as the lines up to now tell.
#[derive(Clone, Copy)]
enum State<'a> {
    /// Shown to be as new.
    Fresh,
    /// Somebody had it.
    Used(&'a Line),
    /// Made or reset, and something was still in it.
    Dirty(&'a Line),
}

pub(super) fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut sandboxes: BTreeMap<&str, State<'_>> = BTreeMap::new();
    for line in history.iter() {
        match &line.event {
            Event::Created {
                sandbox,
                processes,
                max_epoch,
            } => {
                let fresh = *processes == 0 && *max_epoch == 0;
                let state = if fresh {
                    State::Fresh
                } else {
                    State::Dirty(line)
                };
                sandboxes.insert(sandbox, state);
            }
            Event::Reset {
                sandbox, processes, ..
            } => {
                let clean = *processes == 0;
                let state = if clean {
                    State::Fresh
                } else {
                    State::Dirty(line)
                };
                sandboxes.insert(sandbox, state);
            }
            Event::Adopted { sandbox, .. } => {
                if let Some(violation) = unfit(sandbox, sandboxes.get(sandbox.as_str()), line) {
                    found.push(violation);
                }
                sandboxes.insert(sandbox, State::Used(line));
            }
            Event::Entered {
                sandbox,
                accepted: true,
                call,
                ..
            } if *call != Call::Reset
                // The first use is what a violation should show.
                && !matches!(sandboxes.get(sandbox.as_str()), Some(State::Used(_))) =>
            {
                sandboxes.insert(sandbox, State::Used(line));
            }
            Event::Offered { sandbox } => {
                found.extend(unfit(sandbox, sandboxes.get(sandbox.as_str()), line));
            }
            _ => {}
        }
    }
    found
}

/// What is wrong with handing this sandbox out.
fn unfit(sandbox: &str, state: Option<&State<'_>>, line: &Line) -> Option<Violation> {
    let done = match &line.event {
        Event::Offered { .. } => "offered",
        _ => "handed out",
    };
    let (what, before) = match state {
        Some(State::Fresh) => return None,
        Some(State::Used(before)) => ("after it was used, without a reset", Some(*before)),
        Some(State::Dirty(before)) => ("although something was still in it", Some(*before)),
        None => ("without anything that shows that it is clean", None),
    };
    let about = format!("sandbox {sandbox}");
    let lines = before.into_iter().chain([line]);
    Some(Violation::new(Invariant::I4, about, format!("was {done} {what}")).shown_by(lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{EPOCH, SANDBOX, Sample, adopted, offered};

    fn reset(processes: u32) -> Event {
        Event::Reset {
            sandbox: SANDBOX.into(),
            processes,
            evidence: "new layer".into(),
        }
    }

    #[test]
    fn a_used_sandbox_is_offered_again() {
        let mut sample = Sample::clean();
        sample.add("w/1", offered(SANDBOX));
        let broken = sample.broken(Invariant::I4);
        assert_eq!(broken, ["was offered after it was used, without a reset"]);
    }

    #[test]
    fn a_used_sandbox_is_handed_out_again_without_an_offer() {
        let mut sample = Sample::clean();
        sample.add("w/1", adopted("t", EPOCH + 1));
        let broken = sample.broken(Invariant::I4);
        assert_eq!(
            broken,
            ["was handed out after it was used, without a reset"]
        );
    }

    #[test]
    fn a_reset_makes_it_as_new_where_it_left_nothing() {
        let mut sample = Sample::clean();
        sample.add("w/1", reset(0)).add("w/1", offered(SANDBOX));
        assert!(sample.broken(Invariant::I4).is_empty());
        let mut sample = Sample::clean();
        sample.add("w/1", reset(3)).add("w/1", offered(SANDBOX));
        let broken = sample.broken(Invariant::I4);
        assert_eq!(broken, ["was offered although something was still in it"]);
    }

    #[test]
    fn an_offer_repeated_while_idle_is_none_again() {
        let mut sample = Sample::clean();
        sample.insert(
            |event| matches!(event, Event::Claimed { .. }),
            offered(SANDBOX),
        );
        assert!(sample.broken(Invariant::I4).is_empty());
    }

    #[test]
    fn a_sandbox_that_nobody_saw_made() {
        let mut sample = Sample::clean();
        sample.without(|event| matches!(event, Event::Created { .. }));
        let broken = sample.broken(Invariant::I4);
        assert!(broken[0].contains("without anything"), "{broken:?}");
        let mut sample = Sample::clean();
        sample.change(|event| match event {
            Event::Created { processes, .. } => {
                *processes = 2;
                true
            }
            _ => false,
        });
        assert_eq!(sample.broken(Invariant::I4).len(), 2);
    }
}
