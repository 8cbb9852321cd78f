//! The dispatcher between a real nats-server and a real Redis.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::{
    CancelRequest, ErrorCode, HEADER_DIGEST, Outcome, Placement, SandboxId, SandboxRef, TaskId,
    TaskRequest, Timestamp,
};
use remuda_client::broker::Outgoing;
use support::{FakeWorker, Fleet, task, until};

/// What a case does to a good request.
type Change = fn(&mut serde_json::Value);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_waits_for_an_offer_and_is_placed_under_its_epoch() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let task = task();
    fleet.submit(&task).await;
    let offered = worker.offer(&fleet, 1).await;
    let (placement, delivery) = worker.placement(&fleet).await;
    let payload = codec::encode(&task, Format::MessagePack).unwrap();
    assert_eq!(placement.request_digest, sha256_hex(&payload));
    assert_eq!((placement.attempt, placement.task), (1, task.clone()));
    assert_eq!(placement.sandbox.sandbox, offered[0]);
    let epoch = placement.sandbox.epoch;
    assert_eq!(
        (epoch.incarnation(), epoch.counter()),
        (worker.incarnation, 1)
    );
    delivery.ack().await.unwrap();
    fleet.requests_settled().await;
    // The registry gave the worker its share.
    until("targets", async || {
        let store = &fleet.lease;
        let info = store.workers().await.unwrap().pop()?;
        let targets = store.heartbeat(&info.record).await.unwrap().targets;
        (targets.len() == 1 && targets[0].warm == 4).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_is_answered_with_its_code() {
    let fleet = Fleet::start().await;
    let cases: [(&str, Change, ErrorCode); 8] = [
        (
            "nope",
            |v| v["pool"] = "nope".into(),
            ErrorCode::UnknownPool,
        ),
        (
            "py",
            |v| v["pool"] = "other".into(),
            ErrorCode::SubjectMismatch,
        ),
        (
            "py",
            |v| v["tenant"] = "evil".into(),
            ErrorCode::SubjectMismatch,
        ),
        (
            "py",
            |v| v["timeout_ms"] = 0.into(),
            ErrorCode::InvalidTimeout,
        ),
        (
            "py",
            |v| v["steps"] = serde_json::json!([]),
            ErrorCode::InvalidField,
        ),
        (
            "py",
            |v| v["steps"][0]["action"] = serde_json::json!({"fly": {}}),
            ErrorCode::UnknownStepType,
        ),
        (
            "py",
            |v| v["steps"][0]["action"]["command"]["argv"][0] = "a\0".into(),
            ErrorCode::NulByte,
        ),
        (
            "py",
            |v| v["steps"][0]["action"]["command"]["argv"] = serde_json::json!([]),
            ErrorCode::EmptyArgv,
        ),
    ];
    for (pool, change, code) in cases {
        let task = task();
        let mut value = serde_json::to_value(&task).unwrap();
        change(&mut value);
        let subject = format!("remuda.req.acme.{pool}");
        let payload = serde_json::to_vec(&value).unwrap();
        let digest = sha256_hex(&payload);
        fleet
            .publish(&subject, Some(task.message_id()), Format::Json, payload)
            .await;
        let terminal = fleet.terminal("r1", task.id).await;
        let error = terminal.error.unwrap();
        assert_eq!(
            (terminal.outcome, error.code),
            (Outcome::Rejected, code),
            "{error}"
        );
        assert_eq!((terminal.request_digest, terminal.attempt), (digest, 0));
        if code == ErrorCode::UnknownPool {
            assert!(error.message.contains("py"), "{error}");
        }
    }
    // Garbage with an id is answered; without one it goes to the dead letters.
    let id = TaskId::new();
    let message_id = Some(format!("acme/{id}"));
    let subject = "remuda.req.acme.py";
    fleet
        .publish(
            subject,
            message_id,
            Format::MessagePack,
            b"\xc1garbage".to_vec(),
        )
        .await;
    let terminal = fleet.terminal("unknown", id).await;
    assert_eq!(terminal.error.unwrap().code, ErrorCode::UnparsablePayload);
    fleet
        .publish(subject, None, Format::MessagePack, b"\xc1garbage".to_vec())
        .await;
    fleet.requests_settled().await;
    let letters = &fleet.broker.streams().dead_letters;
    assert_eq!(fleet.stored(letters, "remuda.dlq.>").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_workers_tasks_are_placed_again_and_its_sessions_end() {
    let fleet = Fleet::start().await;
    let mut first = FakeWorker::join(&fleet, "w1").await;
    first.offer(&fleet, 1).await;
    let one_shot = task();
    fleet.submit(&one_shot).await;
    // Fetched and never acknowledged: the worker dies with it.
    let (placement, _delivery) = first.placement(&fleet).await;
    assert_eq!(placement.attempt, 1);
    let mut session = task();
    session.session = Some(placement.sandbox.clone());
    publish_straight(&fleet, &session, &placement.sandbox).await;
    drop(first);

    let mut second = FakeWorker::join(&fleet, "w2").await;
    let (again, delivery) = loop {
        second.offer(&fleet, 1).await;
        let (placement, delivery) = second.placement(&fleet).await;
        if placement.task.id == one_shot.id {
            break (placement, delivery);
        }
    };
    assert_eq!((again.attempt, &again.task), (2, &one_shot));
    assert_eq!(again.request_digest, placement.request_digest);
    assert!(again.sandbox.epoch > placement.sandbox.epoch);
    delivery.ack().await.unwrap();
    let terminal = fleet.terminal("r1", session.id).await;
    assert_eq!(terminal.outcome, Outcome::SandboxLost);
    // A worker that nobody ever knew.
    let mut lost = task();
    let nobody = SandboxRef {
        sandbox: SandboxId::new(),
        worker: "nobody".parse().unwrap(),
        epoch: placement.sandbox.epoch,
    };
    lost.session = Some(nobody.clone());
    publish_straight(&fleet, &lost, &nobody).await;
    let terminal = fleet.terminal("r1", lost.id).await;
    assert_eq!(terminal.outcome, Outcome::SandboxLost);
}

async fn publish_straight(fleet: &Fleet, task: &TaskRequest, sandbox: &SandboxRef) {
    let placement = Placement {
        task: task.clone(),
        request_digest: sha256_hex(&codec::encode(task, Format::MessagePack).unwrap()),
        attempt: 1,
        sandbox: sandbox.clone(),
        dispatched_at: Timestamp::now(),
    };
    let subjects = fleet.broker.subjects();
    let outgoing = Outgoing {
        subject: subjects.placement(&sandbox.worker, &task.tenant, sandbox.sandbox),
        message_id: Some(placement.message_id()),
        payload: codec::encode(&placement, Format::MessagePack)
            .unwrap()
            .into(),
        ..Outgoing::default()
    };
    let patience = std::time::Duration::from_secs(10);
    fleet.broker.publish(outgoing, patience).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queued_tasks_are_cancelled_and_expire() {
    let fleet = Fleet::start().await;
    let cancelled = task();
    fleet.submit(&cancelled).await;
    let run = Some(cancelled.run.clone());
    let request = CancelRequest::task(cancelled.tenant.clone(), cancelled.id, run);
    let payload = serde_json::to_vec(&request).unwrap();
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Content-Type", "application/json");
    let reply = fleet
        .broker
        .nats()
        .request_with_headers("remuda.cancel.acme", headers, payload.into())
        .await
        .unwrap();
    let reply: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
    assert_eq!(reply["state"], "cancelled", "{reply}");
    let terminal = fleet.terminal("r1", cancelled.id).await;
    assert_eq!(terminal.outcome, Outcome::Cancelled);

    let mut expiring = task();
    expiring.deadline = Some(Timestamp::now().plus(std::time::Duration::from_millis(300)));
    fleet.submit(&expiring).await;
    let terminal = fleet.terminal("r1", expiring.id).await;
    assert_eq!(terminal.outcome, Outcome::Expired);
    fleet.requests_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_is_dropped_and_an_id_with_other_content_is_dead_lettered() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let mut cancelled = task();
    let first = cancelled.id;
    worker.offer(&fleet, 2).await;
    fleet.submit(&cancelled).await;
    let (placement, delivery) = worker.placement(&fleet).await;
    delivery.ack().await.unwrap();
    assert_eq!(placement.task.id, first);
    // The same id, other content, and a message id that the server has not seen.
    cancelled.timeout_ms = Some(1234);
    let payload = codec::encode(&cancelled, Format::MessagePack).unwrap();
    fleet
        .publish("remuda.req.acme.py", None, Format::MessagePack, payload)
        .await;
    fleet.requests_settled().await;
    let letters = &fleet.broker.streams().dead_letters;
    assert_eq!(fleet.stored(letters, "remuda.dlq.acme.py").await, 1);
    let placements = &fleet.broker.streams().placements;
    assert_eq!(fleet.stored(placements, "remuda.run.>").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_redis_gets_a_new_incarnation_and_a_stop_gives_requests_back() {
    let mut fleet = Fleet::start().await;
    let before = fleet.lease.incarnation().await.unwrap().unwrap();
    fleet.flush_redis().await;
    let after = until("a new incarnation", async || {
        fleet.lease.incarnation().await.unwrap()
    })
    .await;
    assert!(after > before);
    until("the pools are back", async || {
        (fleet.lease.pools().await.unwrap().len() == 1).then_some(())
    })
    .await;
    let waiting = task();
    fleet.submit(&waiting).await;
    fleet.stop_dispatcher().await;
    assert!(!fleet.readiness.is_ready());
    let requests = &fleet.broker.streams().requests;
    assert_eq!(fleet.stored(requests, "remuda.req.>").await, 1);
    // The next one takes it at once, not after the ack wait.
    fleet.start_dispatcher().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    worker.offer(&fleet, 1).await;
    let (placement, _) = worker.placement(&fleet).await;
    assert_eq!(placement.task.id, waiting.id);
    assert_eq!(placement.sandbox.epoch.incarnation(), after);
}

/// What a worker does with a task that it cannot end.
async fn hand_back(fleet: &Fleet, placement: &Placement) {
    let task = &placement.task;
    let returned = Outgoing {
        subject: fleet.broker.subjects().request(&task.tenant, &task.pool),
        message_id: Some(placement.retry_id()),
        payload: codec::encode(task, Format::MessagePack).unwrap().into(),
        headers: vec![(HEADER_DIGEST, placement.request_digest.clone())],
        ..Outgoing::default()
    };
    let patience = Duration::from_secs(10);
    let stored = fleet.broker.publish(returned, patience).await.unwrap();
    assert!(!stored.duplicate, "it was queued again before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_is_counted_again_is_placed_and_goes_back_like_the_first() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let twice = task();
    worker.offer(&fleet, 1).await;
    fleet.submit(&twice).await;
    let (first, delivery) = worker.placement(&fleet).await;
    assert_eq!((first.task.id, first.attempt), (twice.id, 1));
    fleet.flush_redis().await;
    let before = worker.incarnation;
    until("a new incarnation", async || {
        let now = fleet.lease.incarnation().await.unwrap();
        now.filter(|now| *now > before)
    })
    .await;
    until("the pools are back", async || {
        (fleet.lease.pools().await.unwrap().len() == 1).then_some(())
    })
    .await;
    worker = FakeWorker::join(&fleet, "w1").await;
    hand_back(&fleet, &first).await;
    delivery.ack().await.unwrap();
    // The server remembers the ids of the first attempt 1: they are not those of this one.
    worker.offer(&fleet, 1).await;
    let (again, delivery) = worker.placement(&fleet).await;
    assert_eq!((again.task.id, again.attempt), (twice.id, 1));
    assert!(again.sandbox.epoch > first.sandbox.epoch);
    let lease = &again.sandbox;
    let freed = fleet
        .lease
        .release(&worker.id, lease.sandbox, lease.epoch, None);
    assert!(freed.await.unwrap());
    hand_back(&fleet, &again).await;
    delivery.ack().await.unwrap();
    worker.offer(&fleet, 1).await;
    let (next, _) = worker.placement(&fleet).await;
    assert_eq!((next.task.id, next.attempt), (twice.id, 2));
    fleet.requests_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_also_where_nats_is_gone_for_good() {
    let mut fleet = Fleet::start().await;
    fleet.stop_dispatcher().await;
    fleet.options.timings.drain = Duration::from_secs(3600);
    fleet.options.timings.unreachable = Duration::from_millis(500);
    fleet.start_dispatcher().await;
    fleet.submit(&task()).await;
    fleet.kill_nats();
    until("the dispatcher is not ready", async || {
        (!fleet.readiness.is_ready()).then_some(())
    })
    .await;
    fleet.stop_dispatcher().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_goes_and_comes_back_costs_time_and_nothing_else() {
    let mut fleet = Fleet::start().await;
    let before = fleet.lease.incarnation().await.unwrap().unwrap();
    fleet.stop_redis();
    until("the dispatcher is not ready", async || {
        (fleet.readiness.missing() == ["redis"]).then_some(())
    })
    .await;
    let waiting = task();
    fleet.submit(&waiting).await;
    fleet.start_redis();
    until("the dispatcher is ready again", async || {
        fleet.readiness.is_ready().then_some(())
    })
    .await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    assert!(
        worker.incarnation > before,
        "this redis may have forgotten its last second"
    );
    worker.offer(&fleet, 1).await;
    let (placement, _) = worker.placement(&fleet).await;
    assert_eq!((placement.task.id, placement.attempt), (waiting.id, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_wait_while_the_server_refuses_placements_and_lose_no_attempt() {
    let fleet = Fleet::start().await;
    let jetstream = fleet.broker.jetstream();
    let name = &fleet.broker.streams().placements;
    let roomy = jetstream.get_stream(name).await.unwrap();
    let roomy = roomy.cached_info().config.clone();
    let mut full = roomy.clone();
    full.max_bytes = 1;
    jetstream.update_stream(full).await.unwrap();

    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let first = task();
    fleet.submit(&first).await;
    // Each try takes a sandbox that is not offered again: more tries than there may be attempts.
    let tries = fleet.options.max_attempts + 2;
    worker.offer(&fleet, tries).await;
    until("it is tried that often", async || {
        worker.beat(&fleet).await;
        let warm = fleet.lease.warm_counts().await.unwrap();
        (warm.get(&"py".parse().unwrap()) == Some(&0)).then_some(())
    })
    .await;
    let second = task();
    fleet.submit(&second).await;
    jetstream.update_stream(roomy).await.unwrap();
    worker.offer(&fleet, 4).await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let (placement, delivery) = worker.placement(&fleet).await;
        assert_eq!(placement.attempt, 1);
        let grants = placement.sandbox.epoch.counter();
        assert!(grants >= tries, "{grants}");
        seen.insert(placement.task.id);
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, [first.id, second.id].into());
    fleet.requests_settled().await;
    let letters = &fleet.broker.streams().dead_letters;
    assert_eq!(fleet.stored(letters, "remuda.dlq.>").await, 0);
}
