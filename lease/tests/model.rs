//! The claim protocol against a model of it in plain Rust: random operations on the real scripts
//! must answer as the model does, and epochs must only ever grow.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::collections::BTreeMap;

use broker_schema::{CancelCause, Epoch, SandboxId, SandboxRef, TaskId};
use proptest::prelude::*;
use remuda_lease::{
    CancelState, Cancelled, Claim, ClaimNonce, ClaimRequest, LeaseStore, Offered, Renewal,
};
use support::{Redis, pool, record, request, tenant, worker};

const WORKERS: [&str; 2] = ["w1", "w2"];
const SANDBOXES: usize = 3;
const TASKS: usize = 3;
const MOST: u32 = 4;

#[derive(Debug, Clone, Copy)]
enum Op {
    Register(usize),
    Deregister(usize),
    Offer(usize, usize),
    Withdraw(usize, usize),
    /// Task, whether with other content, whether under the nonce of its last grant.
    Claim(usize, bool, bool),
    /// Task, whether its placement was refused.
    Unclaim(usize, bool),
    Release(usize),
    Renew(usize),
    Cancel(usize),
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    let (w, s, t) = (0..WORKERS.len(), 0..SANDBOXES, 0..TASKS);
    prop_oneof![
        2 => w.clone().prop_map(Op::Register),
        1 => w.clone().prop_map(Op::Deregister),
        6 => (w.clone(), s.clone()).prop_map(|(w, s)| Op::Offer(w, s)),
        1 => (w, s).prop_map(|(w, s)| Op::Withdraw(w, s)),
        8 => (t.clone(), prop::bool::weighted(0.1), prop::bool::weighted(0.3))
            .prop_map(|(t, other, again)| Op::Claim(t, other, again)),
        2 => (t.clone(), any::<bool>()).prop_map(|(t, refused)| Op::Unclaim(t, refused)),
        2 => t.clone().prop_map(Op::Release),
        3 => t.clone().prop_map(Op::Renew),
        1 => t.prop_map(Op::Cancel),
        1 => Just(Op::Flush),
    ]
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Warm,
    Leased { epoch: Epoch, live: bool },
}

#[derive(Debug, Default)]
struct Task {
    digest: Option<String>,
    attempts: u32,
    cancelled: bool,
    finished: bool,
    claim: Option<(SandboxId, Epoch, ClaimNonce)>,
}

#[derive(Debug, Default)]
struct Model {
    incarnation: u32,
    registered: [bool; 2],
    sandboxes: BTreeMap<SandboxId, (usize, State)>,
    tasks: [Task; TASKS],
}

/// What outlives a flush: ids, and what was last granted to each task.
struct World {
    store: LeaseStore,
    model: Model,
    ids: [[SandboxId; SANDBOXES]; 2],
    tasks: [TaskId; TASKS],
    granted: [Option<(SandboxRef, ClaimRequest)>; TASKS],
    last_epoch: Option<Epoch>,
}

impl World {
    async fn new(store: LeaseStore) -> Self {
        let mut world = Self {
            store,
            model: Model::default(),
            ids: std::array::from_fn(|_| std::array::from_fn(|_| SandboxId::new())),
            tasks: std::array::from_fn(|_| TaskId::new()),
            granted: [None, None, None],
            last_epoch: None,
        };
        world.begin(1).await;
        world
    }

    async fn begin(&mut self, incarnation: u32) {
        assert_eq!(
            self.store.install_incarnation(incarnation).await.unwrap(),
            incarnation
        );
        self.model = Model {
            incarnation,
            ..Model::default()
        };
    }

    fn leased(&self, sandbox: SandboxId, epoch: Epoch) -> bool {
        let state = State::Leased { epoch, live: true };
        self.model
            .sandboxes
            .get(&sandbox)
            .is_some_and(|(_, is)| *is == state)
    }

