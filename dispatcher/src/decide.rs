//! Decisions without effects: shares of pools, waits, pace.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::pool::PoolSpec;
use broker_schema::{CancelCause, PoolId, TaskRequest, WorkerId};
use remuda_lease::{Claim, QuotaKind, WorkerInfo};
use tokio::time::Instant;

/// What each worker should keep: `(pool, warm, max)`, sorted by pool.
pub(crate) type Targets = BTreeMap<WorkerId, Vec<(PoolId, u32, u32)>>;

/// Splits the pools over the workers that are alive, stay, and have the pool's backend; what
/// does not divide goes to the first ones, in the order of their names.
pub(crate) fn split(pools: &[PoolSpec], workers: &[WorkerInfo]) -> Targets {
    let mut staying: Vec<&WorkerInfo> = workers
        .iter()
        .filter(|worker| worker.alive && !worker.draining)
        .collect();
    staying.sort_by(|a, b| a.record.worker.cmp(&b.record.worker));
    let mut targets: Targets = staying
        .iter()
        .map(|worker| (worker.record.worker.clone(), Vec::new()))
        .collect();
    for pool in pools {
        let able: Vec<&WorkerId> = staying
            .iter()
            .filter(|worker| worker.record.backends.contains(&pool.backend))
            .map(|worker| &worker.record.worker)
            .collect();
        for (index, worker) in able.iter().enumerate() {
            let warm = share(pool.warm, able.len(), index);
            let max = share(pool.max, able.len(), index).max(warm);
            if let Some(list) = targets.get_mut(*worker) {
                list.push((pool.name.clone(), warm, max));
            }
        }
    }
    for list in targets.values_mut() {
        list.sort();
    }
    targets
}

fn share(total: u32, among: usize, index: usize) -> u32 {
    let among = u32::try_from(among).unwrap_or(u32::MAX).max(1);
    total / among + u32::from((index as u64) < u64::from(total % among))
}

/// How many claims a pool may have in flight. Halting at the first that finds nothing warm, it
/// begins with one after a hint and doubles with each grant, so that one new sandbox does not
/// set off as many claims as there are tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    most: usize,
    allowed: usize,
}

impl Pace {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            allowed: most,
        }
    }

    pub(crate) fn allows(&self, in_flight: usize) -> bool {
        in_flight < self.allowed
    }

    pub(crate) fn halted(&self) -> bool {
        self.allowed == 0
    }

    pub(crate) fn none_warm(&mut self) {
        self.allowed = 0;
    }

    /// There may be something warm.
    pub(crate) fn hint(&mut self) {
        self.allowed = self.allowed.max(1);
    }

    pub(crate) fn granted(&mut self) {
        self.allowed = (self.allowed.max(1) * 2).min(self.most);
    }
}

/// Keeps a pool from trying while the stream takes no placements: after a pause, ever longer,
/// one tries first.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Brake {
    until: Option<Instant>,
    failures: u32,
}

impl Brake {
    /// A placement was not taken. Others that were on their way with it change nothing.
    pub(crate) fn refused(&mut self, now: Instant, spread: f64) {
        if self.until.is_none() {
            self.until = Some(now + backoff(self.failures, spread));
            self.failures = self.failures.saturating_add(1);
        }
    }

    /// A placement was taken.
    pub(crate) fn taken(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Whether it is let go now.
    pub(crate) fn tick(&mut self, now: Instant) -> bool {
        let due = self.until.is_some_and(|until| until <= now);
        if due {
            self.until = None;
        }
        due
    }
}

/// Attempts at a task: those that faults of the infrastructure may end, and those that the task
/// asked for beside its first.
pub(crate) fn attempt_limit(max_attempts: u32, request: &TaskRequest) -> u32 {
    max_attempts.saturating_add(u32::from(request.retries))
}

/// What a claim's answer means for the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Next {
    Publish,
    /// Nothing is warm: wait for the pool.
    WaitForPool,
    /// Ask again after this.
    Later(Duration),
    EndCancelled(CancelCause),
    /// The tenant has what it may have: wait for its own.
    WaitForQuota,
    /// Waiting would not help.
    EndOverQuota {
        kind: QuotaKind,
        limit: u32,
        current: u32,
    },
    EndDeadLettered {
        attempts: u32,
    },
    /// Its terminal should be there: look, and claim again if it is not.
    LookForTerminal,
    /// Another request has this id: no terminal, it would race the real one.
    DeadLetterConflict {
        first_digest: String,
    },
    Bootstrap,
}

