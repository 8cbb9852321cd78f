//! What the fair queue promises, by example and by property.

use std::collections::{BTreeMap, BTreeSet};

use broker_schema::{
    CancelCause, CancelNotice, CancelTarget, Priority, TaskId, TenantId, Timestamp,
};
use proptest::prelude::*;

use super::{FairQueue, Ticket};

fn ticket(sequence: u64, priority: Priority, tenant: &str, run: &str) -> Ticket {
    Ticket {
        sequence,
        place: sequence,
        priority,
        tenant: tenant.parse().unwrap(),
        tenant_weight: 1,
        run: run.parse().unwrap(),
        run_weight: 1,
        group: None,
        task: TaskId::new(),
        deadline: None,
    }
}

fn fill(entries: &[(Priority, &str, &str)]) -> FairQueue<u64> {
    let mut queue = FairQueue::default();
    for (sequence, (priority, tenant, run)) in (0..).zip(entries) {
        queue.push(ticket(sequence, *priority, tenant, run), sequence);
    }
    queue
}

fn all(queue: &mut FairQueue<u64>) -> Vec<u64> {
    std::iter::from_fn(|| queue.pop(|_| true)).collect()
}

#[test]
fn tenants_take_turns_then_runs_then_age() {
    use Priority::Normal as N;
    let mut queue = fill(&[
        (N, "a", "r1"),
        (N, "a", "r1"),
        (N, "a", "r2"),
        (N, "a", "r1"),
        (N, "b", "r"),
        (N, "b", "r"),
    ]);
    assert_eq!(all(&mut queue), [0, 4, 2, 5, 1, 3]);
    assert!(queue.is_empty());
}

#[test]
fn priorities_share_by_weight() {
    let mut entries = Vec::new();
    for _ in 0..120 {
        for priority in Priority::ALL {
            entries.push((priority, "t", "r"));
        }
    }
    let mut queue = fill(&entries);
    let mut counts = [0; 3];
    for sequence in std::iter::from_fn(|| queue.pop(|_| true)).take(120) {
        counts[(sequence % 3) as usize] += 1;
    }
    assert_eq!(counts, [80, 30, 10]);
}

#[test]
fn what_is_given_back_stands_where_it_stood() {
    use Priority::Normal as N;
    let mut queue = FairQueue::default();
    let tickets: Vec<Ticket> = (0..3).map(|i| ticket(i, N, "t", "r")).collect();
    for ticket in &tickets {
        queue.push(ticket.clone(), ticket.sequence);
    }
    assert_eq!(queue.pop(|_| true), Some(0));
    assert_eq!(queue.pop(|_| true), Some(1));
    queue.put_back(tickets[1].clone(), 1);
    queue.put_back(tickets[0].clone(), 0);
    assert_eq!(all(&mut queue), [0, 1, 2]);
}

#[test]
fn deadlines_and_tasks_are_found() {
    let mut queue = FairQueue::default();
    for sequence in 0..4 {
        let mut entry = ticket(sequence, Priority::Low, "t", "r");
        entry.deadline = (sequence > 0).then_some(Timestamp(sequence * 10));
        queue.push(entry, sequence);
    }
    assert_eq!(queue.take_expired(Timestamp(9)), Vec::<u64>::new());
    assert_eq!(queue.take_expired(Timestamp(20)), [1, 2]);
    let cancelled = ticket(9, Priority::High, "t", "r");
    queue.push(cancelled.clone(), 9);
    let notice = |tenant: &str| CancelNotice {
        tenant: tenant.parse().unwrap(),
        target: CancelTarget::Task {
            task: cancelled.task,
            run: None,
        },
        cause: CancelCause::Asked,
    };
    assert_eq!(queue.take_meant(&notice("other")), Vec::<u64>::new());
    assert_eq!(queue.take_meant(&notice("t")), [9]);
    assert_eq!(queue.drain(), [0, 3]);
    assert_eq!((queue.len(), queue.pop(|_| true)), (0, None));
}

#[test]
fn runs_and_groups_are_found_and_nothing_else() {
    let mut queue = FairQueue::default();
    for (sequence, (tenant, run, group)) in (0..).zip([
        ("t", "r", Some("g")),
        ("t", "r", None),
        ("t", "s", Some("g")),
        ("u", "r", Some("g")),
        ("t", "r", Some("g")),
    ]) {
        let mut entry = ticket(sequence, Priority::Normal, tenant, run);
        entry.group = group.map(|group| group.parse().unwrap());
        queue.push(entry, sequence);
    }
    let mut take = |target| {
        queue.take_meant(&CancelNotice {
            tenant: "t".parse().unwrap(),
            target,
            cause: CancelCause::Asked,
        })
    };
    let run = || "r".parse().unwrap();
    let group = "g".parse().unwrap();
    assert_eq!(take(CancelTarget::Group { run: run(), group }), [0, 4]);
    assert_eq!(take(CancelTarget::Run { run: run() }), [1]);
    assert_eq!(queue.drain(), [2, 3]);
}

#[test]
fn members_of_a_group_go_side_by_side() {
    let mut queue = FairQueue::default();
    for (sequence, place) in [(0, 0), (1, 1), (2, 2), (3, 1), (4, 1), (5, 5)] {
        let mut entry = ticket(sequence, Priority::Normal, "t", "r");
        entry.place = place;
        queue.push(entry, sequence);
    }
    assert_eq!(all(&mut queue), [0, 1, 3, 4, 2, 5]);
}

