//! Workers that come, die, drain; Redis that is flushed or full of other things.

mod support;

use std::time::Duration;

use broker_schema::{ErrorCode, SandboxId, TaskId};
use remuda_lease::{Claim, Held, Offered, Renewal};
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
async fn keys_of_other_types_are_set_aside_and_everything_goes_on() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let task = TaskId::new();
    let keys = [
        "warm:py".to_owned(),
        "pools".to_owned(),
        "workers".to_owned(),
        "dead".to_owned(),
        "counter".to_owned(),
        "worker:w1".to_owned(),
        "held:w1".to_owned(),
        format!("task:{}:{task}", support::tenant()),
    ];
    for key in &keys {
        let key = format!("{{remuda}}:{key}");
        redis.command(&["DEL", &key]).await;
        redis.command(&["LPUSH", &key, "precious"]).await;
    }
    // Somebody else's, under no name of the fleet's: none of its business.
    redis.command(&["LPUSH", "{remuda}:mine", "x"]).await;
    redis.command(&["LPUSH", "other", "x"]).await;
    store.register(&record("w1", 1)).await.unwrap();
    let ids = offer(&store, "w1", 1).await;
    let (sandbox, attempt) = granted(store.claim(&request(task)).await.unwrap());
    assert_eq!((sandbox.sandbox, attempt), (ids[0], 1));
    assert!(store.reap().await.unwrap().is_empty());
    assert!(store.pools().await.unwrap().is_empty());
    assert_eq!(store.foreign_keys(), keys.len() as u64);
    for key in &keys {
        let aside = format!("{{remuda}}:foreign:{key}");
        let kept: String =
            redis::from_redis_value(redis.command(&["LINDEX", &aside, "0"]).await).unwrap();
        assert_eq!(kept, "precious", "{key}");
    }
    for key in ["{remuda}:mine", "other"] {
        let length: u64 = redis::from_redis_value(redis.command(&["LLEN", key]).await).unwrap();
        assert_eq!(length, 1, "{key}");
    }
}

#[tokio::test]
async fn an_incarnation_that_is_none_is_set_aside() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    for garbage in ["-5", "soon", ""] {
        redis
            .command(&["SET", "{remuda}:incarnation", garbage])
            .await;
        assert_eq!(store.incarnation().await.unwrap(), None, "{garbage:?}");
    }
    assert_eq!(store.install_incarnation(7).await.unwrap(), 7);
    assert_eq!(store.incarnation().await.unwrap(), Some(7));
}

#[tokio::test]
async fn results_that_are_not_kept_are_named_when_they_may_go() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let (tenant, run) = (support::tenant(), "r1".parse().unwrap());
    let (soon, later) = (TaskId::new(), TaskId::new());
    let hour = std::time::Duration::from_secs(3600);
    for (task, kept) in [
        (soon, std::time::Duration::ZERO),
        (soon, hour),
        (later, hour),
    ] {
        store.remove_later(&tenant, &run, task, kept).await.unwrap();
    }
    redis
        .command(&["ZADD", "{remuda}:removals", "1", "no/such", "1", "a b/c/d"])
        .await;
    let due = support::until("a removal that is due", async || {
        let due = store.due_removals(10).await.unwrap();
        (!due.is_empty()).then_some(due)
    })
    .await;
    assert_eq!(due.iter().map(|due| due.task).collect::<Vec<_>>(), [soon]);
    // Until they are gone they are named again.
    assert_eq!(store.due_removals(10).await.unwrap(), due);
    store.removed(&due).await.unwrap();
    assert_eq!(store.due_removals(10).await.unwrap(), []);
}

#[tokio::test]
async fn the_clock_of_redis_is_read() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    // The same machine: the same clock.
    assert!(store.clock_offset().await.unwrap().abs() < 1_000_000);
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

#[tokio::test]
async fn what_the_registry_holds_of_a_worker_can_be_asked() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    let ids = offer(&store, "w1", 3).await;
    let (leased, _) = granted(store.claim(&request(TaskId::new())).await.unwrap());
    let (given_up, _) = {
        let claim = request(TaskId::new());
        let granted = granted(store.claim(&claim).await.unwrap());
        let (sandbox, epoch) = (granted.0.sandbox, granted.0.epoch);
        assert!(store.unclaim(&claim, sandbox, epoch).await.unwrap());
        granted
    };
    // Not its own, and none at all.
    for id in [SandboxId::new().to_string(), "no uuid".to_owned()] {
        let key = "{remuda}:held:w1";
        redis.command(&["SADD", key, &id]).await;
    }
    let held = store.held(&worker("w1")).await.unwrap();
    let epoch = |sandbox: &broker_schema::SandboxRef, live| Held::Leased {
        epoch: sandbox.epoch,
        live,
    };
    assert_eq!(held.len(), 3);
    assert_eq!(held[&leased.sandbox], epoch(&leased, true));
    assert_eq!(held[&given_up.sandbox], epoch(&given_up, false));
    let idle = ids
        .iter()
        .find(|id| **id != leased.sandbox && **id != given_up.sandbox);
    assert_eq!(held[idle.unwrap()], Held::Warm { incarnation: 1 });
    assert!(store.held(&worker("w9")).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_worker_that_is_known_to_be_gone_is_reaped_at_once() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    offer(&store, "w1", 1).await;
    let long = Duration::from_secs(300);
    assert!(!store.declare_dead(&worker("w1"), long).await.unwrap());
    assert!(
        !store
            .declare_dead(&worker("w9"), Duration::ZERO)
            .await
            .unwrap()
    );
    assert!(store.reap().await.unwrap().is_empty());
    let none = Duration::ZERO;
    assert!(store.declare_dead(&worker("w1"), none).await.unwrap());
    assert_eq!(store.reap().await.unwrap(), [worker("w1")]);
    assert_eq!(store.warm_counts().await.unwrap()[&pool()], 0);
    // It was alive after all.
    store.heartbeat(&record("w1", 1)).await.unwrap();
    assert!(store.workers().await.unwrap()[0].alive);
}

#[tokio::test]
async fn a_worker_of_another_schema_version_is_refused_or_told_to_leave() {
    let redis = Redis::start();
    let store = fleet(&redis).await;
    assert_eq!(store.schemas().await.unwrap(), None);
    let ours = record("w1", 1);
    assert!(!store.heartbeat(&ours).await.unwrap().draining);
    for (range, mend) in [
        (ours.schema + 1..=9, "install a newer worker"),
        (0..=ours.schema - 1, "upgrade the dispatchers first"),
    ] {
        store.set_schemas(range.clone()).await.unwrap();
        assert_eq!(store.schemas().await.unwrap(), Some(range));
        let error = store.register(&record("w2", 1)).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::UnsupportedSchema);
        assert!(error.to_string().contains(mend), "{error}");
        let known = store.workers().await.unwrap();
        assert!(known.iter().all(|info| info.record.worker == worker("w1")));
        // One that is at work leaves in its own time.
        let reply = store.heartbeat(&ours).await.unwrap();
        assert!(reply.draining);
        store.set_draining(&worker("w1"), false).await.unwrap();
    }
    store.set_schemas(ours.schema..=ours.schema).await.unwrap();
    assert!(!store.heartbeat(&ours).await.unwrap().draining);
    store.register(&record("w2", 1)).await.unwrap();
}
