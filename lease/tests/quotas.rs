//! Quotas, groups and runs: counted where leases are made, freed however they end.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::time::Duration;

use broker_schema::{CancelCause, GroupId, RunId, TaskId};
use remuda_lease::{
    Cancelled, Claim, ClaimNonce, ClaimRequest, Finished, LeaseStore, PoolUse, Quota, QuotaKind,
    Renewal, TenantUse, Vote,
};
use support::{Redis, fleet, granted, offer, pool, record, request, tenant, until, worker};

fn run() -> RunId {
    "run".parse().unwrap()
}

fn group() -> GroupId {
    "g".parse().unwrap()
}

fn limited(quota: Quota) -> ClaimRequest {
    ClaimRequest {
        quota,
        ..request(TaskId::new())
    }
}

fn over(kind: QuotaKind, limit: u32, current: u32) -> Claim {
    Claim::OverQuota {
        kind,
        limit,
        current,
    }
}

async fn used(store: &LeaseStore) -> [u32; 3] {
    let TenantUse {
        sandboxes,
        running,
        sessions,
    } = store.tenant_use(&tenant()).await.unwrap();
    [sandboxes, running, sessions]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_claimers_as_many_as_the_quota_says_get_a_sandbox() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 32).await;
    let quota = Quota {
        sandboxes: Some(5),
        ..Quota::default()
    };
    let claims = (0..32).map(|_| {
        let (store, request) = (store.clone(), limited(quota));
        async move { store.claim(&request).await.unwrap() }
    });
    let answers = futures::future::join_all(claims).await;
    let got = answers
        .iter()
        .filter(|answer| matches!(answer, Claim::Granted { .. }))
        .count();
    assert_eq!(got, 5);
    let refused = over(QuotaKind::Sandboxes, 5, 5);
    assert_eq!(answers.iter().filter(|a| **a == refused).count(), 27);
    // Another tenant is not in the way.
    let other = ClaimRequest {
        tenant: "other".parse().unwrap(),
        ..limited(quota)
    };
    granted(store.claim(&other).await.unwrap());
    assert_eq!(used(&store).await, [5, 5, 0]);
    let pools = store.pool_use().await.unwrap();
    assert_eq!(
        pools[&pool()],
        PoolUse {
            warm: 26,
            leased: 6
        }
    );
}

#[tokio::test]
async fn every_way_that_a_lease_ends_frees_its_place() {
    let redis = Redis::start();
    let mut options = redis.options();
    options.ttl = Duration::from_millis(1500);
    options.timeout = Duration::from_secs(1);
    let store = redis.store(&options).await;
    store.install_incarnation(1).await.unwrap();
    let pools = [broker_schema::pool::PoolSpec::named(pool())];
    store.set_pools(&pools).await.unwrap();
    store.register(&record("w1", 1)).await.unwrap();
    let quota = Quota {
        sandboxes: Some(1),
        ..Quota::default()
    };
    let claim = async || {
        store.heartbeat(&record("w1", 1)).await.unwrap();
        offer(&store, "w1", 1).await;
        let claim = limited(quota);
        let sandbox = granted(store.claim(&claim).await.unwrap()).0;
        assert_eq!(used(&store).await, [1, 1, 0]);
        assert_eq!(
            store.claim(&limited(quota)).await.unwrap(),
            over(QuotaKind::Sandboxes, 1, 1)
        );
        (claim, sandbox)
    };
    // Released.
    let (request, held) = claim().await;
    let finished = Some((&request.tenant, request.task));
    assert!(
        store
            .release(&held.worker, held.sandbox, held.epoch, finished)
            .await
            .unwrap()
    );
    assert_eq!(used(&store).await, [0, 0, 0]);
    // Given back.
    let (request, held) = claim().await;
    assert!(
        store
            .unclaim(&request, held.sandbox, held.epoch)
            .await
            .unwrap()
    );
    assert_eq!(used(&store).await, [0, 0, 0]);
    // Run out.
    claim().await;
    until("the lease runs out", async || {
        (used(&store).await == [0, 0, 0]).then_some(())
    })
    .await;
    // Its worker left.
    claim().await;
    store.deregister(&worker("w1")).await.unwrap();
    assert_eq!(used(&store).await, [0, 0, 0]);
    // Its worker died.
    store.register(&record("w1", 1)).await.unwrap();
    let (_, held) = claim().await;
    until("the worker is reaped", async || {
        let lease = [(held.sandbox, held.epoch)];
        store.renew(&worker("w1"), &lease).await.unwrap();
        let reaped = store.reap().await.unwrap();
        reaped.contains(&worker("w1")).then_some(())
    })
    .await;
    assert_eq!(used(&store).await, [0, 0, 0]);
    let leased = store.pool_use().await.unwrap()[&pool()].leased;
    assert_eq!(leased, 0, "the pool's count leaks");
}