/// A lease that is about to run out is asked for again a little after, not before.
const BUSY_MARGIN: Duration = Duration::from_millis(50);
/// A lease is freed long before it runs out when its task ends: look again by then.
const BUSY_MOST: Duration = Duration::from_secs(5);

pub(crate) fn after_claim(claim: &Claim) -> Next {
    match claim {
        Claim::Granted { .. } => Next::Publish,
        Claim::NoneWarm => Next::WaitForPool,
        Claim::Busy { remaining } => Next::Later((*remaining + BUSY_MARGIN).min(BUSY_MOST)),
        Claim::Cancelled { cause } => Next::EndCancelled(*cause),
        // Tasks end, so that waiting helps. Sessions stay until somebody closes them, and of
        // nothing there will never be one.
        Claim::OverQuota {
            kind,
            limit,
            current,
        } if *kind == QuotaKind::Sessions || *limit == 0 => Next::EndOverQuota {
            kind: *kind,
            limit: *limit,
            current: *current,
        },
        Claim::OverQuota { .. } => Next::WaitForQuota,
        Claim::Finished => Next::LookForTerminal,
        Claim::Exhausted { attempts } => Next::EndDeadLettered {
            attempts: *attempts,
        },
        Claim::Conflict { first_digest } => Next::DeadLetterConflict {
            first_digest: first_digest.clone(),
        },
        Claim::NoIncarnation => Next::Bootstrap,
    }
}

