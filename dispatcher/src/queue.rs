//! The fair queue: who goes next. Pure.
//!
//! Priorities share by weight, so that a low one is slowed and never starved; within a priority
//! tenants share by their weights, within a tenant runs by theirs, within a run the oldest goes
//! first, the members of a group side by side.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use broker_schema::{
    CancelNotice, CancelTarget, GroupId, Priority, RunId, TaskId, TenantId, Timestamp,
};

use crate::shares::Shares;

/// Picks out of twelve for high, normal and low where all three wait.
const WEIGHTS: [u32; 3] = [8, 3, 1];

/// A level that was passed over so often goes next, whatever the others are owed: what one had
/// ahead of its share must not add up to a longer wait than a whole round.
const MOST_PASSED_OVER: u32 = 11;

/// Where an entry stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Its place in the stream: no two entries share one.
    pub(crate) sequence: u64,
    /// Its place in its run, oldest first: its own, or that of the first of its group.
    pub(crate) place: u64,
    pub(crate) priority: Priority,
    pub(crate) tenant: TenantId,
    pub(crate) tenant_weight: u32,
    pub(crate) run: RunId,
    pub(crate) run_weight: u32,
    pub(crate) group: Option<GroupId>,
    pub(crate) task: TaskId,
    pub(crate) deadline: Option<Timestamp>,
}

impl Ticket {
    /// Whether a notice means this task.
    pub(crate) fn is_meant(&self, notice: &CancelNotice) -> bool {
        notice.covers(&self.tenant, self.task, &self.run, self.group.as_ref())
    }
}

type Entries<T> = BTreeMap<(u64, u64), T>;
type Tenants<T> = Shares<TenantId, Shares<RunId, Entries<T>>>;

#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    /// By level: 0 is the highest.
    levels: Shares<usize, Tenants<T>>,
    /// How many picks in a row went to others while this level waited.
    passed_over: [u32; 3],
    by_sequence: HashMap<u64, Ticket>,
    by_task: HashMap<(TenantId, TaskId), BTreeSet<u64>>,
    by_deadline: BTreeSet<(Timestamp, u64)>,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            levels: Shares::default(),
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

    /// Whether anybody waits who may go.
    pub(crate) fn is_ready(&self, may_go: impl Fn(&TenantId) -> bool) -> bool {
        self.levels
            .any(|_, tenants| tenants.any(|tenant, _| may_go(tenant)))
    }

    /// Adds an entry. One with the same sequence is replaced and returned.
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
        let level = level(ticket.priority);
        self.levels
            .member(&level, WEIGHTS[level])
            .member(&ticket.tenant, ticket.tenant_weight)
            .member(&ticket.run, ticket.run_weight)
            .insert((ticket.place, sequence), value);
        self.by_sequence.insert(sequence, ticket);
        replaced
    }

    /// Gives an entry back that got nothing: it stands where it stood, and it was nobody's turn.
    pub(crate) fn put_back(&mut self, ticket: Ticket, value: T) -> Option<T> {
        let level = level(ticket.priority);
        let (tenant, run) = (ticket.tenant.clone(), ticket.run.clone());
        let replaced = self.push(ticket, value);
        self.levels.refund(&level);
        if let Some(tenants) = self.levels.get(&level) {
            tenants.refund(&tenant);
            if let Some(runs) = tenants.get(&tenant) {
                runs.refund(&run);
            }
        }
        replaced
    }

    /// Takes the entry whose turn it is, among tenants that may go.
    pub(crate) fn pop(&mut self, may_go: impl Fn(&TenantId) -> bool) -> Option<T> {
        let level = self.next_level(&may_go)?;
        let tenants = self.levels.get(&level)?;
        let tenant = tenants.next(|tenant, _| may_go(tenant))?.clone();
        let runs = tenants.get(&tenant)?;
        let run = runs.next(|_, _| true)?.clone();
        let sequence = runs.get(&run)?.first_key_value()?.0.1;
        runs.charge(&run);
        tenants.charge(&tenant);
        self.levels.charge(&level);
        self.take(sequence)
    }

    fn next_level(&mut self, may_go: impl Fn(&TenantId) -> bool) -> Option<usize> {
        let ready = |tenants: &Tenants<T>| tenants.any(|tenant, _| may_go(tenant));
        let passed_over = self.passed_over;
        let overdue = |level: &usize| passed_over[*level] >= MOST_PASSED_OVER;
        let chosen = *self
            .levels
            .next(|level, tenants| overdue(level) && ready(tenants))
            .or_else(|| self.levels.next(|_, tenants| ready(tenants)))?;
        for (level, count) in self.passed_over.iter_mut().enumerate() {
            let waits = level != chosen && self.levels.get(&level).is_some_and(|t| ready(t));
            *count = if waits { *count + 1 } else { 0 };
        }
        Some(chosen)
    }

    /// Takes every entry that a notice means.
    pub(crate) fn take_meant(&mut self, notice: &CancelNotice) -> Vec<T> {
        let sequences: Vec<u64> = match &notice.target {
            CancelTarget::Task { task, .. } => self
                .by_task
                .get(&(notice.tenant.clone(), *task))
                .into_iter()
                .flatten()
                .copied()
                .collect(),
            _ => self
                .by_sequence
                .values()
                .filter(|ticket| ticket.is_meant(notice))
                .map(|ticket| ticket.sequence)
                .collect(),
        };
        self.take_all(sequences)
    }

    /// Takes every entry whose deadline is not after `now`.
    pub(crate) fn take_expired(&mut self, now: Timestamp) -> Vec<T> {
        let later = self.by_deadline.split_off(&(now, u64::MAX));
        let expired = std::mem::replace(&mut self.by_deadline, later);
        self.take_all(expired.into_iter().map(|(_, sequence)| sequence).collect())
    }

    /// Takes all, the oldest first.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        let sequences = self.by_sequence.keys().copied().collect();
        self.take_all(sequences)
    }

    fn take_all(&mut self, mut sequences: Vec<u64>) -> Vec<T> {
        sequences.sort_unstable();
        sequences
            .into_iter()
            .filter_map(|sequence| self.take(sequence))
            .collect()
    }

    /// Takes one entry.
    pub(crate) fn take(&mut self, sequence: u64) -> Option<T> {
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
        let level = level(ticket.priority);
        let tenants = self.levels.get(&level)?;
        let runs = tenants.get(&ticket.tenant)?;
        let entries = runs.get(&ticket.run)?;
        let value = entries.remove(&(ticket.place, sequence));
        if entries.is_empty() {
            runs.remove(&ticket.run);
        }
        if runs.is_empty() {
            tenants.remove(&ticket.tenant);
        }
        if tenants.is_empty() {
            self.levels.remove(&level);
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

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
