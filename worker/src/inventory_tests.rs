use std::time::Duration;

use super::*;

type Herd = Inventory<&'static str, u32>;

fn spec(name: &str) -> PoolSpec {
    PoolSpec::named(name.parse().unwrap())
}

fn target(name: &str, warm: u32, max: u32) -> PoolTarget {
    PoolTarget {
        spec: spec(name),
        warm,
        max,
    }
}

fn add_warm(herd: &mut Herd, pool: &str) -> SandboxId {
    let id = SandboxId::new();
    herd.begin(id, Arc::new(spec(pool)));
    herd.ready(id, "handle");
    id
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

const EPOCH: Epoch = Epoch::new(1, 5);

fn lease(herd: &mut Herd, id: SandboxId, now: BootTime) {
    let owner = tenant("t");
    let named = Named {
        sandbox: id,
        epoch: EPOCH,
        tenant: &owner,
        session: false,
    };
    assert!(matches!(
        herd.place(named, 1, now, || 7),
        Place::Adopt("handle", _)
    ));
}

#[test]
fn the_plan_fills_what_is_missing_and_respects_the_maximum() {
    let now = BootTime::now();
    // (warm here, leased here, creating here, target warm, target max) -> to create, to retire
    let cases = [
        ((0, 0, 0, 4, 64), (4, 0)),
        ((3, 0, 0, 4, 64), (1, 0)),
        ((1, 0, 3, 4, 64), (0, 0)),
        ((4, 10, 0, 4, 64), (0, 0)),
        ((0, 3, 0, 4, 4), (1, 0)),
        ((0, 4, 0, 4, 4), (0, 0)),
        ((0, 2, 1, 4, 4), (1, 0)),
        ((6, 0, 0, 4, 64), (0, 2)),
        ((4, 0, 2, 4, 64), (0, 2)),
        ((2, 0, 0, 0, 64), (0, 2)),
    ];
    for ((warm, leased, creating, wanted, max), (create, retire)) in cases {
        let mut herd = Herd::default();
        for _ in 0..warm {
            add_warm(&mut herd, "p");
        }
        for _ in 0..leased {
            let id = add_warm(&mut herd, "p");
            lease(&mut herd, id, now);
        }
        for _ in 0..creating {
            herd.begin(SandboxId::new(), Arc::new(spec("p")));
        }
        let plan = herd.plan(&[target("p", wanted, max)], false);
        let to_create: u32 = plan.create.iter().map(|(_, count)| count).sum();
        let case = (warm, leased, creating, wanted, max);
        assert_eq!((to_create, plan.retire.len()), (create, retire), "{case:?}");
    }
}

#[test]
fn a_pool_that_changed_or_went_takes_its_idle_sandboxes_along() {
    let mut herd = Herd::default();
    let old = add_warm(&mut herd, "changed");
    let gone = add_warm(&mut herd, "gone");
    let mut changed = target("changed", 1, 8);
    changed.spec.limits.pids = 7;
    let plan = herd.plan(std::slice::from_ref(&changed), false);
    let mut retired = plan.retire.clone();
    retired.sort();
    assert_eq!(retired, [old, gone]);
    assert_eq!(plan.create, [(Arc::new(changed.spec.clone()), 1)]);
    assert!(herd.to_offer().is_empty(), "what goes is not offered");
    // Until it is withdrawn it stays, and the plan says it again.
    assert_eq!(herd.plan(&[changed], false).retire.len(), 2);
}

#[test]
fn a_worker_that_leaves_keeps_nothing_idle() {
    let mut herd = Herd::default();
    let idle = add_warm(&mut herd, "p");
    let plan = herd.plan(&[target("p", 4, 8)], true);
    assert_eq!((plan.create.len(), plan.retire), (0, vec![idle]));
    assert_eq!(herd.take_warm(idle), Some("handle"));
    assert_eq!(herd.take_warm(idle), None);
    assert!(!herd.is_empty());
    herd.gone(idle);
    assert!(herd.is_empty());
}

enum Is {
    Adopt,
    Queue,
    HandBack,
    Gone(ErrorCode),
}

#[test]
fn every_placement_has_its_place() {
    use ErrorCode::{SandboxLost, StaleEpoch};
    let now = BootTime::now();
    let next = Epoch::new(1, 6);
    let other = Epoch::new(2, 5);
    // (state of the sandbox, epoch, tenant, for a session) -> place, under incarnation 1
    let cases = [
        ("unknown", EPOCH, "t", false, Is::HandBack),
        ("unknown", EPOCH, "t", true, Is::Gone(SandboxLost)),
        ("warm", EPOCH, "t", false, Is::Adopt),
        ("warm", other, "t", false, Is::HandBack),
        ("warm", EPOCH, "t", true, Is::Gone(SandboxLost)),
        ("leased", EPOCH, "t", false, Is::HandBack),
        ("leased", next, "t", false, Is::HandBack),
        ("leased", EPOCH, "t", true, Is::Queue),
        ("leased", next, "t", true, Is::Gone(StaleEpoch)),
        ("leased", EPOCH, "u", true, Is::Gone(SandboxLost)),
        ("leased", next, "u", true, Is::Gone(SandboxLost)),
        ("ended", EPOCH, "t", true, Is::Gone(SandboxLost)),
        ("ended", EPOCH, "t", false, Is::HandBack),
    ];
    for (state, epoch, owner, session, expected) in cases {
        let mut herd = Herd::default();
        let mut id = add_warm(&mut herd, "p");
        match state {
            "unknown" => id = SandboxId::new(),
            "leased" => lease(&mut herd, id, now),
            "ended" => {
                lease(&mut herd, id, now);
                herd.end(id);
            }
            _ => {}
        }
        let owner = tenant(owner);
        let named = Named {
            sandbox: id,
            epoch,
            tenant: &owner,
            session,
        };
        let place = herd.place(named, 1, now, || 9);
        let as_expected = match (&place, expected) {
            (Place::Adopt(..), Is::Adopt)
            | (Place::Queue(7), Is::Queue)
            | (Place::HandBack(_), Is::HandBack) => true,
            (Place::Gone(code, _), Is::Gone(wanted)) => *code == wanted,
            _ => false,
        };
        assert!(as_expected, "{state} {epoch} {owner} {session}: {place:?}");
    }
}

#[test]
fn a_lease_that_is_not_renewed_is_overdue() {
    let now = BootTime::now();
    let later = now.plus(Duration::from_secs(13));
    let mut herd = Herd::default();
    let id = add_warm(&mut herd, "p");
    lease(&mut herd, id, later);
    assert_eq!(herd.next_deadline(), Some(later));
    assert_eq!(herd.overdue(now), [0_u32; 0]);
    assert_eq!(herd.overdue(later), [7]);
    herd.renewed(id, Epoch::new(1, 4), later.plus(Duration::from_secs(5)));
    assert_eq!(herd.overdue(later), [7], "another epoch's renewal");
    herd.renewed(id, EPOCH, later.plus(Duration::from_secs(5)));
    assert_eq!(herd.overdue(later), [0_u32; 0]);
    herd.renewed(id, EPOCH, now);
    assert_eq!(herd.overdue(later), [0_u32; 0], "an answer that came late");
    assert!(herd.holds(id, EPOCH, later));
    assert!(!herd.holds(id, Epoch::new(1, 4), later), "another lease");
    assert!(!herd.holds(id, EPOCH, later.plus(Duration::from_secs(5))));
    // The machine slept for a day: no timer ran, and the lease is over all the same.
    assert_eq!(herd.overdue(now.plus(Duration::from_secs(86_400))), [7]);
}

#[test]
fn what_is_idle_is_offered_again_and_what_is_leased_is_not() {
    let mut herd = Herd::default();
    let idle = add_warm(&mut herd, "p");
    let leased = add_warm(&mut herd, "p");
    lease(&mut herd, leased, BootTime::now());
    herd.offered(&[idle]);
    assert!(herd.to_offer().is_empty());
    herd.forget_offers();
    assert_eq!(herd.to_offer().into_values().collect::<Vec<_>>(), [[idle]]);
    herd.offered(&[idle]);
    herd.forget_offers_of(&[leased, idle, SandboxId::new()]);
    assert_eq!(herd.to_offer().into_values().collect::<Vec<_>>(), [[idle]]);
    herd.retire(idle);
    let mut made = SandboxId::new();
    herd.begin(made, Arc::new(spec("p")));
    let snapshot = herd.snapshot();
    assert_eq!(snapshot[&idle], Here::Retiring);
    assert_eq!(snapshot[&leased], Here::Leased(EPOCH));
    assert_eq!(snapshot[&made], Here::Unusable);
    made = add_warm(&mut herd, "p");
    assert_eq!(herd.snapshot()[&made], Here::Warm);
}

#[test]
fn counts_tell_idle_and_leased_apart() {
    let mut herd = Herd::default();
    add_warm(&mut herd, "p");
    let leased = add_warm(&mut herd, "p");
    lease(&mut herd, leased, BootTime::now());
    herd.begin(SandboxId::new(), Arc::new(spec("p")));
    let count = herd.counts()[&"p".parse().unwrap()];
    assert_eq!((count.warm, count.leased), (1, 1));
    assert_eq!(herd.by_state(), [1, 1, 1, 0, 0]);
    herd.opened(leased);
    assert_eq!(herd.by_state(), [1, 1, 0, 1, 0]);
    herd.end(leased);
    assert_eq!(herd.by_state(), [1, 1, 0, 0, 1]);
}
