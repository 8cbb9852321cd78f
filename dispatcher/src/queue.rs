//! The fair queue: who goes next. Pure.
//!
//! Priorities share by weight, so that a low one is slowed and never starved; within a priority
//! tenants take turns, within a tenant runs take turns, within a run the oldest goes first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use broker_schema::{Priority, RunId, TaskId, TenantId, Timestamp};

/// Picks out of twelve for high, normal and low where all three wait.
const WEIGHTS: [i64; 3] = [8, 3, 1];

/// A level that was passed over so often goes next, whatever the others are owed: what one owes
/// from a time when others waited must not add up to a longer wait than a whole round.
const MOST_PASSED_OVER: u32 = 11;

/// Where an entry stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Its place in the stream: older goes first, and no two entries share one.
    pub(crate) sequence: u64,
    pub(crate) priority: Priority,
    pub(crate) tenant: TenantId,
    pub(crate) run: RunId,
    pub(crate) task: TaskId,
    pub(crate) deadline: Option<Timestamp>,
}

#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    levels: [Level<T>; 3],
    /// Smooth weighted turns: the level that is owed most goes next.
    owed: [i64; 3],
    /// How many picks in a row went to others while this level waited.
    passed_over: [u32; 3],
    by_sequence: HashMap<u64, Ticket>,
    by_task: HashMap<(TenantId, TaskId), BTreeSet<u64>>,
    by_deadline: BTreeSet<(Timestamp, u64)>,
}

type Level<T> = Turns<TenantId, Turns<RunId, BTreeMap<u64, T>>>;

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            levels: [Turns::default(), Turns::default(), Turns::default()],
            owed: [0; 3],
            passed_over: [0; 3],
            by_sequence: HashMap::new(),
            by_task: HashMap::new(),
            by_deadline: BTreeSet::new(),
        }
    }
}

impl<T> FairQueue<T> {
    pub(crate) fn len(&self) -> usize {
        self.by_sequence.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_sequence.is_empty()
    }

    /// Adds an entry, or gives one back: it stands where it stood. One with the same sequence
    /// is replaced and returned.
    pub(crate) fn push(&mut self, ticket: Ticket, value: T) -> Option<T> {
        let replaced = self.take(ticket.sequence);
        let sequence = ticket.sequence;
        if let Some(deadline) = ticket.deadline {
            self.by_deadline.insert((deadline, sequence));
        }
        self.by_task
            .entry((ticket.tenant.clone(), ticket.task))
            .or_default()
            .insert(sequence);
        self.levels[level(ticket.priority)]
            .member(&ticket.tenant)
            .member(&ticket.run)
            .insert(sequence, value);
        self.by_sequence.insert(sequence, ticket);
        replaced
    }

    /// Takes the entry whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let chosen = self.choose_level()?;
        let sequence = {
            let (_, runs) = self.levels[chosen].turn()?;
            let (_, entries) = runs.turn()?;
            *entries.first_key_value()?.0
        };
        self.take(sequence)
    }

    /// Takes every entry of one task.
    pub(crate) fn take_task(&mut self, tenant: &TenantId, task: TaskId) -> Vec<T> {
        let sequences = self.by_task.remove(&(tenant.clone(), task));
        sequences
            .into_iter()
            .flatten()
            .filter_map(|sequence| self.take(sequence))
            .collect()
    }

    /// Takes every entry whose deadline is not after `now`.
    pub(crate) fn take_expired(&mut self, now: Timestamp) -> Vec<T> {
        let later = self.by_deadline.split_off(&(now, u64::MAX));
        let expired = std::mem::replace(&mut self.by_deadline, later);
        expired
            .into_iter()
            .filter_map(|(_, sequence)| self.take(sequence))
            .collect()
    }

    /// Takes all, the oldest first.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        let mut sequences: Vec<u64> = self.by_sequence.keys().copied().collect();
        sequences.sort_unstable();
        sequences
            .into_iter()
            .filter_map(|sequence| self.take(sequence))
            .collect()
    }

    fn choose_level(&mut self) -> Option<usize> {
        let waiting: Vec<usize> = (0..3).filter(|&i| !self.levels[i].is_empty()).collect();
        let total: i64 = waiting.iter().map(|&i| WEIGHTS[i]).sum();
        for (i, owed) in self.owed.iter_mut().enumerate() {
            // Who has nothing to send saves nothing up.
            *owed = if waiting.contains(&i) {
                *owed + WEIGHTS[i]
            } else {
                0
            };
        }
        let overdue = |i: &usize| self.passed_over[*i] >= MOST_PASSED_OVER;
        let chosen = waiting.iter().copied().max_by_key(|i| {
            let first_of_equals = std::cmp::Reverse(*i);
            (overdue(i), self.owed[*i], first_of_equals)
        })?;
        self.owed[chosen] -= total;
        for (i, passed_over) in self.passed_over.iter_mut().enumerate() {
            let waits = i != chosen && waiting.contains(&i);
            *passed_over = if waits { *passed_over + 1 } else { 0 };
        }
        Some(chosen)
    }

    fn take(&mut self, sequence: u64) -> Option<T> {
        let ticket = self.by_sequence.remove(&sequence)?;
        if let Some(deadline) = ticket.deadline {
            self.by_deadline.remove(&(deadline, sequence));
        }
        let id = (ticket.tenant.clone(), ticket.task);
        if let Some(sequences) = self.by_task.get_mut(&id) {
            sequences.remove(&sequence);
            if sequences.is_empty() {
                self.by_task.remove(&id);
            }
        }
        let tenants = &mut self.levels[level(ticket.priority)];
        let runs = tenants.get(&ticket.tenant)?;
        let entries = runs.get(&ticket.run)?;
        let value = entries.remove(&sequence);
        if entries.is_empty() {
            runs.remove(&ticket.run);
        }
        if runs.is_empty() {
            tenants.remove(&ticket.tenant);
        }
        value
    }
}

fn level(priority: Priority) -> usize {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
        Priority::Low => 2,
    }
}

/// Members who take turns, in the order of their keys. None of them is ever empty.
#[derive(Debug)]
struct Turns<K, V> {
    members: BTreeMap<K, V>,
    last: Option<K>,
}

impl<K, V> Default for Turns<K, V> {
    fn default() -> Self {
        Self {
            members: BTreeMap::new(),
            last: None,
        }
    }
}

impl<K: Ord + Clone, V> Turns<K, V> {
    fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    fn get(&mut self, key: &K) -> Option<&mut V> {
        self.members.get_mut(key)
    }

    fn remove(&mut self, key: &K) {
        self.members.remove(key);
    }

    fn member(&mut self, key: &K) -> &mut V
    where
        V: Default,
    {
        self.members.entry(key.clone()).or_default()
    }

    /// The member after the one that went last.
    fn turn(&mut self) -> Option<(K, &mut V)> {
        let after = self.last.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let key = self
            .members
            .range::<K, _>((after, Bound::Unbounded))
            .next()
            .or_else(|| self.members.first_key_value())
            .map(|(key, _)| key.clone())?;
        self.last = Some(key.clone());
        let member = self.members.get_mut(&key)?;
        Some((key, member))
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
