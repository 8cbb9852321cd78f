//! Sessions on a worker: renewed, expired, repeated, drained; with real servers and fake
//! sandboxes.

mod support;

use std::time::{Duration, Instant};

use broker_schema::{Attribution, ControlMessage, ErrorCode, Outcome, SessionOptions};
use remuda_tests::wait::eventually;
use support::{Fleet, LONG, task};

#[tokio::test(flavor = "multi_thread")]
async fn a_task_without_steps_keeps_a_session_from_idling() {
    let fleet = Fleet::start(1).await;
    let idle = Duration::from_millis(1500);
    let session = fleet
        .open(SessionOptions {
            idle_timeout_ms: idle.as_millis() as u64,
            ..SessionOptions::default()
        })
        .await;
    let began = Instant::now();
    // Time itself is what is tested here: as long as it may idle, twice.
    let mut ticks = tokio::time::interval(idle / 4);
    while began.elapsed() < idle * 2 {
        ticks.tick().await;
        let renewal = fleet.in_session(&session, task(&[])).await;
        let ended = fleet.terminal(&renewal).await;
        assert_eq!(ended.outcome, Outcome::Succeeded, "{}", ended.evidence);
        assert!(ended.kept && ended.steps.is_empty());
    }
    let used = fleet.in_session(&session, task(&[&["true"]])).await;
    assert_eq!(fleet.terminal(&used).await.outcome, Outcome::Succeeded);
    // Nobody renews it any more.
    fleet.leased(0).await;
    let late = fleet.in_session(&session, task(&[])).await;
    let late = fleet.terminal(&late).await;
    let end = (late.outcome, late.attribution, late.error.unwrap().code);
    let user = Attribution::User;
    assert_eq!(end, (Outcome::SandboxLost, user, ErrorCode::SessionExpired));
    assert!(late.evidence.contains("1500 ms"), "{}", late.evidence);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_session_ends_with_its_life() {
    let fleet = Fleet::start(1).await;
    let session = fleet
        .open(SessionOptions {
            max_life_ms: 1000,
            ..SessionOptions::default()
        })
        .await;
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let step = task(&[&["fake:sleep", "300"]]);
        tasks.push(fleet.in_session(&session, step).await);
    }
    let mut ends = Vec::new();
    for task in &tasks {
        ends.push(fleet.terminal(task).await);
    }
    let lived = ends
        .iter()
        .take_while(|end| end.outcome == Outcome::Succeeded);
    let lived = lived.count();
    // What had begun was finished; what waited was told why it was not.
    assert!((1..8).contains(&lived), "{lived} ran");
    for end in &ends[lived..] {
        let told = (end.outcome, end.attribution);
        assert_eq!(told, (Outcome::SandboxLost, Attribution::User));
        assert!(end.evidence.contains("max_life_ms"), "{}", end.evidence);
        let code = end.error.as_ref().unwrap().code;
        assert_eq!(code, ErrorCode::SessionExpired);
    }
    fleet.settled().await;
    fleet.leased(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_task_is_answered_from_memory() {
    let mut fleet = Fleet::start(1).await;
    let session = fleet.open(SessionOptions::default()).await;
    let first = task(&[&["fake:print", "once"]]);
    let first = fleet.in_session(&session, first).await;
    let terminal = fleet.terminal(&first).await;
    let mut placement = broker_schema::Placement {
        request_digest: String::new(),
        attempt: 1,
        sandbox: session.clone(),
        dispatched_at: broker_schema::Timestamp::now(),
        task: first.clone(),
    };
    // Redelivered, resubmitted, and under another number.
    for (attempt, id) in [(1, "again"), (1, "and again"), (2, "as another attempt")] {
        placement.attempt = attempt;
        fleet.publish(&placement, id).await;
        fleet.settled().await;
        assert_eq!(fleet.stored(&first).await.as_ref(), Some(&terminal));
    }
    // Its terminal was lost: it is said again, word for word.
    let name = fleet.broker.streams().terminals.clone();
    let stream = fleet.broker.jetstream().get_stream(&name).await.unwrap();
    stream.purge().await.unwrap();
    assert!(fleet.stored(&first).await.is_none());
    // With it the server's memory of message ids, as where its storage is lost.
    fleet.nats.restart().await.unwrap();
    fleet.publish(&placement, "after a loss").await;
    assert_eq!(fleet.terminal(&first).await, terminal);
    fleet.settled().await;
    assert_eq!(fleet.fake.executed(), 1, "it ran once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_of_what_runs_neither_ends_it_nor_runs_it_again() {
    let fleet = Fleet::start(1).await;
    let session = fleet.open(SessionOptions::default()).await;
    let before = fleet.fake.executed();
    let endless = task(&[&["fake:print", "true", "fake:sleep", "600000"]]);
    let endless = fleet.in_session(&session, endless).await;
    fleet.frames(&endless, 1).await;
    // As after the server has forgotten the first one's id, and from a client without ids.
    let repeat = broker_schema::Placement {
        request_digest: String::new(),
        attempt: 1,
        sandbox: session.clone(),
        dispatched_at: broker_schema::Timestamp::now(),
        task: endless.clone(),
    };
    fleet.publish(&repeat, "under another id").await;
    fleet.publish_nameless(&repeat).await;
    let placements = fleet.broker.streams().placements.clone();
    eventually("settled repeats", LONG, async || {
        match fleet.unsettled(&placements).await {
            1 => Ok(()),
            left => Err(format!("{left} instead of the one that runs")),
        }
    })
    .await
    .unwrap();
    assert_eq!(fleet.stored(&endless).await, None);
    let (tenant, id) = (endless.tenant.clone(), endless.id);
    let cancel = ControlMessage::CancelTask { tenant, task: id };
    fleet.hint(&cancel).await;
    let ended = fleet.terminal(&endless).await;
    assert_eq!(ended.outcome, Outcome::Cancelled, "{}", ended.evidence);
    assert_eq!(ended.steps[0].stdout.whole(), Some(&b"true"[..]));
    fleet.settled().await;
    // From now on it is answered with what it came to.
    fleet.publish_nameless(&repeat).await;
    fleet.settled().await;
    assert_eq!(fleet.stored(&endless).await, Some(ended));
    assert_eq!(fleet.fake.executed(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_and_was_forgotten_is_not_run_again() {
    let fleet = Fleet::start(1).await;
    let session = fleet.open(SessionOptions::default()).await;
    let first = task(&[&["fake:print", "once"]]);
    let first = fleet.in_session(&session, first).await;
    fleet.terminal(&first).await;
    // What comes after it takes its place in the worker's memory.
    let flood: &[&str] = &["fake:flood", "32768"];
    for _ in 0..90 {
        let large = fleet.in_session(&session, task(&[flood; 12])).await;
        fleet.terminal(&large).await;
    }
    let ran = fleet.fake.executed();
    let name = fleet.broker.streams().terminals.clone();
    let stream = fleet.broker.jetstream().get_stream(&name).await.unwrap();
    stream.purge().await.unwrap();
    let placement = broker_schema::Placement {
        request_digest: String::new(),
        attempt: 1,
        sandbox: session,
        dispatched_at: broker_schema::Timestamp::now(),
        task: first.clone(),
    };
    fleet.publish(&placement, "again").await;
    let ended = fleet.terminal(&first).await;
    let end = (ended.outcome, ended.attribution);
    assert_eq!(end, (Outcome::DeadLettered, Attribution::Infrastructure));
    assert!(
        ended.evidence.contains("has run before"),
        "{}",
        ended.evidence
    );
    assert_eq!(fleet.fake.executed(), ran);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaving_worker_serves_sessions_until_they_pause() {
    let slow = Fleet::with(2, |options| {
        options.timings.session_grace = Duration::from_millis(500);
    });
    let fleet = Box::pin(slow).await;
    let session = fleet.open(SessionOptions::default()).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "800"]]);
    let running = fleet.in_session(&session, running).await;
    let queued = fleet.in_session(&session, task(&[&["true"]])).await;
    fleet.frames(&running, 1).await;
    fleet.shutdown.cancel();
    for task in [&running, &queued] {
        let ended = fleet.terminal(task).await;
        assert_eq!(ended.outcome, Outcome::Succeeded, "{}", ended.evidence);
        assert!(ended.kept);
    }
    assert!(fleet.tasks.wait(LONG).await, "the worker has left");
    assert_eq!(fleet.fake.alive(), 0);
    assert!(fleet.leases.leases().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_outlasts_the_drain_is_told_so() {
    let short = Fleet::with(1, |options| {
        options.timings.drain = Duration::from_millis(300);
    });
    let fleet = Box::pin(short).await;
    let session = fleet.open(SessionOptions::default()).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let running = fleet.in_session(&session, running).await;
    let queued = fleet.in_session(&session, task(&[&["true"]])).await;
    fleet.frames(&running, 1).await;
    fleet.shutdown.cancel();
    assert!(fleet.tasks.wait(LONG).await, "the worker has left");
    for (task, evidence) in [(&running, "stopped"), (&queued, "its worker was stopped")] {
        let ended = fleet.stored(task).await.unwrap();
        let end = (ended.outcome, ended.attribution);
        assert_eq!(end, (Outcome::SandboxLost, Attribution::Infrastructure));
        assert!(ended.evidence.contains(evidence), "{}", ended.evidence);
    }
    fleet.settled().await;
}
