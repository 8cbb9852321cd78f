//! Workers that come, die, drain; Redis that is flushed or full of other things.

mod support;

use std::time::Duration;

use broker_schema::{ErrorCode, SandboxId, TaskId};
use remuda_lease::{Claim, Offered, Renewal};
use support::{Redis, fleet, granted, offer, pool, record, request, until, worker};

#[tokio::test]
async fn a_heartbeat_brings_pools_and_targets() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let unknown = "nope".parse().unwrap();
    assert!(
        store
            .set_targets(&worker("w1"), &[(pool(), 3, 9), (unknown, 1, 1)])
            .await
            .unwrap()
    );
    let reply = store.heartbeat(&record("w1", 1)).await.unwrap();
    assert_eq!(reply.incarnation, Some(1));
    assert_eq!(reply.targets.len(), 1);
    assert_eq!((reply.targets[0].warm, reply.targets[0].max), (3, 9));
    assert_eq!(store.pools().await.unwrap().len(), 1);
    assert!(!store.set_targets(&worker("w9"), &[]).await.unwrap());
}

#[tokio::test]
async fn a_restart_grants_nothing_under_the_old_incarnation_and_keeps_leases() {
    let mut redis = Redis::start_kept();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 2).await;
    let (held, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    assert_eq!(store.incarnation().await.unwrap(), Some(1));
    redis.restart_kept();

    let found = until("redis answers again", async || {
        store.incarnation().await.ok()
    });
    assert_eq!(found.await, None);
    assert_eq!(
        store.claim(&request(TaskId::new())).await.unwrap(),
        Claim::NoIncarnation
    );
    assert_eq!(store.install_incarnation(1).await.unwrap(), 1);
    assert_eq!(
        store.incarnation().await.unwrap(),
        None,
        "it was in force before"
    );
    assert_eq!(store.install_incarnation(5).await.unwrap(), 5);
    assert_eq!(store.install_incarnation(6).await.unwrap(), 5);
    assert_eq!(store.incarnation().await.unwrap(), Some(5));

    let lease = [(held.sandbox, held.epoch)];
    assert_eq!(
        store.renew(&worker("w1"), &lease).await.unwrap(),
        [Renewal::Held { cancelled: None }],
        "what runs goes on"
    );
    let claim = async || store.claim(&request(TaskId::new())).await.unwrap();
    assert_eq!(claim().await, Claim::NoneWarm, "the old offers are void");
    store.register(&record("w1", 5)).await.unwrap();
    store.offer(&worker("w1"), 5, &pool(), &ids).await.unwrap();
    let (next, _) = granted(claim().await);
    assert!(next.epoch > held.epoch && next.sandbox != held.sandbox);
    assert_eq!(next.epoch.incarnation(), 5);
}

#[tokio::test]
async fn a_flush_begins_a_new_incarnation_and_old_offers_are_refused() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 2).await;
    let (held, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    redis.command(&["FLUSHALL"]).await;

    assert_eq!(store.incarnation().await.unwrap(), None);
    assert_eq!(
        store.claim(&request(TaskId::new())).await.unwrap(),
        Claim::NoIncarnation
    );
    let reply = store.heartbeat(&record("w1", 1)).await.unwrap();
    assert_eq!(reply.incarnation, None);
    assert_eq!(store.install_incarnation(2).await.unwrap(), 2);
    assert_eq!(
        store.install_incarnation(3).await.unwrap(),
        2,
        "the first stays"
    );

    let offered = store.offer(&worker("w1"), 1, &pool(), &ids).await.unwrap();
    assert_eq!(offered, Offered::StaleIncarnation { current: Some(2) });
    assert_eq!(
        store
            .renew(&worker("w1"), &[(held.sandbox, held.epoch)])
            .await
            .unwrap(),
        [Renewal::Lost]
    );
    let reply = store.heartbeat(&record("w1", 1)).await.unwrap();
    assert_eq!(reply.incarnation, Some(2));
    assert!(store.workers().await.unwrap().is_empty());
    assert_eq!(
        store.offer(&worker("w1"), 2, &pool(), &ids).await.unwrap(),
        Offered::Unregistered
    );
    store.heartbeat(&record("w1", 2)).await.unwrap();
    assert_eq!(
        store.offer(&worker("w1"), 2, &pool(), &ids).await.unwrap(),
        Offered::Taken { fresh: 2 }
    );
    let (new, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    assert!(new.epoch > held.epoch);
}

#[tokio::test]
async fn a_draining_workers_sandboxes_are_not_handed_out() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 2).await;
    assert!(store.set_draining(&worker("w1"), true).await.unwrap());
    assert_eq!(
        store.claim(&request(TaskId::new())).await.unwrap(),
        Claim::NoneWarm
    );
    assert!(store.heartbeat(&record("w1", 1)).await.unwrap().draining);
    assert!(!store.register(&record("w1", 1)).await.unwrap().draining);
}

