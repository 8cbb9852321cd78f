//! What the registry says that this worker has, compared with what it has: pure.
//!
//! After a partition, a flush or a lost answer the two may differ in both directions. The worker
//! looks at itself before and after it asks, and acts only on what stayed the same meanwhile: a
//! sandbox that was leased, finished or made while the question was under way is left to the next
//! look.

use std::collections::BTreeMap;

use broker_schema::{Epoch, SandboxId};
use remuda_lease::Held;

/// A sandbox on this worker, as far as the registry is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Here {
    /// Idle and clean.
    Warm,
    /// Idle, and to go as soon as it is certain that nobody is given it.
    Retiring,
    Leased(Epoch),
    /// Being made or being destroyed: nobody may be given it.
    Unusable,
}

/// Everything on this worker at one moment.
pub(crate) type Snapshot = BTreeMap<SandboxId, Here>;

/// What makes both sides the same again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reconciliation {
    /// Idle here, and nobody could be given it.
    pub(crate) offer: Vec<SandboxId>,
    /// The registry knows no such lease any more: the sandbox and what runs in it go.
    pub(crate) let_go: Vec<(SandboxId, Epoch)>,
    /// Somebody could be given it, and it is not here.
    pub(crate) withdraw: Vec<SandboxId>,
    /// Leased, and not here: whoever waits for that lease to end need not.
    pub(crate) release: Vec<(SandboxId, Epoch)>,
}

impl Reconciliation {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// `before` and `after` are this worker before it asked and after it was answered.
pub(crate) fn reconcile(
    before: &Snapshot,
    registry: &BTreeMap<SandboxId, Held>,
    after: &Snapshot,
    incarnation: u32,
) -> Reconciliation {
    let mut to_do = Reconciliation::default();
    for (&sandbox, here) in before {
        if after.get(&sandbox) != Some(here) {
            continue;
        }
        match (*here, registry.get(&sandbox)) {
            (Here::Warm, Some(Held::Warm { incarnation: under })) if *under == incarnation => {}
            // A placement is on its way.
            (Here::Warm, Some(Held::Leased { live: true, .. })) => {}
            (Here::Warm, _) => to_do.offer.push(sandbox),
            (Here::Leased(ours), Some(Held::Leased { epoch, .. })) if *epoch == ours => {}
            (Here::Leased(ours), _) => to_do.let_go.push((sandbox, ours)),
            (Here::Unusable, Some(Held::Warm { .. })) => to_do.withdraw.push(sandbox),
            // The pool withdraws it; or its end is being told.
            (Here::Retiring | Here::Unusable, _) => {}
        }
    }
    for (&sandbox, held) in registry {
        if before.contains_key(&sandbox) || after.contains_key(&sandbox) {
            continue;
        }
        match held {
            Held::Warm { .. } => to_do.withdraw.push(sandbox),
            Held::Leased { epoch, .. } => to_do.release.push((sandbox, *epoch)),
        }
    }
    to_do
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 3;
    const OURS: Epoch = Epoch::new(3, 7);
    const OTHER: Epoch = Epoch::new(3, 8);
    const WARM: Held = Held::Warm { incarnation: NOW };
    const OLD: Held = Held::Warm { incarnation: 2 };

    fn leased(epoch: Epoch) -> Held {
        Held::Leased { epoch, live: true }
    }

    fn over(epoch: Epoch) -> Held {
        Held::Leased { epoch, live: false }
    }

    fn short(found: &Reconciliation) -> String {
        let mut words = Vec::new();
        words.extend(found.offer.iter().map(|_| "offer".to_owned()));
        words.extend(
            found
                .let_go
                .iter()
                .map(|(_, epoch)| format!("let go {epoch}")),
        );
        words.extend(found.withdraw.iter().map(|_| "withdraw".to_owned()));
        words.extend(
            found
                .release
                .iter()
                .map(|(_, epoch)| format!("release {epoch}")),
        );
        words.join(", ")
    }

    #[test]
    fn every_pair_of_states_has_its_answer() {
        use Here::{Leased, Retiring, Unusable, Warm};
        // what is here, what the registry says -> what is done
        let cases = [
            (None, None, ""),
            (None, Some(WARM), "withdraw"),
            (None, Some(OLD), "withdraw"),
            (None, Some(leased(OURS)), "release 3.7"),
            (None, Some(over(OURS)), "release 3.7"),
            (Some(Warm), None, "offer"),
            (Some(Warm), Some(WARM), ""),
            (Some(Warm), Some(OLD), "offer"),
            (Some(Warm), Some(leased(OURS)), ""),
            (Some(Warm), Some(over(OURS)), "offer"),
            (Some(Retiring), None, ""),
            (Some(Retiring), Some(WARM), ""),
            (Some(Retiring), Some(leased(OURS)), ""),
            (Some(Leased(OURS)), None, "let go 3.7"),
            (Some(Leased(OURS)), Some(WARM), "let go 3.7"),
            (Some(Leased(OURS)), Some(leased(OURS)), ""),
            // The renewal says whether it can be saved.
            (Some(Leased(OURS)), Some(over(OURS)), ""),
            (Some(Leased(OURS)), Some(leased(OTHER)), "let go 3.7"),
            (Some(Unusable), None, ""),
            (Some(Unusable), Some(WARM), "withdraw"),
            (Some(Unusable), Some(leased(OURS)), ""),
        ];
        let id = SandboxId::new();
        for (here, says, expected) in cases {
            let snapshot: Snapshot = here.into_iter().map(|here| (id, here)).collect();
            let registry = says.into_iter().map(|held| (id, held)).collect();
            let found = reconcile(&snapshot, &registry, &snapshot, NOW);
            assert_eq!(short(&found), expected, "{here:?} {says:?}");
            assert_eq!(found.is_empty(), expected.is_empty());
        }
    }

    #[test]
    fn what_changed_while_the_question_was_under_way_is_left_alone() {
        use Here::{Leased, Unusable, Warm};
        // before, what the registry said in between, after
        let cases = [
            // Offered, claimed and placed meanwhile.
            (Some(Warm), Some(WARM), Some(Leased(OURS))),
            (Some(Unusable), None, Some(Leased(OURS))),
            // Finished meanwhile.
            (Some(Leased(OURS)), None, Some(Unusable)),
            (Some(Leased(OURS)), None, None),
            // Made meanwhile.
            (None, Some(WARM), Some(Warm)),
            (Some(Unusable), None, Some(Warm)),
            // Destroyed meanwhile.
            (Some(Unusable), Some(leased(OURS)), None),
        ];
        let id = SandboxId::new();
        for (before, says, after) in cases {
            let snapshot = |here: Option<Here>| here.into_iter().map(|here| (id, here)).collect();
            let registry = says.into_iter().map(|held| (id, held)).collect();
            let found = reconcile(&snapshot(before), &registry, &snapshot(after), NOW);
            assert!(found.is_empty(), "{before:?} {says:?} {after:?}: {found:?}");
        }
    }

    #[test]
    fn a_flush_is_answered_by_offering_what_is_idle_and_letting_go_the_rest() {
        let ids: Vec<SandboxId> = (0..3).map(|_| SandboxId::new()).collect();
        let here = Snapshot::from([
            (ids[0], Here::Warm),
            (ids[1], Here::Leased(OURS)),
            (ids[2], Here::Unusable),
        ]);
        let found = reconcile(&here, &BTreeMap::new(), &here, NOW + 1);
        assert_eq!(short(&found), "offer, let go 3.7");
    }
}
