//! What the worker has in hand: which placements run, and which ended lately.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

use broker_schema::{
    CancelCause, CancelNotice, Epoch, GroupId, Notices, Placement, RunId, TaskId, TenantId,
};

use crate::cancellation::Cancellation;

/// Placements that are remembered after their end: a repeat within these is not run again.
const REMEMBERED: usize = 4096;

/// One attempt at one task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct JobKey {
    pub(crate) tenant: TenantId,
    pub(crate) task: TaskId,
    pub(crate) attempt: u32,
    /// Of its lease. A Redis that was flushed counts attempts from the beginning: the second
    /// attempt 1 is not the first one come again.
    pub(crate) epoch: Epoch,
}

impl JobKey {
    pub(crate) fn of(placement: &Placement) -> Self {
        Self {
            tenant: placement.task.tenant.clone(),
            task: placement.task.id,
            // A session's task has one run, whatever number its sender gave it.
            attempt: match placement.task.session {
                Some(_) => 0,
                None => placement.attempt,
            },
            epoch: placement.sandbox.epoch,
        }
    }
}

/// What a task belongs to, and can be cancelled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Family {
    pub(crate) run: RunId,
    pub(crate) group: Option<GroupId>,
}

impl Family {
    pub(crate) fn of(placement: &Placement) -> Self {
        Self {
            run: placement.task.run.clone(),
            group: placement.task.group.clone(),
        }
    }
}

/// What to do with a delivery.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Run it, until it is cancelled: it may have been while it was on its way.
    Run(Cancellation),
    /// The message that runs, delivered once more: its end will settle it.
    Redelivered,
    /// Another message of what runs. The first one stands for it until the end: settle this one
    /// and say nothing.
    Running,
    /// A message of what has ended.
    Ended,
}

#[derive(Debug)]
struct Running {
    sequence: u64,
    family: Family,
    cancel: Cancellation,
}

/// The table of jobs. Pure; one lock around it.
#[derive(Debug, Default)]
pub(crate) struct JobTable {
    running: HashMap<JobKey, Running>,
    ended: HashSet<JobKey>,
    order: VecDeque<JobKey>,
    cancelled: Notices,
}

