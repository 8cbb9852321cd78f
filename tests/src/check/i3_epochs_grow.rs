//! I3: a sandbox's accepted operations have non-decreasing epochs, each of which was given to one
//! worker for one sandbox.

use std::collections::BTreeMap;

use remuda_telemetry::history::Event;

use super::{Invariant, Violation};
use crate::history::{History, Line};

/// Whom an epoch was given to, and where it says so.
#[derive(Clone, Copy)]
struct Holder<'a> {
    worker: &'a str,
    sandbox: &'a str,
    line: &'a Line,
}

pub(super) fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut holders: BTreeMap<u64, Holder<'_>> = BTreeMap::new();
    for line in history.iter() {
        let (worker, sandbox, epoch) = match &line.event {
            Event::Claimed {
                worker,
                sandbox,
                epoch,
                ..
            }
            | Event::Adopted {
                worker,
                sandbox,
                epoch,
                ..
            }
            | Event::Operation {
                worker,
                sandbox,
                epoch,
                ..
            } => (worker, sandbox, *epoch),
            _ => continue,
        };
        let holder = Holder {
            worker,
            sandbox,
            line,
        };
        let first = *holders.entry(epoch).or_insert(holder);
        if (first.worker, first.sandbox) != (worker, sandbox) {
            let about = format!("epoch {epoch}");
            let what = format!(
                "belongs to worker {} and sandbox {}, and to worker {worker} and sandbox {sandbox}",
                first.worker, first.sandbox
            );
            let lines = [first.line, line];
            found.push(Violation::new(Invariant::I3, about, what).shown_by(lines));
        }
    }
    let mut last: BTreeMap<&str, (u64, &Line)> = BTreeMap::new();
    for line in history.iter() {
        let Event::Entered {
            sandbox,
            epoch,
            accepted: true,
            ..
        } = &line.event
        else {
            continue;
        };
        let about = || format!("sandbox {sandbox}");
        if holders
            .get(epoch)
            .is_none_or(|holder| holder.sandbox != sandbox)
        {
            let what = format!("accepted epoch {epoch}, which nobody was given for it");
            found.push(Violation::new(Invariant::I3, about(), what).shown_by([line]));
        }
        let (highest, before) = *last.entry(sandbox).or_insert((*epoch, line));
        if *epoch < highest {
            let what = format!("accepted epoch {epoch} after epoch {highest}");
            found.push(Violation::new(Invariant::I3, about(), what).shown_by([before, line]));
        } else {
            last.insert(sandbox, (*epoch, line));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{EPOCH, OTHER_SANDBOX, SANDBOX, Sample, claimed, entered};

    #[test]
    fn an_older_epoch_is_accepted_after_a_newer_one() {
        let mut sample = Sample::clean();
        sample.add("d/1", claimed(2, EPOCH + 1, SANDBOX));
        sample.add("s/1", entered(EPOCH + 1, EPOCH, true));
        assert!(sample.broken(Invariant::I3).is_empty());
        sample.add("s/1", entered(EPOCH, EPOCH + 1, true));
        let expected = format!("accepted epoch {EPOCH} after epoch {}", EPOCH + 1);
        assert_eq!(sample.broken(Invariant::I3), [expected]);
    }

    #[test]
    fn an_epoch_that_was_refused_breaks_nothing() {
        let mut sample = Sample::clean();
        sample.add("s/1", entered(EPOCH - 1, EPOCH, false));
        assert!(sample.broken(Invariant::I3).is_empty());
    }

    #[test]
    fn an_epoch_that_nobody_was_given() {
        let mut sample = Sample::clean();
        sample.add("s/1", entered(EPOCH + 9, EPOCH, true));
        let broken = sample.broken(Invariant::I3);
        assert!(broken[0].contains("nobody was given"), "{broken:?}");
    }

    #[test]
    fn one_epoch_for_two() {
        let mut sample = Sample::clean();
        sample.add("d/2", claimed(2, EPOCH, OTHER_SANDBOX));
        let broken = sample.broken(Invariant::I3);
        assert!(broken[0].starts_with("belongs to worker w"), "{broken:?}");
    }
}
