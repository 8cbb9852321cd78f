//! The way of a task through a worker, with real servers and fake sandboxes.

mod support;

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::digest::Running;
use broker_schema::{
    Attribution, ControlMessage, Epoch, ErrorCode, FrameKind, Outcome, SessionOptions, Timestamp,
};
use remuda_tests::wait::eventually;
use support::{Fleet, LONG, task};

#[tokio::test(flavor = "multi_thread")]
async fn a_task_runs_and_its_terminal_carries_what_it_printed() {
    let fleet = Fleet::start(2).await;
    let task = task(&[
        &["fake:print", "out", "fake:error", "err"],
        &["fake:exit", "3"],
        &["fake:print", "never"],
    ]);
    let placement = fleet.submit(&task).await;
    let terminal = fleet.terminal(&task).await;
    assert_eq!(terminal.outcome, Outcome::Failed);
    assert_eq!(terminal.attribution, Attribution::Policy);
    assert_eq!(terminal.exit.unwrap().code, 3);
    assert_eq!((terminal.steps.len(), terminal.frames), (2, 0));
    assert_eq!(terminal.steps[0].stdout.whole(), Some(&b"out"[..]));
    assert_eq!(terminal.steps[0].stderr.whole(), Some(&b"err"[..]));
    assert_eq!(terminal.request_digest, placement.request_digest);
    assert_eq!(terminal.attempt, 1);
    assert!(terminal.times.started.unwrap() <= terminal.times.finished);
    assert!(!terminal.kept);
    // Its sandbox is gone, another one is there instead, and nothing is left behind.
    fleet.settled().await;
    fleet.leased(0).await;
    fleet.warm(2).await;
    fleet.alive(2).await;
    assert_eq!(fleet.fake.made(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_output_comes_as_frames_that_add_up() {
    const BYTES: usize = 5_000_000;
    let fleet = Fleet::start(1).await;
    let task = task(&[&["fake:print", "first"], &["fake:flood", "5000000"]]);
    fleet.submit(&task).await;
    let terminal = fleet.terminal(&task).await;
    assert_eq!(
        terminal.outcome,
        Outcome::Succeeded,
        "{}",
        terminal.evidence
    );
    let stdout = &terminal.steps[1].stdout;
    assert_eq!((stdout.bytes, stdout.dropped), (BYTES as u64, 0));
    assert!(stdout.whole().is_none());
    assert!(terminal.frames >= (BYTES / 65_536) as u64);
    let frames = fleet.frames(&task, terminal.frames).await;
    let mut digest = Running::default();
    let mut exits = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        assert_eq!((frame.attempt, frame.n), (1, index as u64));
        match frame.kind {
            FrameKind::Exit => exits.push((frame.step, frame.exit.unwrap().code)),
            _ if frame.step == 1 => digest.update(&frame.data.0),
            _ => assert_eq!(frame.data.0, b"first"),
        }
    }
    assert_eq!(exits, [(0, 0), (1, 0)]);
    assert_eq!(digest.finish(), stdout.sha256);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_seen_while_the_task_runs() {
    let fleet = Fleet::start(1).await;
    let task = task(&[&["fake:print", "early", "fake:sleep", "600000"]]);
    fleet.submit(&task).await;
    let frames = fleet.frames(&task, 1).await;
    assert_eq!(frames[0].data.0, b"early");
    assert!(fleet.stored(&task).await.is_none());
    let (tenant, id) = (task.tenant.clone(), task.id);
    let cancel = ControlMessage::CancelTask { tenant, task: id };
    fleet.hint(&cancel).await;
    let terminal = fleet.terminal(&task).await;
    assert_eq!(terminal.outcome, Outcome::Cancelled);
    assert_eq!(terminal.attribution, Attribution::User);
    assert_eq!(terminal.steps[0].stdout.whole(), Some(&b"early"[..]));
    // The frame with the output and the one with the exit.
    assert_eq!(terminal.frames, 2);
    fleet.leased(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hint_ends_its_tenants_task_and_no_other() {
    let fleet = Fleet::start(2).await;
    let endless = || task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let (spared, witness) = (endless(), endless());
    for task in [&spared, &witness] {
        fleet.submit(task).await;
        fleet.frames(task, 1).await;
    }
    let cancel = |tenant: &str, task| ControlMessage::CancelTask {
        tenant: tenant.parse().unwrap(),
        task,
    };
    // Another tenant has a task of the same id; an old dispatcher does not say whose it means.
    fleet.hint(&cancel("u", spared.id)).await;
    fleet.hint(&ControlMessage::Cancel(spared.id)).await;
    // Hints are heeded in their order: with the end of this one the others were.
    fleet.hint(&cancel("t", witness.id)).await;
    let ended = fleet.terminal(&witness).await;
    assert_eq!(ended.outcome, Outcome::Cancelled);
    assert!(fleet.stored(&spared).await.is_none());
    fleet.leased(1).await;
    // Where the registry says so too, it is meant.
    let (tenant, id) = (&spared.tenant, spared.id);
    fleet.leases.cancel(tenant, id).await.unwrap();
    fleet.hint(&ControlMessage::Cancel(id)).await;
    let ended = fleet.terminal(&spared).await;
    assert_eq!(ended.outcome, Outcome::Cancelled);
    fleet.leased(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_in_redis_is_enough() {
    let fleet = Fleet::start(1).await;
    let task = task(&[&["fake:sleep", "600000"]]);
    fleet.submit(&task).await;
    fleet.leases.cancel(&task.tenant, task.id).await.unwrap();
    assert_eq!(fleet.terminal(&task).await.outcome, Outcome::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_code_does_is_never_blamed_on_the_infrastructure() {
    let fleet = Fleet::start(4).await;
    let mut slow = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    slow.timeout_ms = Some(100);
    let hog = task(&[&["fake:oom"]]);
    let missing = task(&[&["nosuch"]]);
    let mut late = task(&[&["fake:sleep", "600000"]]);
    late.deadline = Some(Timestamp::now().plus(Duration::from_millis(1500)));
    for task in [&slow, &hog, &missing, &late] {
        fleet.submit(task).await;
    }
    let slow = fleet.terminal(&slow).await;
    assert_eq!(slow.outcome, Outcome::TimedOut);
    assert!(slow.steps[0].timed_out);
    assert_eq!(slow.steps[0].stdout.whole(), Some(&b"x"[..]));
    let hog = fleet.terminal(&hog).await;
    assert_eq!(hog.outcome, Outcome::OomKilled);
    assert!(hog.steps[0].oom_killed && hog.valid());
    let missing = fleet.terminal(&missing).await;
    assert_eq!(missing.exit.unwrap().code, 127);
    assert!(missing.evidence.contains("nosuch"), "{}", missing.evidence);
    for error in [&missing.error, &missing.steps[0].error] {
        let error = error.as_ref().unwrap();
        assert_eq!(error.code, ErrorCode::FileNotFound);
        assert!(error.message.contains("nosuch"), "{error}");
    }
    assert_eq!(fleet.terminal(&late).await.outcome, Outcome::Expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_keeps_its_sandbox_and_its_order() {
    let fleet = Fleet::start(1).await;
    let mut open = task(&[]);
    open.keep_alive = Some(SessionOptions::default());
    fleet.submit(&open).await;
    let opened = fleet.terminal(&open).await;
    assert!(opened.kept, "{}", opened.evidence);
    let session = opened.sandbox.unwrap();
    let mut tasks = Vec::new();
    for n in 0..3 {
        // The first takes the longest: order does not come from speed.
        let millis = ((3 - n) * 30).to_string();
        let step = task(&[&["fake:sleep", &millis, "fake:print", "x"]]);
        tasks.push(fleet.in_session(&session, step).await);
    }
    let mut ends = Vec::new();
    for task in &tasks {
        let terminal = fleet.terminal(task).await;
        assert_eq!(
            terminal.outcome,
            Outcome::Succeeded,
            "{}",
            terminal.evidence
        );
        assert!(terminal.kept);
        assert_eq!(terminal.sandbox, Some(session.clone()));
        ends.push((terminal.times.started.unwrap(), terminal.times.finished));
    }
    assert!(
        ends.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "{ends:?}"
    );
    fleet.leased(1).await;
    let mut close = task(&[]);
    close.close_session = true;
    let close = fleet.in_session(&session, close).await;
    let closed = fleet.terminal(&close).await;
    assert_eq!((closed.outcome, closed.kept), (Outcome::Succeeded, false));
    fleet.leased(0).await;
    fleet.alive(1).await;
    let late = fleet.in_session(&session, task(&[&["true"]])).await;
    let late = fleet.terminal(&late).await;
    assert_eq!(late.outcome, Outcome::SandboxLost);
    assert_eq!(late.attribution, Attribution::User);
    assert_eq!(late.error.unwrap().code, ErrorCode::SessionClosed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_not_open_to_strangers_nor_to_old_leases() {
    let fleet = Fleet::start(1).await;
    let mut open = task(&[&["true"]]);
    open.keep_alive = Some(SessionOptions::default());
    fleet.submit(&open).await;
    let session = fleet.terminal(&open).await.sandbox.unwrap();
    let mut stranger = task(&[&["true"]]);
    stranger.tenant = "u".parse().unwrap();
    let stranger = fleet.in_session(&session, stranger).await;
    let answer = fleet.terminal(&stranger).await;
    assert_eq!(answer.outcome, Outcome::SandboxLost);
    assert_eq!(answer.error.unwrap().code, ErrorCode::SandboxLost);
    let mut old = session.clone();
    old.epoch = Epoch(session.epoch.0 - 1);
    let stale = fleet.in_session(&old, task(&[&["true"]])).await;
    let answer = fleet.terminal(&stale).await;
    assert_eq!(answer.error.unwrap().code, ErrorCode::StaleEpoch);
    assert_eq!(answer.attribution, Attribution::User);
    // The session itself has not noticed.
    let own = fleet.in_session(&session, task(&[&["true"]])).await;
    assert_eq!(fleet.terminal(&own).await.outcome, Outcome::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_closes_by_itself() {
    let fleet = Fleet::start(1).await;
    let mut open = task(&[&["true"]]);
    open.keep_alive = Some(SessionOptions {
        idle_timeout_ms: 50,
        ..SessionOptions::default()
    });
    fleet.submit(&open).await;
    assert!(fleet.terminal(&open).await.kept);
    fleet.leased(0).await;
    fleet.alive(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_placement_is_not_run_twice() {
    let fleet = Fleet::start(2).await;
    let first = task(&[&["fake:sleep", "200", "fake:print", "once"]]);
    let placement = fleet.submit(&first).await;
    // As after a crash of the dispatcher with the server's memory for ids gone.
    fleet.publish(&placement, "again-1").await;
    let terminal = fleet.terminal(&first).await;
    fleet.publish(&placement, "again-2").await;
    fleet.settled().await;
    assert_eq!(fleet.stored(&first).await, Some(terminal));
    assert_eq!(fleet.unsettled(&fleet.broker.streams().requests).await, 0);
    fleet.warm(2).await;
    assert_eq!(fleet.fake.made(), 3, "only one sandbox was used");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_that_cannot_be_used_is_answered_or_dropped() {
    let fleet = Fleet::start(1).await;
    let subject = |placement: &broker_schema::Placement| {
        let sandbox = &placement.sandbox;
        let tenant = &placement.task.tenant;
        let subjects = fleet.broker.subjects();
        subjects.placement(&sandbox.worker, tenant, sandbox.sandbox)
    };
    let placement = fleet.claim(&task(&[&["true"]])).await;
    let garbage = b"\xc1garbage".to_vec();
    fleet.publish_raw(subject(&placement), garbage, "a").await;
    // A step of a later version: whom to answer can still be read.
    let mut later = serde_json::to_value(&placement).unwrap();
    later["task"]["steps"] = serde_json::json!([{"action": {"teleport": {}}}]);
    let payload = rmp_serde::to_vec_named(&later).unwrap();
    fleet.publish_raw(subject(&placement), payload, "b").await;
    let terminal = fleet.terminal(&placement.task).await;
    assert_eq!(terminal.outcome, Outcome::Rejected);
    assert_eq!(terminal.error.unwrap().code, ErrorCode::UnknownStepType);
    // Another tenant's name in the payload: answered where the subject says.
    let mut forged = placement.clone();
    forged.task = task(&[&["true"]]);
    forged.task.tenant = "victim".parse().unwrap();
    let payload = codec::encode(&forged, Format::MessagePack).unwrap();
    fleet.publish_raw(subject(&placement), payload, "c").await;
    let mut answered = forged.task.clone();
    answered.tenant = placement.task.tenant.clone();
    let terminal = fleet.terminal(&answered).await;
    assert_eq!(terminal.error.unwrap().code, ErrorCode::SubjectMismatch);
    assert!(fleet.stored(&forged.task).await.is_none());
    fleet.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_dies_sends_the_task_back() {
    let fleet = Fleet::start(1).await;
    let task = task(&[&["fake:die"]]);
    let placement = fleet.submit(&task).await;
    let requests = fleet.broker.streams().requests.clone();
    eventually("returned request", LONG, async || {
        match fleet.unsettled(&requests).await {
            1 => Ok(()),
            found => Err(format!("{found} requests")),
        }
    })
    .await
    .unwrap();
    fleet.settled().await;
    assert!(fleet.stored(&task).await.is_none(), "there is no result");
    let stream = fleet.broker.jetstream().get_stream(&requests).await;
    let subject = fleet.broker.subjects().request(&task.tenant, &task.pool);
    let stream = stream.unwrap();
    let returned = stream.get_last_raw_message_by_subject(&subject).await;
    let returned = returned.unwrap();
    let header = |name: &str| returned.headers.get(name).unwrap().as_str().to_owned();
    assert_eq!(header("Remuda-Digest"), placement.request_digest);
    let epoch = placement.sandbox.epoch.0;
    let wanted = format!("{}/{}/retry-1/{epoch}", task.tenant, task.id);
    assert_eq!(header("Nats-Msg-Id"), wanted);
    let request =
        codec::decode::<broker_schema::TaskRequest>(&returned.payload, Format::MessagePack);
    assert_eq!(request.unwrap(), task);
    // Nothing stands in the way of the next attempt.
    fleet.leased(0).await;
    fleet.warm(1).await;
    assert_eq!(fleet.claim(&task).await.attempt, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_fails_goes_back_as_often_as_it_asked_for() {
    let fleet = Fleet::start(1).await;
    let mut task = task(&[&["fake:exit", "3"]]);
    task.retries = 1;
    let first = fleet.submit(&task).await;
    assert_eq!(first.attempt, 1);
    let requests = fleet.broker.streams().requests.clone();
    eventually("returned request", LONG, async || {
        match fleet.unsettled(&requests).await {
            1 => Ok(()),
            found => Err(format!("{found} requests")),
        }
    })
    .await
    .unwrap();
    fleet.settled().await;
    assert!(fleet.stored(&task).await.is_none(), "there is no result");
    fleet.leased(0).await;
    fleet.warm(1).await;
    let second = fleet.submit(&task).await;
    assert_eq!(second.attempt, 2);
    assert_ne!(second.sandbox.sandbox, first.sandbox.sandbox);
    let terminal = fleet.terminal(&task).await;
    assert_eq!((terminal.outcome, terminal.attempt), (Outcome::Failed, 2));
    assert_eq!(terminal.exit.unwrap().code, 3);
    assert_eq!(fleet.unsettled(&requests).await, 1, "it did not go back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_starts_again_ends_no_task() {
    let mut fleet = Fleet::start(1).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "3000"]]);
    let placement = fleet.submit(&running).await;
    fleet.frames(&running, 1).await;
    fleet.redis.restart().await.unwrap();
    // As a dispatcher would.
    eventually("redis answers again", LONG, async || {
        match fleet.leases.incarnation().await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    let next = fleet.broker.next_incarnation().await.unwrap();
    assert_eq!(fleet.leases.install_incarnation(next).await.unwrap(), next);
    let terminal = fleet.terminal(&running).await;
    assert_eq!(
        (terminal.outcome, terminal.attempt),
        (Outcome::Succeeded, 1),
        "{}",
        terminal.evidence
    );
    fleet.warm(1).await;
    let after = fleet.claim(&task(&[&["true"]])).await.sandbox.epoch;
    assert!(after > placement.sandbox.epoch);
    assert_eq!(after.incarnation(), next);
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_ends_also_where_nats_is_gone_for_good() {
    let stubborn = Fleet::with(2, |options| {
        options.timings.drain = Duration::from_secs(3600);
        options.timings.unreachable = Duration::from_secs(1);
    });
    let fleet = Box::pin(stubborn).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    fleet.submit(&running).await;
    fleet.frames(&running, 1).await;
    fleet.nats.kill().await.unwrap();
    fleet.shutdown.cancel();
    assert!(fleet.tasks.wait(LONG).await, "the worker has left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_kills_the_sandbox_and_blames_nobody() {
    let fleet = Fleet::start(1).await;
    let task = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let placement = fleet.submit(&task).await;
    fleet.frames(&task, 1).await;
    let key = format!("{{remuda}}:sandbox:{}", placement.sandbox.sandbox);
    assert_eq!(fleet.redis.command(&["DEL", &key]).await.unwrap(), "1");
    fleet.settled().await;
    assert!(fleet.stored(&task).await.is_none(), "there is no result");
    assert_eq!(fleet.unsettled(&fleet.broker.streams().requests).await, 1);
    fleet.alive(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_is_offered_everything_again() {
    let fleet = Fleet::start(2).await;
    let before = fleet.claim(&task(&[&["true"]])).await.sandbox.epoch;
    fleet.redis.command(&["FLUSHALL"]).await.unwrap();
    let pool = broker_schema::pool::PoolSpec {
        backend: broker_schema::pool::BackendKind::Fake,
        ..broker_schema::pool::PoolSpec::named("p".parse().unwrap())
    };
    fleet.leases.set_pools(&[pool]).await.unwrap();
    let targets = [("p".parse().unwrap(), 2, 32)];
    eventually("registration", LONG, async || {
        match fleet.leases.set_targets(&fleet.worker, &targets).await {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    fleet.warm(2).await;
    let task = task(&[&["true"]]);
    let placement = fleet.submit(&task).await;
    assert!(placement.sandbox.epoch > before);
    assert!(placement.sandbox.epoch.incarnation() > before.incarnation());
    assert_eq!(fleet.terminal(&task).await.outcome, Outcome::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_finishes_what_runs_and_leaves_nothing() {
    let fleet = Fleet::start(3).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "500", "fake:exit", "5"]]);
    fleet.submit(&running).await;
    let mut open = task(&[&["true"]]);
    open.keep_alive = Some(SessionOptions::default());
    fleet.submit(&open).await;
    assert!(fleet.terminal(&open).await.kept);
    fleet.frames(&running, 1).await;
    fleet.shutdown.cancel();
    assert!(fleet.tasks.wait(LONG).await, "the worker has left");
    let terminal = fleet.stored(&running).await.unwrap();
    assert_eq!(terminal.exit.unwrap().code, 5);
    assert_eq!(fleet.fake.alive(), 0);
    assert!(fleet.leases.workers().await.unwrap().is_empty());
    assert!(fleet.leases.leases().await.unwrap().is_empty());
    assert_eq!(
        fleet
            .leases
            .warm_counts()
            .await
            .unwrap()
            .values()
            .sum::<u64>(),
        0
    );
    fleet.settled().await;
    let held = format!("{{remuda}}:held:{}", fleet.worker);
    let left = fleet.redis.command(&["EXISTS", &held]).await;
    assert_eq!(left.unwrap(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_finish_in_time_goes_back() {
    let short = Fleet::with(1, |options| {
        options.timings.drain = Duration::from_millis(100);
    });
    let fleet = Box::pin(short).await;
    let task = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    fleet.submit(&task).await;
    fleet.frames(&task, 1).await;
    fleet.hint(&ControlMessage::Drain).await;
    assert!(fleet.tasks.wait(LONG).await, "the worker has left");
    assert!(fleet.stored(&task).await.is_none());
    assert_eq!(fleet.unsettled(&fleet.broker.streams().requests).await, 1);
    assert!(fleet.leases.leases().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn creation_that_fails_is_tried_again() {
    let fleet = Fleet::start(1).await;
    fleet.fake.set_broken(true);
    let first = task(&[&["true"]]);
    fleet.submit(&first).await;
    assert_eq!(fleet.terminal(&first).await.outcome, Outcome::Succeeded);
    fleet.warm(0).await;
    fleet.alive(0).await;
    fleet.fake.set_broken(false);
    fleet.warm(1).await;
}