impl JobTable {
    /// `sequence` is the message's place in the stream.
    pub(crate) fn admit(
        &mut self,
        key: &JobKey,
        sequence: u64,
        family: Family,
        now: Instant,
    ) -> Admission {
        if let Some(running) = self.running.get(key) {
            return if running.sequence == sequence {
                Admission::Redelivered
            } else {
                Admission::Running
            };
        }
        if self.ended.contains(key) {
            return Admission::Ended;
        }
        let cancel = Cancellation::default();
        let Family { run, group } = &family;
        let cause = self
            .cancelled
            .cause(&key.tenant, key.task, run, group.as_ref(), now);
        if let Some(cause) = cause {
            cancel.cancel(cause);
        }
        let running = Running {
            sequence,
            family,
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

    /// Cancels every attempt at a task of a tenant; how many there were. Ids are the clients':
    /// another tenant may use the same.
    pub(crate) fn cancel(&self, tenant: &TenantId, task: TaskId, cause: CancelCause) -> usize {
        self.cancel_those(cause, |key| key.tenant == *tenant && key.task == task)
    }

    /// Cancels a task under the lease of this epoch, which is one tenant's; how many there were.
    pub(crate) fn cancel_leased(&self, epoch: Epoch, task: TaskId, cause: CancelCause) -> usize {
        self.cancel_those(cause, |key| key.epoch == epoch && key.task == task)
    }

    fn cancel_those(&self, cause: CancelCause, meant: impl Fn(&JobKey) -> bool) -> usize {
        let attempts = self.running.iter().filter(|(key, _)| meant(key));
        attempts
            .map(|(_, running)| running.cancel.cancel(cause))
            .count()
    }

    /// Cancels everything that a notice means, and what of it comes a little later; how many
    /// there were.
    pub(crate) fn heed(&mut self, notice: &CancelNotice, now: Instant) -> usize {
        self.cancelled.add(notice, now);
        let meant = self.running.iter().filter(|(key, running)| {
            let Family { run, group } = &running.family;
            notice.covers(&key.tenant, key.task, run, group.as_ref())
        });
        meant
            .map(|(_, running)| running.cancel.cancel(notice.cause))
            .count()
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
            epoch: Epoch::new(1, attempt),
        }
    }

    fn family() -> Family {
        Family {
            run: "r".parse().unwrap(),
            group: Some("g".parse().unwrap()),
        }
    }

    #[test]
    fn a_notice_ends_what_it_means_and_what_of_it_comes_late() {
        let (mut table, now) = (JobTable::default(), Instant::now());
        let run = |name: &str| Family {
            run: name.parse().unwrap(),
            group: None,
        };
        let admit = |table: &mut JobTable, family| match table.admit(&key(1), 1, family, now) {
            Admission::Run(cancel) => cancel,
            other => panic!("{other:?}"),
        };
        let (meant, other) = (admit(&mut table, family()), admit(&mut table, run("s")));
        let notice = CancelNotice {
            tenant: "t".parse().unwrap(),
            target: broker_schema::CancelTarget::Run {
                run: "r".parse().unwrap(),
            },
            cause: CancelCause::Run,
        };
        assert_eq!(table.heed(&notice, now), 1);
        assert!(meant.is_cancelled() && !other.is_cancelled());
        assert_eq!(meant.cause(), CancelCause::Run);
        let late = admit(&mut table, run("r"));
        assert!(late.is_cancelled());
        assert!(!admit(&mut table, run("s")).is_cancelled());
    }

    #[test]
    fn a_placement_runs_once_however_often_it_comes() {
        let mut table = JobTable::default();
        let key = key(1);
        assert!(matches!(
            table.admit(&key, 7, family(), Instant::now()),
            Admission::Run(_)
        ));
        assert!(matches!(
            table.admit(&key, 7, family(), Instant::now()),
            Admission::Redelivered
        ));
        assert!(matches!(
            table.admit(&key, 8, family(), Instant::now()),
            Admission::Running
        ));
        table.end(&key, true);
        assert!(matches!(
            table.admit(&key, 7, family(), Instant::now()),
            Admission::Ended
        ));
        let next = JobKey {
            attempt: 2,
            ..key.clone()
        };
        assert!(matches!(
            table.admit(&next, 9, family(), Instant::now()),
            Admission::Run(_)
        ));
        assert_eq!(table.running(), 1);
        // Counted again by a Redis that had forgotten it: another placement.
        let recounted = JobKey {
            epoch: Epoch::new(2, 1),
            ..key
        };
        assert!(matches!(
            table.admit(&recounted, 10, family(), Instant::now()),
            Admission::Run(_)
        ));
    }

    #[test]
    fn a_repeat_is_told_from_what_runs_and_from_what_has_ended() {
        #[derive(Debug, Clone, Copy)]
        enum Before {
            Nothing,
            Runs,
            EndedSettled,
            EndedQuietly,
        }
        // The first message is 7.
        for (before, sequence, wanted) in [
            (Before::Nothing, 7, "run"),
            (Before::Runs, 7, "redelivered"),
            (Before::Runs, 8, "running"),
            (Before::EndedSettled, 7, "ended"),
            (Before::EndedSettled, 8, "ended"),
            (Before::EndedQuietly, 7, "run"),
            (Before::EndedQuietly, 8, "run"),
        ] {
            let (mut table, key) = (JobTable::default(), key(1));
            if !matches!(before, Before::Nothing) {
                table.admit(&key, 7, family(), Instant::now());
            }
            match before {
                Before::Nothing | Before::Runs => {}
                Before::EndedSettled => table.end(&key, true),
                Before::EndedQuietly => table.end(&key, false),
            }
            let found = match table.admit(&key, sequence, family(), Instant::now()) {
                Admission::Run(_) => "run",
                Admission::Redelivered => "redelivered",
                Admission::Running => "running",
                Admission::Ended => "ended",
            };
            assert_eq!(found, wanted, "{before:?}, message {sequence}");
            assert_eq!(table.running(), usize::from(wanted != "ended"));
        }
    }

    #[test]
    fn a_sessions_task_has_one_key_and_each_attempt_at_a_one_shot_its_own() {
        let mut placement = crate::testing::placement();
        let first = JobKey::of(&placement);
        placement.attempt = 2;
        assert_ne!(JobKey::of(&placement), first);
        placement.task.session = Some(placement.sandbox.clone());
        let second = JobKey::of(&placement);
        placement.attempt = 3;
        assert_eq!(JobKey::of(&placement), second);
    }

    #[test]
    fn what_was_given_up_quietly_may_come_again() {
        let mut table = JobTable::default();
        let key = key(1);
        assert!(matches!(
            table.admit(&key, 7, family(), Instant::now()),
            Admission::Run(_)
        ));
        table.end(&key, false);
        assert!(matches!(
            table.admit(&key, 7, family(), Instant::now()),
            Admission::Run(_)
        ));
    }

    #[test]
    fn cancelling_reaches_every_attempt_and_nothing_else() {
        let mut table = JobTable::default();
        let first = key(1);
        let second = JobKey {
            attempt: 2,
            epoch: Epoch::new(1, 2),
            ..first.clone()
        };
        // The ids of another tenant's tasks may be the same.
        let others = JobKey {
            tenant: "u".parse().unwrap(),
            epoch: Epoch::new(1, 3),
            ..first.clone()
        };
        let tokens: Vec<Cancellation> = [&first, &second, &key(1), &others]
            .into_iter()
            .zip(1..)
            .map(
                |(key, sequence)| match table.admit(key, sequence, family(), Instant::now()) {
                    Admission::Run(token) => token,
                    other => panic!("{other:?}"),
                },
            )
            .collect();
        let cancelled = || -> Vec<bool> { tokens.iter().map(Cancellation::is_cancelled).collect() };
        let asked = CancelCause::Asked;
        assert_eq!(table.cancel(&first.tenant, first.task, asked), 2);
        assert_eq!(cancelled(), [true, true, false, false]);
        let nobody = "v".parse().unwrap();
        assert_eq!(table.cancel(&nobody, first.task, asked), 0);
        assert_eq!(table.cancel_leased(Epoch::new(9, 9), first.task, asked), 0);
        assert_eq!(cancelled(), [true, true, false, false]);
        assert_eq!(table.cancel_leased(others.epoch, first.task, asked), 1);
        assert_eq!(cancelled(), [true, true, false, true]);
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
        assert!(matches!(
            table.admit(&first, 1, family(), Instant::now()),
            Admission::Run(_)
        ));
    }
}