#[test]
fn who_is_held_up_is_passed_by() {
    use Priority::{High, Normal};
    let mut queue = fill(&[(High, "a", "r"), (Normal, "b", "r"), (High, "a", "r")]);
    let b = |tenant: &TenantId| tenant.as_str() == "b";
    assert!(queue.is_ready(b));
    assert_eq!(queue.pop(b), Some(1));
    assert!(!queue.is_ready(b));
    assert_eq!(queue.pop(b), None);
    assert_eq!(all(&mut queue), [0, 2]);
}

#[test]
fn tenants_and_runs_share_by_weight() {
    let mut queue = FairQueue::default();
    let mut sequence = 0;
    for (tenant, tenant_weight, run, run_weight) in
        [("a", 3, "r1", 1), ("a", 3, "r2", 2), ("b", 1, "r", 7)]
    {
        for _ in 0..200 {
            let mut entry = ticket(sequence, Priority::Low, tenant, run);
            (entry.tenant_weight, entry.run_weight) = (tenant_weight, run_weight);
            queue.push(entry, (tenant, run));
            sequence += 1;
        }
    }
    let mut counts = BTreeMap::<_, u32>::new();
    for chosen in std::iter::from_fn(|| queue.pop(|_| true)).take(240) {
        *counts.entry(chosen).or_default() += 1;
    }
    let expected = [(("a", "r1"), 60), (("a", "r2"), 120), (("b", "r"), 60)];
    assert_eq!(counts, BTreeMap::from(expected));
}

fn entry() -> impl Strategy<Value = (Priority, u8, u8)> {
    (
        prop_oneof![
            Just(Priority::High),
            Just(Priority::Normal),
            Just(Priority::Low)
        ],
        0..5_u8,
        0..3_u8,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Everything comes out once, within a run in order, and nobody waits for more than the
    /// others' shares: among tenants that wait at one priority, counts differ by at most one.
    #[test]
    fn fair_and_complete(entries in prop::collection::vec(entry(), 1..150)) {
        let mut queue = FairQueue::default();
        let mut left: BTreeMap<(usize, u8), usize> = BTreeMap::new();
        for (sequence, (priority, tenant, run)) in (0..).zip(&entries) {
            let (tenant_name, run_name) = (format!("t{tenant}"), format!("r{run}"));
            queue.push(ticket(sequence, *priority, &tenant_name, &run_name), sequence);
            *left.entry((super::level(*priority), *tenant)).or_default() += 1;
        }
        let mut seen = BTreeSet::new();
        let mut last: BTreeMap<(usize, u8, u8), u64> = BTreeMap::new();
        let mut waited: BTreeMap<usize, usize> = BTreeMap::new();
        let mut served: BTreeMap<(usize, u8), usize> = BTreeMap::new();
        while let Some(sequence) = queue.pop(|_| true) {
            prop_assert!(seen.insert(sequence));
            let (priority, tenant, run) = &entries[sequence as usize];
            let level = super::level(*priority);
            let before = last.insert((level, *tenant, *run), sequence);
            prop_assert!(before < Some(sequence), "a run went out of order");
            // No level waits longer than a whole round of all weights.
            for other in 0..3 {
                let waits = left.iter().any(|((l, _), n)| *l == other && *n > 0);
                let count = waited.entry(other).or_default();
                *count = if waits && other != level { *count + 1 } else { 0 };
                prop_assert!(*count <= 12, "level {other} starves");
            }
            *left.get_mut(&(level, *tenant)).unwrap() -= 1;
            *served.entry((level, *tenant)).or_default() += 1;
            let waiting: Vec<usize> = left
                .iter()
                .filter(|((l, _), n)| *l == level && **n > 0)
                .map(|(key, _)| served.get(key).copied().unwrap_or(0))
                .collect();
            if let (Some(least), Some(most)) = (waiting.iter().min(), waiting.iter().max()) {
                prop_assert!(most - least <= 1, "tenants' turns differ: {waiting:?}");
            }
        }
        prop_assert_eq!(seen.len(), entries.len());
    }

    /// While the same tenants wait, each gets its weight's share of the picks of its level,
    /// whatever part of the picks finds nothing and is put back.
    #[test]
    fn tenants_get_their_weights(
        weights in prop::collection::vec(1..20_u32, 2..6),
        nothing in prop::collection::vec(any::<bool>(), 400),
    ) {
        let mut queue = FairQueue::default();
        let mut tickets = Vec::new();
        for (tenant, weight) in weights.iter().enumerate() {
            for _ in 0..400 {
                let sequence = tickets.len() as u64;
                let mut entry = ticket(sequence, Priority::Normal, &format!("t{tenant}"), "r");
                entry.tenant_weight = *weight;
                tickets.push(entry.clone());
                queue.push(entry, (tenant, sequence));
            }
        }
        let mut served = vec![0_u32; weights.len()];
        for nothing in nothing {
            let (tenant, sequence) = queue.pop(|_| true).unwrap();
            if nothing {
                queue.put_back(tickets[sequence as usize].clone(), (tenant, sequence));
            } else {
                served[tenant] += 1;
            }
        }
        let (total, picks): (u32, u32) = (weights.iter().sum(), served.iter().sum());
        for (served, weight) in served.iter().zip(&weights) {
            let owed = f64::from(picks) * f64::from(*weight) / f64::from(total);
            prop_assert!(f64::from(*served) >= owed - 2.001, "{served} of {owed}");
        }
    }
}
