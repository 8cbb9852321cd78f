//! Who gets which sandbox, how often, and who is refused.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use broker_schema::TaskId;
use remuda_lease::{Claim, ClaimNonce, ClaimRequest};
use support::{Redis, fleet, granted, offer, request, tenant, until, worker};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_claimers_16_get_a_sandbox_each() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let offered: BTreeSet<_> = offer(&store, "w1", 16).await.into_iter().collect();
    let claims = (0..64).map(|_| {
        let (store, request) = (store.clone(), request(TaskId::new()));
        async move { store.claim(&request).await.unwrap() }
    });
    let mut got = Vec::new();
    let mut none = 0;
    for claim in futures::future::join_all(claims).await {
        match claim {
            Claim::Granted { sandbox, attempt } => {
                assert_eq!(attempt, 1);
                got.push(sandbox);
            }
            Claim::NoneWarm => none += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((got.len(), none), (16, 48));
    let sandboxes: BTreeSet<_> = got.iter().map(|s| s.sandbox).collect();
    assert_eq!(sandboxes, offered);
    let epochs: BTreeSet<_> = got.iter().map(|s| s.epoch).collect();
    assert_eq!(epochs.len(), 16, "an epoch was handed out twice");
}

#[tokio::test]
async fn attempts_are_counted_at_the_claim_and_epochs_only_grow() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 1).await;
    let task = TaskId::new();
    let mut last = None;
    for expected in 1..=4 {
        let request = request(task);
        let (sandbox, attempt) = granted(store.claim(&request).await.unwrap());
        assert_eq!(attempt, expected);
        assert!(
            last < Some(sandbox.epoch),
            "{last:?} then {:?}",
            sandbox.epoch
        );
        last = Some(sandbox.epoch);
        assert!(
            store
                .unclaim(&request, sandbox.sandbox, sandbox.epoch)
                .await
                .unwrap()
        );
        // The worker still has it idle and says so.
        store
            .offer(&worker("w1"), 1, &support::pool(), &ids)
            .await
            .unwrap();
    }
    assert_eq!(
        store.claim(&request(task)).await.unwrap(),
        Claim::Exhausted { attempts: 4 }
    );
    let other = granted(store.claim(&request(TaskId::new())).await.unwrap());
    assert!(Some(other.0.epoch) > last);
}

#[tokio::test]
async fn an_attempt_whose_placement_was_refused_does_not_count() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 1).await;
    let task = TaskId::new();
    for _ in 0..6 {
        let request = request(task);
        let (held, attempt) = granted(store.claim(&request).await.unwrap());
        assert_eq!(attempt, 1);
        let (sandbox, epoch) = (held.sandbox, held.epoch);
        let refused = store.unclaim_refused(&request, sandbox, epoch);
        assert!(refused.await.unwrap());
        // Said twice, it is given back once.
        let refused = store.unclaim_refused(&request, sandbox, epoch);
        assert!(refused.await.unwrap());
        store
            .offer(&worker("w1"), 1, &support::pool(), &ids)
            .await
            .unwrap();
    }
    // Another's claim stays as it is.
    let (stale, held) = (request(task), request(task));
    let (sandbox, attempt) = granted(store.claim(&held).await.unwrap());
    assert_eq!(attempt, 1);
    let refused = store.unclaim_refused(&stale, sandbox.sandbox, sandbox.epoch);
    assert!(!refused.await.unwrap());
    let again = store.claim(&held).await.unwrap();
    assert_eq!(granted(again), (sandbox, 1));
    assert!(store.was_claimed(&tenant(), task).await.unwrap());
}

#[tokio::test]
async fn a_nonce_gets_the_same_grant_and_another_waits() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 3).await;
    let first = request(TaskId::new());
    let grant = store.claim(&first).await.unwrap();
    assert_eq!(store.claim(&first).await.unwrap(), grant);
    let second = ClaimRequest {
        nonce: ClaimNonce::new(),
        ..first.clone()
    };
    match store.claim(&second).await.unwrap() {
        Claim::Busy { remaining } => {
            assert!(remaining > Duration::from_secs(500) && remaining <= store.ttl());
        }
        other => panic!("{other:?}"),
    }
    let counts = store.warm_counts().await.unwrap();
    assert_eq!(counts[&support::pool()], 2, "only one was taken");
}

#[tokio::test]
async fn a_lease_that_ran_out_is_claimed_anew_and_its_holder_loses() {
    let redis = Redis::start();
    let mut options = redis.options();
    options.ttl = Duration::from_secs(1);
    options.timeout = Duration::from_secs(1);
    let store = redis.store(&options).await;
    store.install_incarnation(1).await.unwrap();
    store.register(&support::record("w1", 1)).await.unwrap();
    offer(&store, "w1", 1).await;
    let task = TaskId::new();
    let (old, _) = granted(store.claim(&request(task)).await.unwrap());
    let (new, attempt) = until("the lease runs out", async || {
        store.heartbeat(&support::record("w1", 1)).await.unwrap();
        let fresh = broker_schema::SandboxId::new();
        store
            .offer(&worker("w1"), 1, &support::pool(), &[fresh])
            .await
            .unwrap();
        match store.claim(&request(task)).await.unwrap() {
            Claim::Granted { sandbox, attempt } => Some((sandbox, attempt)),
            Claim::Busy { .. } => None,
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert_eq!(attempt, 2);
    assert!(new.epoch > old.epoch && new.sandbox != old.sandbox);
    assert_eq!(
        store
            .renew(&worker("w1"), &[(old.sandbox, old.epoch)])
            .await
            .unwrap(),
        [remuda_lease::Renewal::Lost]
    );
}

#[tokio::test]
async fn an_id_with_other_content_is_a_conflict() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 2).await;
    let first = request(TaskId::new());
    granted(store.claim(&first).await.unwrap());
    let other = ClaimRequest {
        request_digest: "d2".into(),
        nonce: ClaimNonce::new(),
        ..first
    };
    assert_eq!(
        store.claim(&other).await.unwrap(),
        Claim::Conflict {
            first_digest: "d1".into()
        }
    );
}

#[tokio::test]
async fn a_finished_task_is_claimed_again_only_where_its_terminal_is_missing() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 2).await;
    let task = TaskId::new();
    let (sandbox, _) = granted(store.claim(&request(task)).await.unwrap());
    assert!(
        store
            .release(
                &worker("w1"),
                sandbox.sandbox,
                sandbox.epoch,
                Some((&tenant(), task))
            )
            .await
            .unwrap()
    );
    assert_eq!(store.claim(&request(task)).await.unwrap(), Claim::Finished);
    let again = ClaimRequest {
        again: true,
        ..request(task)
    };
    assert_eq!(granted(store.claim(&again).await.unwrap()).1, 2);
}
