//! I6: no effect is accepted under a superseded epoch. A superseded attempt's terminal may win,
//! but only by being first.

use std::collections::{BTreeMap, BTreeSet};

use remuda_telemetry::history::Event;

use super::{Invariant, Violation};
use crate::history::{Ends, History};

pub(super) fn check(history: &History, ends: &Ends) -> Vec<Violation> {
    let mut found = Vec::new();
    // By tenant, task and attempt.
    let mut given: BTreeMap<(&str, &str, u32), BTreeSet<u64>> = BTreeMap::new();
    for line in history.iter() {
        match &line.event {
            Event::Entered {
                sandbox,
                epoch,
                highest,
                accepted: true,
                ..
            } if epoch < highest => {
                let about = format!("sandbox {sandbox}");
                let what = format!("accepted epoch {epoch}, it had seen epoch {highest}");
                found.push(Violation::new(Invariant::I6, about, what).shown_by([line]));
            }
            Event::Claimed {
                tenant,
                task,
                attempt,
                epoch,
                ..
            } => {
                given
                    .entry((tenant, task, *attempt))
                    .or_default()
                    .insert(*epoch);
            }
            _ => {}
        }
    }
    for stored in &ends.terminals {
        let terminal = &stored.terminal;
        let Some(sandbox) = &terminal.sandbox else {
            continue;
        };
        let about = || format!("task {}", stored.task);
        let epoch = sandbox.epoch.0;
        let key = (
            stored.tenant.as_str(),
            stored.task.as_str(),
            terminal.attempt,
        );
        // A session's task was given nothing: it runs under the session's epoch.
        if let Some(given) = given.get(&key)
            && !given.contains(&epoch)
        {
            let what = format!(
                "its terminal is of attempt {} under epoch {epoch}, which that was never given",
                terminal.attempt
            );
            found.push(Violation::new(Invariant::I6, about(), what));
        }
        let strange = ends.frames.iter().find(|frame| {
            (
                frame.tenant.as_str(),
                frame.task.as_str(),
                frame.frame.attempt,
            ) == key
                && frame.frame.epoch.0 != epoch
                // A flushed Redis counts attempts anew: readers tell the two apart.
                && !given
                    .get(&key)
                    .is_some_and(|given| given.contains(&frame.frame.epoch.0))
                && frame.frame.n < terminal.frames
        });
        if let Some(frame) = strange {
            let what = format!(
                "its frame {} is of epoch {}, its terminal of epoch {epoch}",
                frame.frame.n, frame.frame.epoch.0
            );
            found.push(Violation::new(Invariant::I6, about(), what));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use broker_schema::Epoch;

    use super::*;
    use crate::check::sample::{EPOCH, Sample, entered};

    #[test]
    fn a_sidecar_lets_a_superseded_holder_in() {
        let mut sample = Sample::clean();
        sample.add("s/1", entered(EPOCH - 1, EPOCH, true));
        let broken = sample.broken(Invariant::I6);
        assert_eq!(broken.len(), 1);
        assert!(broken[0].contains("it had seen"), "{broken:?}");
        let mut sample = Sample::clean();
        sample.add("s/1", entered(EPOCH - 1, EPOCH, false));
        assert!(sample.broken(Invariant::I6).is_empty());
    }

    #[test]
    fn a_terminal_under_an_epoch_that_its_attempt_never_had() {
        let mut sample = Sample::clean();
        let sandbox = sample.ends.terminals[0].terminal.sandbox.as_mut().unwrap();
        sandbox.epoch = Epoch(EPOCH + 7);
        for frame in &mut sample.ends.frames {
            frame.frame.epoch = Epoch(EPOCH + 7);
        }
        let broken = sample.broken(Invariant::I6);
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].contains("never given"), "{broken:?}");
    }

    #[test]
    fn a_frame_of_another_epoch() {
        let mut sample = Sample::clean();
        sample.ends.frames[1].frame.epoch = Epoch(EPOCH - 1);
        let broken = sample.broken(Invariant::I6);
        assert!(
            broken[0].starts_with("its frame 1 is of epoch"),
            "{broken:?}"
        );
    }
}
