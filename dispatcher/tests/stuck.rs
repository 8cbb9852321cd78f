//! No message stays in a work queue for good, and dead letters find their way back.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::stream::PLACEMENT_MAX_DELIVER;
use broker_schema::{ErrorCode, Outcome, Placement, SandboxRef, TaskRequest, Timestamp};
use remuda_client::broker::{Body, DeadLetter, Outgoing, Refusal, RequeueError};
use support::{FakeWorker, Fleet, task, until};

const LONG: Duration = Duration::from_secs(40);

/// Places a task on a worker that gives it back until the server has enough of it.
async fn refused_for_good(fleet: &Fleet, worker: &mut FakeWorker) -> Placement {
    let offered = worker.offer(fleet, 1).await;
    let task = task();
    let placement = Placement {
        request_digest: sha256_hex(&codec::encode(&task, Format::MessagePack).unwrap()),
        task,
        attempt: 2,
        sandbox: SandboxRef {
            sandbox: offered[0],
            worker: worker.id.clone(),
            epoch: broker_schema::Epoch::new(worker.incarnation, 1),
        },
        dispatched_at: Timestamp::now(),
    };
    let subjects = fleet.broker.subjects();
    let subject = subjects.placement(&worker.id, &placement.task.tenant, offered[0]);
    let payload = codec::encode(&placement, Format::MessagePack).unwrap();
    let id = Some(placement.message_id());
    fleet
        .publish(&subject, id, Format::MessagePack, payload)
        .await;
    for n in 1..=PLACEMENT_MAX_DELIVER {
        worker.beat(fleet).await;
        let (again, delivery) = worker.placement(fleet).await;
        assert_eq!(
            (again.task.id, delivery.delivered),
            (placement.task.id, n as u64)
        );
        delivery.nak(Duration::ZERO).await.unwrap();
    }
    placement
}