    async fn apply(&mut self, redis: &Redis, op: Op) {
        let incarnation = self.model.incarnation;
        match op {
            Op::Register(w) => {
                let reply = self.store.register(&record(WORKERS[w], incarnation)).await;
                assert_eq!(reply.unwrap().incarnation, Some(incarnation));
                self.model.registered[w] = true;
            }
            Op::Deregister(w) => {
                self.store.deregister(&worker(WORKERS[w])).await.unwrap();
                self.model.registered[w] = false;
                self.model.sandboxes.retain(|_, (owner, _)| *owner != w);
            }
            Op::Offer(w, s) => {
                let id = self.ids[w][s];
                let expected = if self.model.registered[w] {
                    let busy = matches!(
                        self.model.sandboxes.get(&id),
                        Some((_, State::Warm | State::Leased { live: true, .. }))
                    );
                    if !busy {
                        self.model.sandboxes.insert(id, (w, State::Warm));
                    }
                    Offered::Taken {
                        fresh: u32::from(!busy),
                    }
                } else {
                    Offered::Unregistered
                };
                let owner = worker(WORKERS[w]);
                let offered = self.store.offer(&owner, incarnation, &pool(), &[id]).await;
                assert_eq!(offered.unwrap(), expected);
            }
            Op::Withdraw(w, s) => {
                let id = self.ids[w][s];
                let leased = matches!(
                    self.model.sandboxes.get(&id),
                    Some((_, State::Leased { live: true, .. }))
                );
                let gone = self.store.withdraw(&worker(WORKERS[w]), id).await.unwrap();
                assert_eq!(gone, !leased);
                if gone {
                    self.model.sandboxes.remove(&id);
                }
            }
            Op::Claim(t, other, again) => self.claim(t, other, again).await,
            Op::Unclaim(t, refused) => {
                let Some((sandbox, request)) = self.granted[t].clone() else {
                    return;
                };
                let held = matches!(
                    self.model.sandboxes.get(&sandbox.sandbox),
                    Some((_, State::Leased { epoch, .. })) if *epoch == sandbox.epoch
                );
                let (id, epoch) = (sandbox.sandbox, sandbox.epoch);
                let done = if refused {
                    self.store.unclaim_refused(&request, id, epoch).await
                } else {
                    self.store.unclaim(&request, id, epoch).await
                };
                assert_eq!(done.unwrap(), held);
                if held {
                    let entry = self.model.sandboxes.get_mut(&id).unwrap();
                    entry.1 = State::Leased { epoch, live: false };
                    let task = &mut self.model.tasks[t];
                    let claim = task.claim.take();
                    task.attempts -= u32::from(refused && claim.is_some());
                }
            }
            Op::Release(t) => {
                let Some((sandbox, _)) = self.granted[t].clone() else {
                    return;
                };
                let held = matches!(
                    self.model.sandboxes.get(&sandbox.sandbox),
                    Some((_, State::Leased { epoch, .. })) if *epoch == sandbox.epoch
                );
                let finished = Some((&tenant(), self.tasks[t]));
                let released = self
                    .store
                    .release(&sandbox.worker, sandbox.sandbox, sandbox.epoch, finished)
                    .await;
                assert_eq!(released.unwrap(), held);
                if held {
                    self.model.sandboxes.remove(&sandbox.sandbox);
                }
                let task = &mut self.model.tasks[t];
                if task
                    .claim
                    .is_some_and(|(_, epoch, _)| epoch == sandbox.epoch)
                {
                    task.claim = None;
                    task.finished = true;
                    task.cancelled = false;
                }
            }
            Op::Renew(t) => {
                let Some((sandbox, _)) = self.granted[t].clone() else {
                    return;
                };
                let lease = [(sandbox.sandbox, sandbox.epoch)];
                let renewed = self.store.renew(&sandbox.worker, &lease).await;
                let expected = if self.leased(sandbox.sandbox, sandbox.epoch) {
                    let cancelled = self.model.tasks[t].cancelled.then_some(Cancelled {
                        task: Some(self.tasks[t]),
                        cause: CancelCause::Asked,
                    });
                    Renewal::Held { cancelled }
                } else {
                    Renewal::Lost
                };
                assert_eq!(renewed.unwrap(), [expected]);
            }
            Op::Cancel(t) => {
                let state = self.store.cancel(&tenant(), self.tasks[t]).await.unwrap();
                let live = self.model.tasks[t]
                    .claim
                    .filter(|(sandbox, epoch, _)| self.leased(*sandbox, *epoch));
                let task = &mut self.model.tasks[t];
                match state {
                    CancelState::Finished => assert!(task.finished),
                    CancelState::Placed { sandbox } => {
                        assert_eq!(live.map(|(_, epoch, _)| epoch), Some(sandbox.epoch));
                    }
                    CancelState::Unplaced => assert!(live.is_none() && !task.finished),
                }
                task.cancelled |= !task.finished;
            }
            Op::Flush => {
                redis.command(&["FLUSHALL"]).await;
                let claim = self.store.claim(&request(self.tasks[0])).await.unwrap();
                assert_eq!(claim, Claim::NoIncarnation);
                self.begin(incarnation + 1).await;
            }
        }
    }

