//! Renewals, releases, sessions and cancellation.

mod support;

use broker_schema::{CancelCause, Epoch, TaskId};
use remuda_lease::{CancelState, Cancelled, Claim, Renewal};
use support::{Redis, fleet, granted, offer, pool, record, request, tenant, worker};

#[tokio::test]
async fn only_the_owner_with_the_epoch_renews_and_releases() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    store.register(&record("w2", 1)).await.unwrap();
    offer(&store, "w1", 1).await;
    let task = TaskId::new();
    let (held, _) = granted(store.claim(&request(task)).await.unwrap());
    let stale = Epoch::new(1, held.epoch.counter() + 1);
    let lease = [(held.sandbox, held.epoch)];
    let lost = [Renewal::Lost];
    let other = Epoch::new(2, held.epoch.counter());
    for (name, epoch) in [("w2", held.epoch), ("w1", stale), ("w1", other)] {
        let lease = [(held.sandbox, epoch)];
        let renewed = store.renew(&worker(name), &lease).await;
        assert_eq!(renewed.unwrap(), lost, "{name} {epoch}");
    }
    let finished = Some((&tenant(), task));
    for (name, epoch) in [("w2", held.epoch), ("w1", stale)] {
        let released = store
            .release(&worker(name), held.sandbox, epoch, None)
            .await;
        assert!(!released.unwrap(), "{name} {epoch}");
    }
    let held_still = [Renewal::Held { cancelled: None }];
    assert_eq!(
        store.renew(&worker("w1"), &lease).await.unwrap(),
        held_still
    );
    let release = async || {
        store
            .release(&worker("w1"), held.sandbox, held.epoch, finished)
            .await
            .unwrap()
    };
    assert!(release().await);
    assert!(!release().await, "a second release finds nothing");
    assert_eq!(store.renew(&worker("w1"), &lease).await.unwrap(), lost);
}

#[tokio::test]
async fn a_cancellation_reaches_the_claim_and_the_renewal() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 1).await;
    let queued = TaskId::new();
    assert_eq!(
        store.cancel(&tenant(), queued).await.unwrap(),
        CancelState::Unplaced
    );
    assert_eq!(
        store.claim(&request(queued)).await.unwrap(),
        Claim::Cancelled {
            cause: CancelCause::Asked
        }
    );

    let task = TaskId::new();
    let (held, _) = granted(store.claim(&request(task)).await.unwrap());
    assert_eq!(
        store.cancel(&tenant(), task).await.unwrap(),
        CancelState::Placed {
            sandbox: held.clone()
        }
    );
    assert_eq!(
        store
            .renew(&worker("w1"), &[(held.sandbox, held.epoch)])
            .await
            .unwrap(),
        [Renewal::Held {
            cancelled: Some(Cancelled {
                task: Some(task),
                cause: CancelCause::Asked
            })
        }]
    );
    let finished = Some((&tenant(), task));
    store
        .release(&worker("w1"), held.sandbox, held.epoch, finished)
        .await
        .unwrap();
    assert_eq!(
        store.cancel(&tenant(), task).await.unwrap(),
        CancelState::Finished
    );
}

#[tokio::test]
async fn a_session_keeps_its_lease_and_its_tasks_can_be_cancelled() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 1).await;
    let opener = TaskId::new();
    let (held, _) = granted(store.claim(&request(opener)).await.unwrap());
    let owner = worker("w1");
    assert!(
        store
            .keep(&owner, held.sandbox, held.epoch, (&tenant(), opener))
            .await
            .unwrap()
    );
    assert_eq!(store.leases().await.unwrap()[0].task, None);

    let (next, run) = (TaskId::new(), "run".parse().unwrap());
    assert_eq!(
        store
            .assign(&held, &tenant(), &run, next, None)
            .await
            .unwrap(),
        Renewal::Held { cancelled: None }
    );
    // The mark of the one before it comes late, and once more: it is not meant.
    for late in [opener, TaskId::new()] {
        let late = (&tenant(), late);
        let marked = store.keep(&owner, held.sandbox, held.epoch, late).await;
        assert!(marked.unwrap());
        let leases = store.leases().await.unwrap();
        assert_eq!(leases.len(), 1);
        assert_eq!((leases[0].task, &leases[0].sandbox), (Some(next), &held));
    }
    store.cancel(&tenant(), next).await.unwrap();
    assert_eq!(
        store
            .renew(&owner, &[(held.sandbox, held.epoch)])
            .await
            .unwrap(),
        [Renewal::Held {
            cancelled: Some(Cancelled {
                task: Some(next),
                cause: CancelCause::Asked
            })
        }]
    );
    store
        .release(&owner, held.sandbox, held.epoch, Some((&tenant(), next)))
        .await
        .unwrap();
    assert_eq!(
        store
            .assign(&held, &tenant(), &run, next, None)
            .await
            .unwrap(),
        Renewal::Lost
    );
}

#[tokio::test]
async fn a_leased_sandbox_cannot_be_withdrawn_and_a_warm_one_goes_once() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 2).await;
    let (held, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    let idle = ids.into_iter().find(|id| *id != held.sandbox).unwrap();
    assert!(!store.withdraw(&worker("w1"), held.sandbox).await.unwrap());
    assert!(store.withdraw(&worker("w1"), idle).await.unwrap());
    assert_eq!(
        store.claim(&request(TaskId::new())).await.unwrap(),
        Claim::NoneWarm
    );
}

#[tokio::test]
async fn a_redis_without_room_grants_nothing_and_loses_nothing() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 2).await;
    let task = TaskId::new();
    let (held, _) = granted(store.claim(&request(task)).await.unwrap());
    let lease = [(held.sandbox, held.epoch)];
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;

    let refused = store.claim(&request(TaskId::new())).await.unwrap_err();
    assert!(format!("{refused:?}").contains("maxmemory"), "{refused:?}");
    // Wholly: the sandbox that it would have got is where it was.
    assert_eq!(store.warm_counts().await.unwrap()[&pool()], 1);
    assert_eq!(
        store.renew(&worker("w1"), &lease).await.unwrap(),
        [Renewal::Held { cancelled: None }]
    );
    store.heartbeat(&record("w1", 1)).await.unwrap();
    let released = store
        .release(&worker("w1"), held.sandbox, held.epoch, None)
        .await;
    assert!(released.unwrap());

    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    granted(store.claim(&request(TaskId::new())).await.unwrap());
}