async fn seen_to(fleet: &Fleet, worker: &mut FakeWorker, placement: &Placement) -> DeadLetter {
    let streams = fleet.broker.streams();
    until("the placement is gone", async || {
        // It must not be its death that is noticed.
        worker.beat(fleet).await;
        assert!(worker.asks_for_more().await.is_none());
        let left = fleet.stored(&streams.placements, "remuda.run.>").await;
        (left == 0).then_some(())
    })
    .await;
    let terminal = fleet.terminal("r1", placement.task.id).await;
    assert_eq!(terminal.outcome, Outcome::DeadLettered);
    assert_eq!(terminal.error.unwrap().code, ErrorCode::AttemptsExhausted);
    assert_eq!(
        (terminal.attempt, &terminal.request_digest),
        (2, &placement.request_digest)
    );
    let letter = fleet
        .broker
        .next_dead_letter(None, None, 1)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(letter.task, Some(placement.task.id));
    assert_eq!(letter.code, ErrorCode::AttemptsExhausted.as_str());
    assert!(
        letter.subject.as_ref().unwrap().starts_with("remuda.run."),
        "{letter:?}"
    );
    assert_eq!(letter.body(), Body::Placement(Box::new(placement.clone())));
    letter
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_has_given_up_on_is_dead_lettered_and_can_be_asked_for_again() {
    let mut fleet = Fleet::start().await;
    fleet.stop_dispatcher().await;
    fleet.options.timings.sweep = Duration::from_secs(3600);
    fleet.start_dispatcher().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let placement = refused_for_good(&fleet, &mut worker).await;
    let letter = seen_to(&fleet, &mut worker, &placement).await;

    // Its terminal never changes: it goes on under another id, once, however often it is asked.
    let requeued = fleet.broker.requeue(&letter, false).await.unwrap();
    let (old, new) = requeued.task.unwrap();
    assert_eq!(old, placement.task.id);
    assert_ne!(new, old);
    let repeated = fleet.broker.requeue(&letter, false).await.unwrap();
    assert_eq!(repeated.task, requeued.task);
    assert!(
        fleet
            .broker
            .dead_letter(letter.sequence)
            .await
            .unwrap()
            .is_none()
    );
    worker.offer(&fleet, 2).await;
    let (again, delivery) = worker.placement(&fleet).await;
    assert_eq!(
        (again.task.id, again.attempt),
        (new, 1),
        "attempts begin anew"
    );
    assert_eq!(again.task.steps, placement.task.steps);
    delivery.ack().await.unwrap();
    fleet.requests_settled().await;
    let placements = &fleet.broker.streams().placements;
    assert_eq!(
        fleet.stored(placements, "remuda.run.>").await,
        0,
        "only one of it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweep_finds_what_a_lost_advisory_told_of() {
    let mut fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    fleet.stop_dispatcher().await;
    let placement = refused_for_good(&fleet, &mut worker).await;
    let advisories = fleet.broker.streams().advisories.clone();
    until("the advisory is stored", async || {
        worker.beat(&fleet).await;
        // The server gives up when it is asked for one more.
        assert!(worker.asks_for_more().await.is_none());
        (fleet.stored(&advisories, ">").await > 0).then_some(())
    })
    .await;
    let stream = fleet
        .broker
        .jetstream()
        .get_stream(&advisories)
        .await
        .unwrap();
    stream.purge().await.unwrap();

    fleet.options.timings.sweep = Duration::from_millis(200);
    fleet.start_dispatcher().await;
    seen_to(&fleet, &mut worker, &placement).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_stuck_among_others_is_delivered_again_with_them() {
    let mut fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    fleet.stop_dispatcher().await;
    let placement = refused_for_good(&fleet, &mut worker).await;
    // Another one that the worker has in hand all the time.
    let mut other = placement.clone();
    other.task = task();
    let subjects = fleet.broker.subjects();
    let subject = subjects.placement(&worker.id, &other.task.tenant, other.sandbox.sandbox);
    let payload = codec::encode(&other, Format::MessagePack).unwrap();
    fleet
        .publish(&subject, None, Format::MessagePack, payload)
        .await;
    let (held, _in_hand) = worker.placement(&fleet).await;
    assert_eq!(held.task.id, other.task.id);
    let advisories = fleet.broker.streams().advisories.clone();
    until("the advisory is stored", async || {
        worker.beat(&fleet).await;
        // The server gives up when it is asked for one more.
        assert!(worker.asks_for_more().await.is_none());
        (fleet.stored(&advisories, ">").await > 0).then_some(())
    })
    .await;
    let stream = fleet
        .broker
        .jetstream()
        .get_stream(&advisories)
        .await
        .unwrap();
    stream.purge().await.unwrap();

    fleet.options.timings.sweep = Duration::from_millis(200);
    fleet.start_dispatcher().await;
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 2 {
        let (again, delivery) = worker.placement(&fleet).await;
        seen.insert(again.task.id);
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, [placement.task.id, other.task.id].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_nobody_settles_and_placements_for_nobody_have_an_end() {
    let mut fleet = Fleet::start().await;
    fleet.stop_dispatcher().await;
    fleet.options.timings.sweep = Duration::from_millis(200);
    fleet.start_dispatcher().await;
    // It waits for a sandbox that never comes.
    let waiting = task();
    fleet.submit(&waiting).await;
    let streams = fleet.broker.streams();
    let lane = until("the lane is open", async || {
        let consumers = fleet.broker.consumers(&streams.requests).await.unwrap();
        consumers.into_iter().find(|lane| lane.ack_pending == 1)
    })
    .await;
    let advisory = |consumer: &str| {
        serde_json::json!({
            "type": "io.nats.jetstream.advisory.v1.max_deliver", "id": "x",
            "stream": streams.requests, "consumer": consumer, "stream_seq": 1, "deliveries": 1000,
        })
    };
    let subject = format!(
        "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{}.{}",
        streams.requests, lane.durable
    );
    for consumer in ["lane-of=an=1", &lane.durable] {
        let outgoing = Outgoing {
            subject: subject.clone(),
            payload: advisory(consumer).to_string().into(),
            ..Outgoing::default()
        };
        fleet.broker.publish(outgoing, LONG).await.unwrap();
    }
    let terminal = fleet.terminal("r1", waiting.id).await;
    assert_eq!(terminal.outcome, Outcome::DeadLettered);
    assert!(
        terminal.evidence.contains(&lane.durable),
        "{}",
        terminal.evidence
    );
    fleet.requests_settled().await;

    // Nobody can be the worker of these.
    let nobody = "remuda.run.no body.acme.x".replace(' ', "%");
    fleet
        .publish(&nobody, None, Format::MessagePack, b"x".to_vec())
        .await;
    until("the stray is gone", async || {
        (fleet.stored(&streams.placements, "remuda.run.>").await == 0).then_some(())
    })
    .await;
    let letters = fleet.stored(&streams.dead_letters, "remuda.dlq.>").await;
    assert_eq!(letters, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreadable_letters_go_back_only_by_force_and_used_ids_are_replaced() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let subject = "remuda.req.acme.py";
    let garbage = b"\xc1garbage".to_vec();
    fleet
        .publish(subject, None, Format::MessagePack, garbage)
        .await;
    fleet.requests_settled().await;
    let letter = fleet
        .broker
        .next_dead_letter(None, None, 1)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(letter.subject.as_deref(), Some(subject));
    let refused = fleet.broker.requeue(&letter, false).await.unwrap_err();
    assert!(
        matches!(
            refused,
            RequeueError::Refused {
                refusal: Refusal::Unreadable(_),
                ..
            }
        ),
        "{refused}"
    );
    assert!(
        fleet
            .broker
            .dead_letter(letter.sequence)
            .await
            .unwrap()
            .is_some()
    );
    // By force it comes back as another letter.
    let forced = fleet.broker.requeue(&letter, true).await.unwrap();
    assert_eq!((forced.subject.as_str(), forced.task), (subject, None));
    let back = until("it is back", async || {
        let next = letter.sequence + 1;
        fleet
            .broker
            .next_dead_letter(None, None, next)
            .await
            .unwrap()
    })
    .await;
    assert_eq!(back.message.payload, letter.message.payload);

    // An id that another request has: asked for again, it is a task of its own.
    worker.offer(&fleet, 2).await;
    let first = task();
    fleet.submit(&first).await;
    let (_, delivery) = worker.placement(&fleet).await;
    delivery.ack().await.unwrap();
    let second = TaskRequest {
        timeout_ms: Some(1234),
        ..first.clone()
    };
    let payload = codec::encode(&second, Format::MessagePack).unwrap();
    fleet
        .publish(subject, None, Format::MessagePack, payload)
        .await;
    let conflict = until("the conflict is a letter", async || {
        let next = back.sequence + 1;
        fleet
            .broker
            .next_dead_letter(None, None, next)
            .await
            .unwrap()
    })
    .await;
    assert_eq!(conflict.code, ErrorCode::IdConflict.as_str());
    assert_eq!(conflict.task, Some(first.id));
    let tenant = "somebody".parse().unwrap();
    let others = fleet
        .broker
        .next_dead_letter(Some(&tenant), None, 1)
        .await
        .unwrap();
    assert!(others.is_none());
    let requeued = fleet.broker.requeue(&conflict, false).await.unwrap();
    let (placement, delivery) = worker.placement(&fleet).await;
    assert_eq!(placement.task.timeout_ms, Some(1234));
    assert_eq!(requeued.task, Some((first.id, placement.task.id)));
    delivery.ack().await.unwrap();
}
