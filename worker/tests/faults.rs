//! What a worker says of faults that no sandboxed code can cause, with real servers and fake
//! sandboxes.

mod support;

use std::time::Duration;

use broker_schema::{
    Attribution, Epoch, ErrorCode, Outcome, SandboxId, SessionOptions, Terminal, Timestamp,
};
use remuda_lease::Held;
use remuda_tests::wait::eventually;
use support::{Fleet, LONG, task};

#[track_caller]
fn judged(terminal: &Terminal, outcome: Outcome, attribution: Attribution, evidence: &str) {
    let found = (terminal.outcome, terminal.attribution);
    assert_eq!(found, (outcome, attribution), "{}", terminal.evidence);
    assert!(
        terminal.evidence.contains(evidence),
        "{}",
        terminal.evidence
    );
}

const INFRASTRUCTURE: Attribution = Attribution::Infrastructure;

/// Runs a script alone, which goes back, and in a session, whose terminal this is.
async fn alone_and_in_a_session(fleet: &Fleet, script: &[&str]) -> Terminal {
    let alone = task(&[script]);
    fleet.submit(&alone).await;
    fleet.returned(&alone).await;
    let session = fleet.open(SessionOptions::default()).await;
    let inside = fleet.in_session(&session, task(&[script])).await;
    let terminal = fleet.terminal(&inside).await;
    fleet.settled().await;
    terminal
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_talks_nonsense_loses_its_sandbox() {
    let fleet = Fleet::start(2).await;
    let ended = Box::pin(alone_and_in_a_session(
        &fleet,
        &["fake:print", "x", "fake:garble"],
    ))
    .await;
    judged(&ended, Outcome::SandboxLost, INFRASTRUCTURE, "nonsense");
    assert_eq!(ended.error.unwrap().code, ErrorCode::SandboxLost);
    fleet.leased(0).await;
    fleet.alive(2).await;
    assert_eq!(fleet.fake.made(), 4, "both are destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_hangs_is_asked_and_given_up() {
    let fleet = Fleet::start(3).await;
    // The command's own time is not waited for.
    let mut alone = task(&[&["fake:print", "x", "fake:hang"]]);
    alone.timeout_ms = Some(3_600_000);
    fleet.submit(&alone).await;
    let session = fleet.open(SessionOptions::default()).await;
    let mut inside = task(&[&["fake:hang"]]);
    inside.timeout_ms = Some(3_600_000);
    let inside = fleet.in_session(&session, inside).await;
    fleet.returned(&alone).await;
    let ended = fleet.terminal(&inside).await;
    judged(
        &ended,
        Outcome::SandboxLost,
        INFRASTRUCTURE,
        "did not answer",
    );
    fleet.settled().await;
    fleet.alive(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_killed_has_timed_out() {
    let fleet = Fleet::start(1).await;
    let session = fleet.open(SessionOptions::default()).await;
    let mut stuck = task(&[&["fake:immortal"]]);
    stuck.timeout_ms = Some(100);
    let stuck = fleet.in_session(&session, stuck).await;
    let ended = fleet.terminal(&stuck).await;
    let policy = Attribution::Policy;
    judged(&ended, Outcome::TimedOut, policy, "outlived SIGKILL");
    assert!(!ended.kept);
    let late = fleet.in_session(&session, task(&[&["true"]])).await;
    let late = fleet.terminal(&late).await;
    judged(&late, Outcome::SandboxLost, policy, "timed_out");
    fleet.alive(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_out_of_memory_is_not_the_policys() {
    let fleet = Fleet::start(2).await;
    let ended = Box::pin(alone_and_in_a_session(&fleet, &["fake:host-oom"])).await;
    judged(
        &ended,
        Outcome::OomKilled,
        INFRASTRUCTURE,
        "the host ran out",
    );
    assert!(ended.kept, "its sandbox is as good as before");
    // Its own limit still counts.
    let own = task(&[&["fake:oom"]]);
    fleet.warm(2).await;
    fleet.submit(&own).await;
    let ended = fleet.terminal(&own).await;
    judged(&ended, Outcome::OomKilled, Attribution::Policy, "grew by 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_its_lease_is_the_infrastructures() {
    let fleet = Fleet::start(1).await;
    let session = fleet.open(SessionOptions::default()).await;
    let running = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let running = fleet.in_session(&session, running).await;
    fleet.frames(&running, 1).await;
    let key = format!("{{remuda}}:sandbox:{}", session.sandbox);
    fleet.redis.command(&["DEL", &key]).await.unwrap();
    let ended = fleet.terminal(&running).await;
    judged(&ended, Outcome::SandboxLost, INFRASTRUCTURE, "lease");
    assert_eq!(ended.error.unwrap().code, ErrorCode::StaleEpoch);
    let late = fleet.in_session(&session, task(&[&["true"]])).await;
    let late = fleet.terminal(&late).await;
    judged(&late, Outcome::SandboxLost, INFRASTRUCTURE, "lease");
    assert_eq!(late.error.unwrap().code, ErrorCode::StaleEpoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_renew_kills_what_it_holds() {
    let short = Fleet::with(2, |options| {
        options.redis.ttl = Duration::from_secs(4);
        options.redis.timeout = Duration::from_millis(500);
    });
    let fleet = Box::pin(short).await;
    let session = fleet.open(SessionOptions::default()).await;
    fleet.warm(2).await;
    let alone = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    fleet.submit(&alone).await;
    fleet.frames(&alone, 1).await;
    let inside = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let inside = fleet.in_session(&session, inside).await;
    fleet.frames(&inside, 1).await;
    fleet.redis.pause().await.unwrap();
    // Nobody can be asked: what is leased ends by itself, and says nothing. What is idle stays.
    eventually("end of what was leased", LONG, async || {
        match fleet.fake.made() - fleet.fake.alive() {
            2.. => Ok(()),
            found => Err(format!("{found} ended")),
        }
    })
    .await
    .unwrap();
    assert!(fleet.stored(&alone).await.is_none());
    assert!(fleet.stored(&inside).await.is_none());
    fleet.redis.resume().await.unwrap();
    // Their messages come again after a while.
    let ended = fleet.terminal(&inside).await;
    judged(
        &ended,
        Outcome::SandboxLost,
        INFRASTRUCTURE,
        "renewed in time",
    );
    assert_eq!(ended.error.unwrap().code, ErrorCode::StaleEpoch);
    fleet.returned(&alone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_the_infrastructure_used_up_is_its_own() {
    let fleet = Fleet::start(1).await;
    // The deadline passes while nobody knows yet that the sidecar hangs.
    let mut late = task(&[&["fake:hang"]]);
    late.deadline = Some(Timestamp::now().plus(Duration::from_secs(3)));
    fleet.submit(&late).await;
    let ended = fleet.terminal(&late).await;
    judged(
        &ended,
        Outcome::Expired,
        INFRASTRUCTURE,
        "the last attempt failed",
    );
    assert_eq!(ended.error.unwrap().code, ErrorCode::DeadlineExpired);
}

/// The registry after a partition: it has what is not here, and lacks what is.
#[tokio::test(flavor = "multi_thread")]
async fn the_registry_and_the_worker_are_made_the_same_in_both_directions() {
    let fleet = Fleet::start(3).await;
    let held = async || fleet.leases.held(&fleet.worker).await.unwrap();
    let before = held().await;
    assert_eq!(before.len(), 3);
    let lost = *before.keys().next().unwrap();
    // It lacks one that is idle here, and does not know of one that is leased here.
    let running = task(&[&["fake:print", "x", "fake:sleep", "600000"]]);
    let placement = fleet.submit(&running).await;
    fleet.frames(&running, 1).await;
    let warm: Vec<SandboxId> = held()
        .await
        .into_iter()
        .filter(|(_, held)| matches!(held, Held::Warm { .. }))
        .map(|(id, _)| id)
        .collect();
    let lacking = warm.iter().find(|id| **id != lost).unwrap_or(&warm[0]);
    let key = |id: &SandboxId| format!("{{remuda}}:sandbox:{id}");
    let held_key = format!("{{remuda}}:held:{}", fleet.worker);
    // It has an idle one and a leased one that never were.
    let (ghost, ghost_lease) = (SandboxId::new(), SandboxId::new());
    let incarnation = placement.sandbox.epoch.incarnation().to_string();
    let worker = fleet.worker.to_string();
    let mut commands: Vec<Vec<String>> = Vec::new();
    let mut say = |words: &[&str]| commands.push(words.iter().map(|w| (*w).to_owned()).collect());
    for (id, state) in [(&ghost, "warm"), (&ghost_lease, "leased")] {
        say(&[
            "HSET",
            &key(id),
            "worker",
            &worker,
            "pool",
            "p",
            "state",
            state,
            "incarnation",
            &incarnation,
            "counter",
            "4000",
            "until",
            "99999999999999",
            "tenant",
            "t",
            "task",
            &running.id.to_string(),
        ]);
        say(&["SADD", &held_key, &id.to_string()]);
    }
    say(&["ZADD", "{remuda}:warm:p", "0", &ghost.to_string()]);
    say(&["DEL", &key(lacking)]);
    say(&["ZREM", "{remuda}:warm:p", &lacking.to_string()]);
    say(&["SREM", &held_key, &lacking.to_string()]);
    say(&["DEL", &key(&placement.sandbox.sandbox)]);
    for words in &commands {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        fleet.redis.command(&words).await.unwrap();
    }
    // The leased one is let go, and its task goes back.
    fleet.returned(&running).await;
    eventually("same on both sides", LONG, async || {
        let now = held().await;
        let ghosts = now.contains_key(&ghost) || now.contains_key(&ghost_lease);
        let warm = now
            .values()
            .filter(|held| matches!(held, Held::Warm { .. }));
        match (ghosts, now.contains_key(lacking), warm.count(), now.len()) {
            (false, true, 3, 3) => Ok(()),
            _ => Err(format!("{now:?}")),
        }
    })
    .await
    .unwrap();
    fleet.warm(3).await;
    fleet.alive(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_whose_lease_is_over_is_not_run() {
    let fleet = Fleet::start(2).await;
    let mut placement = fleet.claim(&task(&[&["fake:print", "x"]])).await;
    // By its own clock it was long under way; the registry has let go of its lease.
    placement.dispatched_at = Timestamp(placement.dispatched_at.0 - 3_600_000_000);
    let sandbox = &placement.sandbox;
    assert!(
        fleet
            .leases
            .release(&fleet.worker, sandbox.sandbox, sandbox.epoch, None)
            .await
            .unwrap()
    );
    fleet.publish(&placement, "late").await;
    fleet.returned(&placement.task).await;
    // A clock that is an hour off keeps nobody from working.
    let mut skewed = fleet.claim(&task(&[&["fake:print", "x"]])).await;
    skewed.dispatched_at = Timestamp(skewed.dispatched_at.0 + 3_600_000_000);
    fleet.publish(&skewed, "skewed").await;
    let ended = fleet.terminal(&skewed.task).await;
    assert_eq!(ended.outcome, Outcome::Succeeded, "{}", ended.evidence);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_of_another_incarnation_goes_back() {
    let fleet = Fleet::start(1).await;
    let mut placement = fleet.claim(&task(&[&["true"]])).await;
    let epoch = placement.sandbox.epoch;
    placement.sandbox.epoch = Epoch::new(epoch.incarnation() - 1, epoch.counter());
    fleet.publish(&placement, "stale").await;
    fleet.returned(&placement.task).await;
}
