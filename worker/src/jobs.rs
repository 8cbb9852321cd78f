//! What the worker has in hand: which placements run, and which ended lately.

use std::collections::{HashMap, HashSet, VecDeque};

use broker_schema::{Placement, TaskId, TenantId};
use tokio_util::sync::CancellationToken;

/// Placements that are remembered after their end: a repeat within these is not run again.
const REMEMBERED: usize = 4096;

/// One attempt at one task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct JobKey {
    pub(crate) tenant: TenantId,
    pub(crate) task: TaskId,
    pub(crate) attempt: u32,
}

impl JobKey {
    pub(crate) fn of(placement: &Placement) -> Self {
        Self {
            tenant: placement.task.tenant.clone(),
            task: placement.task.id,
            attempt: placement.attempt,
        }
    }
}

/// What to do with a delivery.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Run it; the token is cancelled when somebody cancels the task.
    Run(CancellationToken),
    /// The message that runs, delivered once more: its end will settle it.
    Redelivered,
    /// Another message of what runs or has ended: settle it and do nothing else.
    Repeat,
}

#[derive(Debug)]
struct Running {
    sequence: u64,
    cancel: CancellationToken,
}

/// The table of jobs. Pure; one lock around it.
#[derive(Debug, Default)]
pub(crate) struct JobTable {
    running: HashMap<JobKey, Running>,
    ended: HashSet<JobKey>,
    order: VecDeque<JobKey>,
}

impl JobTable {
    /// `sequence` is the message's place in the stream.
    pub(crate) fn admit(&mut self, key: &JobKey, sequence: u64) -> Admission {
        if let Some(running) = self.running.get(key) {
            return if running.sequence == sequence {
                Admission::Redelivered
            } else {
                Admission::Repeat
            };
        }
        if self.ended.contains(key) {
            return Admission::Repeat;
        }
        let cancel = CancellationToken::new();
        let running = Running {
            sequence,
            cancel: cancel.clone(),
        };
        self.running.insert(key.clone(), running);
        Admission::Run(cancel)
    }

    /// A job has left the worker's hands; `settled` when its message need not come again.
    pub(crate) fn end(&mut self, key: &JobKey, settled: bool) {
        self.running.remove(key);
        if settled && self.ended.insert(key.clone()) {
            self.order.push_back(key.clone());
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.ended.remove(&oldest);
            }
        }
    }

    /// Cancels every attempt at a task; how many there were.
    pub(crate) fn cancel(&self, task: TaskId) -> usize {
        let attempts = self.running.iter().filter(|(key, _)| key.task == task);
        attempts.map(|(_, running)| running.cancel.cancel()).count()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(attempt: u32) -> JobKey {
        JobKey {
            tenant: "t".parse().unwrap(),
            task: TaskId::new(),
            attempt,
        }
    }

    #[test]
    fn a_placement_runs_once_however_often_it_comes() {
        let mut table = JobTable::default();
        let key = key(1);
        assert!(matches!(table.admit(&key, 7), Admission::Run(_)));
        assert!(matches!(table.admit(&key, 7), Admission::Redelivered));
        assert!(matches!(table.admit(&key, 8), Admission::Repeat));
        table.end(&key, true);
        assert!(matches!(table.admit(&key, 7), Admission::Repeat));
        let next = JobKey { attempt: 2, ..key };
        assert!(matches!(table.admit(&next, 9), Admission::Run(_)));
        assert_eq!(table.running(), 1);
    }

    #[test]
    fn what_was_given_up_quietly_may_come_again() {
        let mut table = JobTable::default();
        let key = key(1);
        assert!(matches!(table.admit(&key, 7), Admission::Run(_)));
        table.end(&key, false);
        assert!(matches!(table.admit(&key, 7), Admission::Run(_)));
    }

    #[test]
    fn cancelling_reaches_every_attempt_and_nothing_else() {
        let mut table = JobTable::default();
        let first = key(1);
        let second = JobKey {
            attempt: 2,
            ..first.clone()
        };
        let tokens: Vec<CancellationToken> = [&first, &second, &key(1)]
            .into_iter()
            .zip(1..)
            .map(|(key, sequence)| match table.admit(key, sequence) {
                Admission::Run(token) => token,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(table.cancel(first.task), 2);
        let cancelled: Vec<bool> = tokens.iter().map(CancellationToken::is_cancelled).collect();
        assert_eq!(cancelled, [true, true, false]);
    }

    #[test]
    fn memory_is_bounded() {
        let mut table = JobTable::default();
        let first = key(1);
        table.end(&first, true);
        for _ in 0..REMEMBERED {
            table.end(&key(1), true);
        }
        assert_eq!(table.ended.len(), REMEMBERED);
        assert!(matches!(table.admit(&first, 1), Admission::Run(_)));
    }
}