#[tokio::test]
async fn sessions_count_as_sandboxes_and_run_only_while_they_have_a_task() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 8).await;
    let quota = Quota {
        sandboxes: Some(3),
        running: Some(1),
        sessions: Some(1),
    };
    let opening = ClaimRequest {
        session: true,
        ..limited(quota)
    };
    let (session, _) = granted(store.claim(&opening).await.unwrap());
    assert_eq!(used(&store).await, [1, 1, 1]);
    assert_eq!(
        store.claim(&limited(quota)).await.unwrap(),
        over(QuotaKind::Running, 1, 1)
    );
    let (owner, lease) = (worker("w1"), [(session.sandbox, session.epoch)]);
    let done = (&opening.tenant, opening.task);
    assert!(
        store
            .keep(&owner, session.sandbox, session.epoch, done)
            .await
            .unwrap()
    );
    assert_eq!(used(&store).await, [1, 0, 1]);
    store.renew(&owner, &lease).await.unwrap();
    assert_eq!(used(&store).await, [1, 0, 1], "a renewal counts it anew");
    // The share of sessions is told before anything else.
    let second = ClaimRequest {
        session: true,
        nonce: ClaimNonce::new(),
        ..limited(quota)
    };
    assert_eq!(
        store.claim(&second).await.unwrap(),
        over(QuotaKind::Sessions, 1, 1)
    );
    // A session's next task runs, whatever the quota says.
    granted(store.claim(&limited(quota)).await.unwrap());
    let next = TaskId::new();
    store
        .assign(&session, &tenant(), &run(), next, None)
        .await
        .unwrap();
    assert_eq!(used(&store).await, [2, 2, 1]);
    let late = store.keep(&owner, session.sandbox, session.epoch, done);
    assert!(late.await.unwrap());
    assert_eq!(
        used(&store).await,
        [2, 2, 1],
        "the task before it ends once"
    );
    store.renew(&owner, &lease).await.unwrap();
    assert_eq!(used(&store).await, [2, 2, 1]);
    let released = store.release(&owner, session.sandbox, session.epoch, None);
    assert!(released.await.unwrap());
    assert_eq!(used(&store).await, [1, 1, 0]);
}

#[tokio::test]
async fn a_stopped_run_or_group_is_granted_nothing_and_renewals_tell() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 4).await;
    let in_group = || ClaimRequest {
        group: Some(group()),
        ..request(TaskId::new())
    };
    let (first, second) = (in_group(), request(TaskId::new()));
    let (one, _) = granted(store.claim(&first).await.unwrap());
    let (two, _) = granted(store.claim(&second).await.unwrap());
    let leases = [(one.sandbox, one.epoch), (two.sandbox, two.epoch)];
    let renewed = async || store.renew(&worker("w1"), &leases).await.unwrap();
    let held = |task, cause| Renewal::Held {
        cancelled: Some(Cancelled { task, cause }),
    };
    let well = Renewal::Held { cancelled: None };
    assert_eq!(renewed().await, [well, well]);
    let cause = CancelCause::Group;
    store
        .stop(&tenant(), &run(), Some(&group()), cause)
        .await
        .unwrap();
    assert_eq!(renewed().await, [held(Some(first.task), cause), well]);
    assert_eq!(
        store.claim(&in_group()).await.unwrap(),
        Claim::Cancelled { cause }
    );
    // The same name in another run is another group.
    let elsewhere = ClaimRequest {
        run: "run2".parse().unwrap(),
        ..in_group()
    };
    granted(store.claim(&elsewhere).await.unwrap());
    let cause = CancelCause::Run;
    store.stop(&tenant(), &run(), None, cause).await.unwrap();
    assert_eq!(renewed().await[1], held(Some(second.task), cause));
    // A session that waits is told of too.
    let done = (&tenant(), second.task);
    store
        .keep(&worker("w1"), two.sandbox, two.epoch, done)
        .await
        .unwrap();
    assert_eq!(renewed().await[1], held(None, cause));
}

#[tokio::test]
async fn a_group_has_enough_once_however_often_a_result_is_told() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 4).await;
    let (tenant, run, group) = (tenant(), run(), group());
    let vote = Vote {
        run: &run,
        group: &group,
        min_valid: 2,
    };
    let in_group = || ClaimRequest {
        group: Some(group.clone()),
        ..request(TaskId::new())
    };
    let first = in_group();
    let (lease, _) = granted(store.claim(&first).await.unwrap());
    let finished = Finished {
        tenant: &tenant,
        task: first.task,
        vote: Some(vote),
    };
    let finish = async || {
        store
            .finish(
                &lease.worker,
                lease.sandbox,
                lease.epoch,
                Some(&finished),
                false,
            )
            .await
            .unwrap()
    };
    let done = finish().await;
    assert!(done.held && !done.enough);
    assert!(!finish().await.enough, "one task counted twice");
    assert!(!store.vote(&tenant, first.task, vote).await.unwrap());
    let second = TaskId::new();
    assert!(store.vote(&tenant, second, vote).await.unwrap());
    assert!(
        !store.vote(&tenant, second, vote).await.unwrap(),
        "told once"
    );
    let cause = CancelCause::Enough { valid: 2 };
    assert_eq!(
        store.claim(&in_group()).await.unwrap(),
        Claim::Cancelled { cause }
    );
    granted(store.claim(&request(TaskId::new())).await.unwrap());
}
