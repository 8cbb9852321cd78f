//! Groups that wait for their members, so that they are admitted together. Pure.
//!
//! A request that says how many tasks its group has is held until all of them are here, or a
//! while has passed; then they are queued side by side. A group that was let go or refused once
//! is remembered, so that what comes late or comes again is not held for itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use broker_schema::{CancelNotice, ErrorInfo, GroupId, PoolId, RunId, TaskId, TenantId, Timestamp};

use crate::queue::Ticket;

/// How long a group is remembered after it was let go or refused, and how many are.
const REMEMBERED: Duration = Duration::from_secs(600);
const MOST_REMEMBERED: usize = 8192;

/// A group in one lane: its tasks are of one pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct GroupKey {
    pub(crate) tenant: TenantId,
    pub(crate) pool: PoolId,
    pub(crate) run: RunId,
    pub(crate) group: GroupId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    /// Let go: its members stand at this place of their run.
    Queued(u64),
    Refused(ErrorInfo),
}

#[derive(Debug)]
struct Waiting<T> {
    size: usize,
    until: Instant,
    tasks: BTreeSet<TaskId>,
    members: BTreeMap<u64, (Ticket, T)>,
}

/// What becomes of a request of a group.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry<T> {
    /// It is held.
    Held,
    /// These are to be queued: the group is complete, or there is no more room to wait in.
    Queue(Vec<(Ticket, T)>),
    /// Its group was refused.
    Refuse(T, ErrorInfo),
}

#[derive(Debug)]
pub(crate) struct Groups<T> {
    waiting: HashMap<GroupKey, Waiting<T>>,
    known: HashMap<GroupKey, (Instant, Fate)>,
    hold: Duration,
    /// Most requests of one lane that are held.
    most: usize,
}

impl<T> Groups<T> {
    pub(crate) fn new(hold: Duration, most: usize) -> Self {
        Self {
            waiting: HashMap::new(),
            known: HashMap::new(),
            hold,
            most,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.values().map(|group| group.members.len()).sum()
    }

    /// Takes in a request of a group that has `size` members.
    pub(crate) fn add(
        &mut self,
        key: &GroupKey,
        size: usize,
        mut ticket: Ticket,
        value: T,
        now: Instant,
    ) -> Entry<T> {
        match self.known.get(key) {
            Some((_, Fate::Queued(place))) => {
                ticket.place = *place;
                return Entry::Queue(vec![(ticket, value)]);
            }
            Some((_, Fate::Refused(error))) => return Entry::Refuse(value, error.clone()),
            None => {}
        }
        let until = now + self.hold;
        let group = self.waiting.entry(key.clone()).or_insert_with(|| Waiting {
            size,
            until,
            tasks: BTreeSet::new(),
            members: BTreeMap::new(),
        });
        group.size = group.size.max(size);
        group.tasks.insert(ticket.task);
        group.members.insert(ticket.sequence, (ticket, value));
        if group.tasks.len() >= group.size {
            return Entry::Queue(self.let_go(key, now));
        }
        // A lane that is full of waiting groups gets nothing more: the oldest must do without.
        let lane = |other: &GroupKey| other.tenant == key.tenant && other.pool == key.pool;
        let of_lane = || self.waiting.iter().filter(|(other, _)| lane(other));
        let held: usize = of_lane().map(|(_, group)| group.members.len()).sum();
        if held < self.most {
            return Entry::Held;
        }
        let oldest = of_lane()
            .min_by_key(|(_, group)| group.members.keys().next().copied())
            .map(|(oldest, _)| oldest.clone());
        oldest.map_or(Entry::Held, |oldest| {
            Entry::Queue(self.let_go(&oldest, now))
        })
    }

    /// When the next group is let go whether it is complete or not.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.waiting.values().map(|group| group.until).min()
    }

