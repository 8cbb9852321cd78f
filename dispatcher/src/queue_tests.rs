//! What the fair queue promises, by example and by property.

use std::collections::{BTreeMap, BTreeSet};

use broker_schema::{Priority, TaskId, Timestamp};
use proptest::prelude::*;

use super::{FairQueue, Ticket};

fn ticket(sequence: u64, priority: Priority, tenant: &str, run: &str) -> Ticket {
    Ticket {
        sequence,
        priority,
        tenant: tenant.parse().unwrap(),
        run: run.parse().unwrap(),
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
    std::iter::from_fn(|| queue.pop()).collect()
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
    for sequence in std::iter::from_fn(|| queue.pop()).take(120) {
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
    assert_eq!(queue.pop(), Some(0));
    assert_eq!(queue.pop(), Some(1));
    queue.push(tickets[1].clone(), 1);
    queue.push(tickets[0].clone(), 0);
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
    assert_eq!(
        queue.take_task(&"other".parse().unwrap(), cancelled.task),
        Vec::<u64>::new()
    );
    assert_eq!(queue.take_task(&cancelled.tenant, cancelled.task), [9]);
    assert_eq!(queue.drain(), [0, 3]);
    assert_eq!((queue.len(), queue.pop()), (0, None));
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
        while let Some(sequence) = queue.pop() {
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
}