    async fn claim(&mut self, t: usize, other: bool, again: bool) {
        let mut request = request(self.tasks[t]);
        if other {
            request.request_digest = "d2".into();
        }
        if let Some((_, last)) = self.granted[t].as_ref().filter(|_| again) {
            request.nonce = last.nonce;
        }
        let answer = self.store.claim(&request).await.unwrap();
        let live = self.model.tasks[t]
            .claim
            .filter(|(sandbox, epoch, _)| self.leased(*sandbox, *epoch));
        let task = &self.model.tasks[t];
        let warm: Vec<SandboxId> = self
            .model
            .sandboxes
            .iter()
            .filter(|(_, (_, state))| *state == State::Warm)
            .map(|(id, _)| *id)
            .collect();
        if task
            .digest
            .as_ref()
            .is_some_and(|d| *d != request.request_digest)
        {
            assert!(matches!(answer, Claim::Conflict { .. }), "{answer:?}");
        } else if task.cancelled {
            let cause = CancelCause::Asked;
            assert_eq!(answer, Claim::Cancelled { cause });
        } else if task.finished {
            assert_eq!(answer, Claim::Finished);
        } else if let Some((sandbox, epoch, nonce)) = live {
            if nonce == request.nonce {
                let (same, attempt) = support::granted(answer);
                assert_eq!(
                    (same.sandbox, same.epoch, attempt),
                    (sandbox, epoch, task.attempts)
                );
            } else {
                assert!(matches!(answer, Claim::Busy { .. }), "{answer:?}");
            }
        } else if task.attempts >= MOST {
            let attempts = task.attempts;
            assert_eq!(answer, Claim::Exhausted { attempts });
        } else if warm.is_empty() {
            assert_eq!(answer, Claim::NoneWarm);
        } else {
            let (sandbox, attempt) = support::granted(answer);
            assert!(warm.contains(&sandbox.sandbox), "it was not warm");
            assert_eq!(attempt, task.attempts + 1);
            assert!(
                self.last_epoch < Some(sandbox.epoch),
                "an epoch did not grow"
            );
            assert_eq!(sandbox.epoch.incarnation(), self.model.incarnation);
            self.last_epoch = Some(sandbox.epoch);
            let entry = self.model.sandboxes.get_mut(&sandbox.sandbox).unwrap();
            assert_eq!(WORKERS[entry.0], sandbox.worker.as_str());
            entry.1 = State::Leased {
                epoch: sandbox.epoch,
                live: true,
            };
            let task = &mut self.model.tasks[t];
            task.digest = Some(request.request_digest.clone());
            task.attempts = attempt;
            task.claim = Some((sandbox.sandbox, sandbox.epoch, request.nonce));
            self.granted[t] = Some((sandbox, request));
        }
    }
}

#[test]
fn the_scripts_do_what_the_model_does() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let redis = Redis::start();
    let store = runtime.block_on(redis.store(&redis.options()));
    let config = ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(ops in prop::collection::vec(op(), 1..80))| {
        runtime.block_on(async {
            redis.command(&["FLUSHALL"]).await;
            let mut world = World::new(store.clone()).await;
            for op in ops {
                world.apply(&redis, op).await;
            }
        });
    });
}