#[tokio::test]
async fn a_dead_worker_is_told_of_with_nothing_of_it_left() {
    let redis = Redis::start();
    let mut options = redis.options();
    options.ttl = Duration::from_secs(1);
    options.timeout = Duration::from_secs(1);
    let store = redis.store(&options).await;
    store.install_incarnation(1).await.unwrap();
    store
        .set_pools(&[broker_schema::pool::PoolSpec::named(pool())])
        .await
        .unwrap();
    store.register(&record("w1", 1)).await.unwrap();
    offer(&store, "w1", 2).await;
    let task = TaskId::new();
    let (held, _) = granted(store.claim(&request(task)).await.unwrap());
    assert!(store.reap().await.unwrap().is_empty());
    until("the worker is thought dead", async || {
        let workers = store.workers().await.unwrap();
        (!workers[0].alive).then_some(())
    })
    .await;
    // Its warm sandbox is not handed out, not even before it is reaped.
    assert_eq!(
        store.claim(&request(TaskId::new())).await.unwrap(),
        Claim::NoneWarm
    );
    assert_eq!(store.reap().await.unwrap(), [worker("w1")]);
    assert!(
        store.reap().await.unwrap().is_empty(),
        "told again too soon"
    );
    assert!(store.workers().await.unwrap().is_empty());
    assert_eq!(store.warm_counts().await.unwrap()[&pool()], 0);
    // Back from the dead: alive again, its lease stays lost.
    store.heartbeat(&record("w1", 1)).await.unwrap();
    assert_eq!(
        store
            .renew(&worker("w1"), &[(held.sandbox, held.epoch)])
            .await
            .unwrap(),
        [Renewal::Lost]
    );
    // The task is free for another attempt at once.
    offer(&store, "w1", 1).await;
    assert_eq!(granted(store.claim(&request(task)).await.unwrap()).1, 2);
    store.bury(&worker("w1")).await.unwrap();
}

#[tokio::test]
async fn deregistering_takes_everything() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 2).await;
    store.deregister(&worker("w1")).await.unwrap();
    assert_eq!(store.warm_counts().await.unwrap()[&pool()], 0);
    assert!(store.workers().await.unwrap().is_empty());
    assert!(store.reap().await.unwrap().is_empty());
}

#[tokio::test]
async fn foreign_members_of_the_inventory_are_passed_over() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    for id in ["", "not-a-uuid", "\u{1F40E}"] {
        redis.command(&["ZADD", "{remuda}:warm:py", "0", id]).await;
    }
    redis
        .command(&["ZADD", "{remuda}:workers", "1", "no worker id"])
        .await;
    redis
        .command(&["HSET", "{remuda}:pools", "py", "not json", "b c", "{}"])
        .await;
    let ids = offer(&store, "w1", 1).await;
    let (sandbox, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    assert_eq!(sandbox.sandbox, ids[0]);
    assert_eq!(store.workers().await.unwrap().len(), 1);
    assert!(store.pools().await.unwrap().is_empty());
    assert!(store.heartbeat(&record("w1", 1)).await.is_ok());
}

#[tokio::test]
async fn keys_of_other_types_are_errors_that_say_so() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    for key in [
        "warm:py",
        "pools",
        "workers",
        "dead",
        "incarnation",
        "counter",
        "worker:w1",
    ] {
        let key = format!("{{remuda}}:{key}");
        redis.command(&["DEL", &key]).await;
        redis.command(&["LPUSH", &key, "x"]).await;
    }
    let codes = [
        store
            .claim(&request(TaskId::new()))
            .await
            .unwrap_err()
            .code(),
        store.heartbeat(&record("w1", 1)).await.unwrap_err().code(),
        store
            .offer(&worker("w1"), 1, &pool(), &[SandboxId::new()])
            .await
            .unwrap_err()
            .code(),
        store.reap().await.unwrap_err().code(),
        store.workers().await.unwrap_err().code(),
        store.pools().await.unwrap_err().code(),
        store.warm_counts().await.unwrap_err().code(),
        store.incarnation().await.unwrap_err().code(),
    ];
    assert_eq!(codes, [ErrorCode::Internal; 8]);
    redis.command(&["DEL", "{remuda}:incarnation"]).await;
    redis.command(&["SET", "{remuda}:incarnation", "-5"]).await;
    assert_eq!(
        store.incarnation().await.unwrap_err().code(),
        ErrorCode::Internal
    );
}

#[tokio::test]
async fn an_unsuitable_redis_is_told_of() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let warnings = store.suitability().await.unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("appendonly"));
    redis
        .command(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])
        .await;
    assert_eq!(store.suitability().await.unwrap().len(), 2);
}