/// The pause after the nth failure in a row: doubling from 100 ms to 5 s, `spread` (0 to 1) of
/// it left to chance so that a fleet does not come back as one.
pub(crate) fn backoff(failures: u32, spread: f64) -> Duration {
    let base = Duration::from_millis(100 << failures.min(6)).min(Duration::from_secs(5));
    base.mul_f64(0.5 + spread.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::Timestamp;
    use broker_schema::pool::BackendKind;
    use remuda_lease::WorkerRecord;

    fn worker(name: &str, alive: bool, backends: &[BackendKind]) -> WorkerInfo {
        WorkerInfo {
            record: WorkerRecord {
                worker: name.parse().unwrap(),
                incarnation: 1,
                schema: 1,
                backends: backends.to_vec(),
                slots: 4,
                pools: BTreeMap::new(),
                host: String::new(),
                pid: 0,
                started_at: Timestamp::default(),
            },
            alive,
            draining: false,
            last_seen: Duration::ZERO,
        }
    }

    fn pool(name: &str, backend: BackendKind, warm: u32, max: u32) -> PoolSpec {
        PoolSpec {
            backend,
            warm,
            max,
            ..PoolSpec::named(name.parse().unwrap())
        }
    }

    #[test]
    fn pools_are_split_over_able_workers_and_the_rest_goes_to_the_first() {
        use BackendKind::{Fake, Local};
        let mut leaving = worker("d", true, &[Local]);
        leaving.draining = true;
        let workers = [
            worker("c", true, &[Local, Fake]),
            worker("a", true, &[Local]),
            worker("b", false, &[Local]),
            leaving,
        ];
        let pools = [pool("py", Local, 5, 9), pool("fk", Fake, 3, 2)];
        let targets = split(&pools, &workers);
        let id = |name: &str| name.parse::<PoolId>().unwrap();
        assert_eq!(targets.len(), 2);
        assert_eq!(targets[&"a".parse().unwrap()], [(id("py"), 3, 5)]);
        assert_eq!(
            targets[&"c".parse().unwrap()],
            [(id("fk"), 3, 3), (id("py"), 2, 4)]
        );
    }

    #[test]
    fn shares_add_up() {
        for (total, among) in [(0, 3), (1, 3), (7, 3), (64, 5), (u32::MAX, 7)] {
            let sum: u64 = (0..among)
                .map(|index| u64::from(share(total, among, index)))
                .sum();
            assert_eq!(sum, u64::from(total));
        }
    }

    #[test]
    fn the_pace_halts_probes_and_doubles() {
        let mut pace = Pace::new(8);
        assert!(pace.allows(7) && !pace.allows(8));
        pace.none_warm();
        assert!(!pace.allows(0));
        pace.hint();
        assert!(pace.allows(0) && !pace.allows(1));
        for allowed in [2, 4, 8, 8] {
            pace.granted();
            assert!(pace.allows(allowed - 1) && !pace.allows(allowed));
        }
    }

    #[test]
    fn a_pool_whose_placements_are_refused_waits_ever_longer() {
        let (mut brake, now) = (Brake::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..8 {
            brake.refused(now, 1.0);
            let until = brake.until().unwrap();
            // Another of the same moment does not make it longer.
            brake.refused(now, 1.0);
            assert_eq!(brake.until(), Some(until));
            assert!(!brake.tick(now));
            assert!(brake.tick(until) && !brake.tick(until));
            waits.push((until - now).as_millis());
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        brake.refused(now, 1.0);
        brake.taken();
        assert_eq!(brake.until(), None);
        brake.refused(now, 1.0);
        assert_eq!(brake.until(), Some(now + Duration::from_millis(100)));
    }

    #[test]
    fn answers_lead_on() {
        let cases = [
            (Claim::NoneWarm, Next::WaitForPool),
            (
                Claim::Cancelled {
                    cause: CancelCause::Run,
                },
                Next::EndCancelled(CancelCause::Run),
            ),
            (Claim::Finished, Next::LookForTerminal),
            (Claim::NoIncarnation, Next::Bootstrap),
            (
                Claim::Exhausted { attempts: 4 },
                Next::EndDeadLettered { attempts: 4 },
            ),
            (
                Claim::Busy {
                    remaining: Duration::from_secs(1),
                },
                Next::Later(Duration::from_millis(1050)),
            ),
            (
                Claim::Busy {
                    remaining: Duration::from_secs(600),
                },
                Next::Later(BUSY_MOST),
            ),
        ];
        for (claim, next) in cases {
            assert_eq!(after_claim(&claim), next);
        }
    }

    #[test]
    fn tasks_wait_for_a_quota_and_sessions_are_told() {
        let over = |kind, limit| {
            after_claim(&Claim::OverQuota {
                kind,
                limit,
                current: limit,
            })
        };
        let told = |kind, limit| Next::EndOverQuota {
            kind,
            limit,
            current: limit,
        };
        assert_eq!(over(QuotaKind::Running, 3), Next::WaitForQuota);
        assert_eq!(over(QuotaKind::Sandboxes, 3), Next::WaitForQuota);
        for (kind, limit) in [
            (QuotaKind::Sessions, 3),
            (QuotaKind::Sandboxes, 0),
            (QuotaKind::Running, 0),
        ] {
            assert_eq!(over(kind, limit), told(kind, limit));
        }
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        assert_eq!(backoff(0, 1.0), Duration::from_millis(100));
        assert_eq!(backoff(0, 0.0), Duration::from_millis(50));
        assert_eq!(backoff(u32::MAX, 1.0), Duration::from_secs(5));
        assert!(backoff(3, 0.3) < backoff(4, 0.3));
    }

    #[test]
    fn retries_do_not_use_up_what_faults_may() {
        let ids = ["t", "r", "p"].map(str::to_owned);
        let mut request = TaskRequest::new(
            ids[0].parse().unwrap(),
            ids[1].parse().unwrap(),
            ids[2].parse().unwrap(),
            Vec::new(),
        );
        assert_eq!(attempt_limit(4, &request), 4);
        request.retries = 10;
        assert_eq!(attempt_limit(4, &request), 14);
        assert_eq!(attempt_limit(u32::MAX, &request), u32::MAX);
    }
}