    /// Those that have waited long enough.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<(Ticket, T)> {
        let due: BTreeSet<GroupKey> = self
            .waiting
            .iter()
            .filter(|(_, group)| group.until <= now)
            .map(|(key, _)| key.clone())
            .collect();
        due.iter().flat_map(|key| self.let_go(key, now)).collect()
    }

    /// Refuses a group that is not complete, and what comes of it later; its members so far.
    pub(crate) fn refuse(&mut self, key: &GroupKey, error: &ErrorInfo, now: Instant) -> Vec<T> {
        if matches!(self.known.get(key), Some((_, Fate::Queued(_)))) {
            return Vec::new();
        }
        self.remember(key, Fate::Refused(error.clone()), now);
        let group = self.waiting.remove(key);
        let members = group.map(|group| group.members).unwrap_or_default();
        members.into_values().map(|(_, value)| value).collect()
    }

    pub(crate) fn take_meant(&mut self, notice: &CancelNotice) -> Vec<T> {
        self.take_where(|ticket| ticket.is_meant(notice))
    }

    pub(crate) fn take_expired(&mut self, now: Timestamp) -> Vec<T> {
        self.take_where(|ticket| ticket.deadline.is_some_and(|deadline| deadline <= now))
    }

    pub(crate) fn take(&mut self, sequence: u64) -> Option<T> {
        self.take_where(|ticket| ticket.sequence == sequence).pop()
    }

    /// Drops the others.
    pub(crate) fn retain(&mut self, kept: impl Fn(&T) -> bool) {
        self.waiting.retain(|_, group| {
            group.members.retain(|_, (_, value)| kept(value));
            !group.members.is_empty()
        });
    }

    pub(crate) fn drain(&mut self) -> Vec<T> {
        self.take_where(|_| true)
    }

    fn take_where(&mut self, taken: impl Fn(&Ticket) -> bool) -> Vec<T> {
        let mut found = Vec::new();
        self.waiting.retain(|_, group| {
            let sequences: Vec<u64> = group
                .members
                .iter()
                .filter(|(_, (ticket, _))| taken(ticket))
                .map(|(sequence, _)| *sequence)
                .collect();
            for sequence in sequences {
                if let Some((_, value)) = group.members.remove(&sequence) {
                    found.push(value);
                }
            }
            !group.members.is_empty()
        });
        found
    }

    fn let_go(&mut self, key: &GroupKey, now: Instant) -> Vec<(Ticket, T)> {
        let Some(group) = self.waiting.remove(key) else {
            return Vec::new();
        };
        let place = group.members.keys().next().copied().unwrap_or_default();
        self.remember(key, Fate::Queued(place), now);
        let members = group.members.into_values();
        members
            .map(|(mut ticket, value)| {
                ticket.place = place;
                (ticket, value)
            })
            .collect()
    }

    fn remember(&mut self, key: &GroupKey, fate: Fate, now: Instant) {
        if self.known.len() >= MOST_REMEMBERED {
            self.known
                .retain(|_, (since, _)| now.duration_since(*since) < REMEMBERED);
        }
        if self.known.len() >= MOST_REMEMBERED {
            let oldest = self.known.iter().min_by_key(|(_, (since, _))| *since);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.known.remove(&oldest);
            }
        }
        self.known.insert(key.clone(), (now, fate));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::{CancelCause, CancelTarget, ErrorCode, Priority};
    use proptest::prelude::*;

    const HOLD: Duration = Duration::from_secs(2);

    fn key(group: &str) -> GroupKey {
        GroupKey {
            tenant: "t".parse().unwrap(),
            pool: "p".parse().unwrap(),
            run: "r".parse().unwrap(),
            group: group.parse().unwrap(),
        }
    }

    fn ticket(sequence: u64) -> Ticket {
        Ticket {
            sequence,
            place: sequence,
            priority: Priority::Normal,
            tenant: "t".parse().unwrap(),
            tenant_weight: 1,
            run: "r".parse().unwrap(),
            run_weight: 1,
            group: Some("g".parse().unwrap()),
            task: TaskId::new(),
            deadline: None,
        }
    }

    fn sequences(entry: Entry<u64>) -> Vec<(u64, u64)> {
        match entry {
            Entry::Held => Vec::new(),
            Entry::Queue(all) => all
                .iter()
                .map(|(ticket, _)| (ticket.sequence, ticket.place))
                .collect(),
            Entry::Refuse(..) => panic!("refused"),
        }
    }

    #[test]
    fn a_group_waits_for_its_last_member_and_goes_as_one() {
        let (mut groups, now) = (Groups::new(HOLD, 100), Instant::now());
        let mut add =
            |sequence| sequences(groups.add(&key("g"), 3, ticket(sequence), sequence, now));
        assert_eq!(add(5), []);
        assert_eq!(add(9), []);
        assert_eq!(add(12), [(5, 5), (9, 5), (12, 5)]);
        // One that comes again, or late, is not held.
        assert_eq!(add(40), [(40, 5)]);
        assert_eq!(groups.len(), 0);
    }

    #[test]
    fn the_same_task_twice_is_one_member() {
        let (mut groups, now) = (Groups::new(HOLD, 100), Instant::now());
        let (first, mut again) = (ticket(1), ticket(2));
        again.task = first.task;
        assert_eq!(sequences(groups.add(&key("g"), 2, first, 1, now)), []);
        assert_eq!(sequences(groups.add(&key("g"), 2, again, 2, now)), []);
        let all = sequences(groups.add(&key("g"), 2, ticket(3), 3, now));
        assert_eq!(all, [(1, 1), (2, 1), (3, 1)]);
    }

    #[test]
    fn waiting_has_an_end() {
        let (mut groups, start) = (Groups::new(HOLD, 100), Instant::now());
        groups.add(&key("g"), 3, ticket(1), 1, start);
        groups.add(&key("h"), 3, ticket(2), 2, start + HOLD / 2);
        assert_eq!(groups.next_due(), Some(start + HOLD));
        assert_eq!(groups.take_due(start + HOLD / 2).len(), 0);
        let due = groups.take_due(start + HOLD);
        assert_eq!(due.iter().map(|(_, value)| *value).collect::<Vec<_>>(), [1]);
        assert_eq!(groups.len(), 1);
    }

    #[test]
    fn a_lane_full_of_waiting_groups_lets_the_oldest_go() {
        let (mut groups, now) = (Groups::new(HOLD, 4), Instant::now());
        for sequence in 1..4 {
            let group = key(&format!("g{sequence}"));
            let entry = groups.add(&group, 8, ticket(sequence), sequence, now);
            assert_eq!(sequences(entry), []);
        }
        let mut elsewhere = key("x");
        elsewhere.pool = "q".parse().unwrap();
        assert_eq!(sequences(groups.add(&elsewhere, 8, ticket(9), 9, now)), []);
        let entry = groups.add(&key("g4"), 8, ticket(4), 4, now);
        assert_eq!(sequences(entry), [(1, 1)]);
    }

    #[test]
    fn a_refused_group_is_refused_as_a_whole_and_an_admitted_one_is_not() {
        let (mut groups, now) = (Groups::new(HOLD, 100), Instant::now());
        let error = ErrorInfo::new(ErrorCode::QuotaExceeded, "full");
        groups.add(&key("g"), 3, ticket(1), 1, now);
        groups.add(&key("g"), 3, ticket(2), 2, now);
        assert_eq!(groups.refuse(&key("g"), &error, now), [1, 2]);
        let late = groups.add(&key("g"), 3, ticket(3), 3, now);
        assert_eq!(late, Entry::Refuse(3, error.clone()));
        groups.add(&key("h"), 1, ticket(4), 4, now);
        assert_eq!(groups.refuse(&key("h"), &error, now), Vec::<u64>::new());
        assert_eq!(
            sequences(groups.add(&key("h"), 1, ticket(5), 5, now)),
            [(5, 4)]
        );
    }

    #[test]
    fn what_is_held_can_be_cancelled_and_expires() {
        let (mut groups, now) = (Groups::new(HOLD, 100), Instant::now());
        let mut expiring = ticket(1);
        expiring.deadline = Some(Timestamp(5));
        groups.add(&key("g"), 9, expiring, 1, now);
        groups.add(&key("g"), 9, ticket(2), 2, now);
        assert_eq!(groups.take_expired(Timestamp(5)), [1]);
        let mut notice = CancelNotice {
            tenant: "u".parse().unwrap(),
            target: CancelTarget::Run {
                run: "r".parse().unwrap(),
            },
            cause: CancelCause::Run,
        };
        assert_eq!(groups.take_meant(&notice), Vec::<u64>::new());
        notice.tenant = "t".parse().unwrap();
        assert_eq!(groups.take_meant(&notice), [2]);
        assert_eq!(groups.next_due(), None);
    }

    proptest! {
        /// Nothing is lost, nothing comes twice, and nothing is held for longer than it may be.
        #[test]
        fn everything_comes_out_once(
            events in prop::collection::vec((0..6_u8, 1..6_usize, 0..900_u64), 1..120),
        ) {
            let mut groups = Groups::new(HOLD, 8);
            let start = Instant::now();
            let (mut now, mut out) = (start, Vec::new());
            let mut came: BTreeMap<u64, Instant> = BTreeMap::new();
            for (sequence, (group, size, pause)) in (0..).zip(events) {
                now += Duration::from_millis(pause);
                out.extend(groups.take_due(now).into_iter().map(|(_, value)| value));
                came.insert(sequence, now);
                let entry = groups.add(&key(&format!("g{group}")), size, ticket(sequence), sequence, now);
                if let Entry::Queue(all) = entry {
                    out.extend(all.into_iter().map(|(_, value)| value));
                }
                prop_assert!(groups.len() <= 8);
                for (sequence, since) in &came {
                    let held = !out.contains(sequence);
                    prop_assert!(!held || now.duration_since(*since) < HOLD, "{sequence} is held");
                }
            }
            out.extend(groups.take_due(now + HOLD).into_iter().map(|(_, value)| value));
            out.sort_unstable();
            prop_assert_eq!(out, came.into_keys().collect::<Vec<_>>());
        }
    }
}
