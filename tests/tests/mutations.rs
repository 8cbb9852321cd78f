//! The checker works: each rule that is broken on purpose is found, and the same load with the
//! same fault is clean while the rule holds.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{Attribution, Outcome, PoolId, Step, TaskRequest, Terminal, Timestamp};
use futures::StreamExt as _;
use remuda_client::Client;
use remuda_client::broker::Outgoing;
use remuda_telemetry::TraceHeaders;
use remuda_telemetry::failpoint::{dispatcher, sidecar, worker};
use remuda_telemetry::history::Event;
use remuda_tests::check::{Invariant, Promises, Violation, check};
use remuda_tests::fleet::{self, Fleet, default_config};
use remuda_tests::history::{Ends, Log};
use remuda_tests::leftovers::{cgroups_of, descendants, mounts_beneath};
use remuda_tests::wait::eventually;
use serde_json::json;

const SEED: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(60);
/// What else is wrong where a daemon does not know the field `failpoints`.
const NEEDS: &str = "programs with the feature failpoints: run `cargo xtask build`";

/// A fleet that records, and on which points are set.
struct Watched {
    fleet: Fleet,
    log: Log,
    client: Client,
    random: Random,
}

/// Numbers that follow from the seed alone.
struct Random(u64);

impl Random {
    /// From `first` to `last`.
    fn between(&mut self, first: u64, last: u64) -> u64 {
        // Knuth's MMIX generator; its upper half is good enough for a load.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        first + (self.0 >> 33) % (last - first + 1)
    }

    /// A time in seconds.
    fn seconds(&mut self, first_ms: u64, last_ms: u64) -> f32 {
        Duration::from_millis(self.between(first_ms, last_ms)).as_secs_f32()
    }
}

/// What is set in every process: `name=actions`.
type Points<'a> = &'a [String];

fn set(name: &str, actions: &str) -> String {
    format!("{name}={actions}")
}

impl Watched {
    async fn start(points: Points<'_>) -> Self {
        let home = fleet::home().unwrap();
        let log = Log::in_folder(&home.path().join("history")).unwrap();
        let mut config = default_config();
        log.configure(&mut config).unwrap();
        for part in ["dispatcher", "worker"] {
            config[part]["telemetry"]["failpoints"] = json!(points.join(";"));
            // What nobody holds any more is free sooner.
            config[part]["redis"]["ttl"] = json!("6s");
        }
        config["dispatcher"]["timings"] = json!({"publish": "3s"});
        config["worker"]["timings"] = json!({"renew": "1s", "heartbeat": "1s"});
        let fleet = Fleet::start_in(home, config).await.expect(NEEDS);
        let client = fleet.recorded_client("mutations", &log).await.unwrap();
        Self {
            fleet,
            log,
            client,
            random: Random(SEED),
        }
    }

    fn task(&self, script: &str) -> TaskRequest {
        let pool: PoolId = "default".parse().unwrap();
        self.client
            .task(&pool, vec![Step::command(["sh", "-c", script])])
    }

    /// Waits for an event of a task.
    async fn event(&self, what: &str, is: impl Fn(&Event) -> bool) {
        eventually(what, PATIENCE, async || {
            let history = self.log.read()?;
            let seen = history.iter().any(|line| is(&line.event));
            anyhow::ensure!(seen, "{} events, none of them", history.lines.len());
            anyhow::Ok(())
        })
        .await
        .unwrap();
    }

    /// What the checker finds while the fleet runs.
    async fn judge(&self) -> Vec<Violation> {
        let ends = Ends::read(self.client.broker()).await.unwrap();
        check(&self.log.read().unwrap(), &ends, &promises())
    }

    /// What the checker finds once the fleet has ended and nothing may be left of it.
    async fn end_and_judge(self) -> Vec<Violation> {
        let mut ends = Ends::read(self.client.broker()).await.unwrap();
        let worker = self.fleet.pid("worker").unwrap();
        let processes = descendants(self.fleet.up().pid()).unwrap();
        let home = self.fleet.home();
        assert!(self.fleet.stop().await.unwrap().success());
        let running = processes.iter().filter(|seen| seen.runs());
        ends.leftovers
            .extend(running.map(|seen| format!("process {}", seen.pid)));
        let cgroups = cgroups_of(worker).unwrap();
        ends.leftovers.extend(
            cgroups
                .iter()
                .map(|path| format!("cgroup {}", path.display())),
        );
        ends.leftovers.extend(mounts_beneath(home.path()).unwrap());
        let history = self.log.read().unwrap();
        // Where nothing is written down nothing can be wrong.
        let kinds: BTreeSet<String> = history.iter().map(|line| kind(&line.event)).collect();
        let missing: Vec<&str> = OF_EVERY_TASK
            .into_iter()
            .filter(|kind| !kinds.contains(*kind))
            .collect();
        assert!(missing.is_empty(), "nobody recorded {missing:?}");
        check(&history, &ends, &promises())
    }
}

/// What the parts of a fleet record of every load.
const OF_EVERY_TASK: [&str; 17] = [
    "submitted",
    "accepted",
    "claimed",
    "placed",
    "created",
    "offered",
    "adopted",
    "operation",
    "entered",
    "command_began",
    "wrote",
    "command_ended",
    "frames_acked",
    "terminal_put",
    "terminal_read",
    "destroyed",
    "left",
];

/// The name that an event has in a history.
fn kind(event: &Event) -> String {
    let json = serde_json::to_value(event).unwrap();
    json["event"].as_str().unwrap().to_owned()
}

fn promises() -> Promises {
    Promises {
        within: PATIENCE,
        ..Promises::default()
    }
}

fn invariants(violations: &[Violation]) -> BTreeSet<Invariant> {
    violations
        .iter()
        .map(|violation| violation.invariant)
        .collect()
}

/// Runs a load with a fault, and with the fault and the mutation.
async fn proves(
    fault: &[String],
    mutation: &str,
    expected: &[Invariant],
    load: impl AsyncFn(&mut Watched),
) {
    let mut sound = Watched::start(fault).await;
    load(&mut sound).await;
    let violations = sound.end_and_judge().await;
    assert!(
        violations.is_empty(),
        "without the mutation: {}",
        shown(&violations)
    );

    let points: Vec<String> = fault
        .iter()
        .cloned()
        .chain([set(mutation, "return")])
        .collect();
    let mut broken = Watched::start(&points).await;
    load(&mut broken).await;
    let violations = broken.judge().await;
    // What it breaks, and nothing else.
    let expected = expected.iter().copied().collect();
    assert_eq!(
        invariants(&violations),
        expected,
        "{mutation}: {}",
        shown(&violations)
    );
    // Every violation says what shows it.
    assert!(
        violations
            .iter()
            .any(|violation| !violation.events.is_empty())
    );
}

fn shown(violations: &[Violation]) -> String {
    let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
    format!("{} violations\n{}", texts.len(), texts.join("\n"))
}

/// Tasks that somebody else ends while they run: two terminals race.
async fn ended_by_another(watched: &mut Watched) {
    let mut racing = Vec::new();
    for _ in 0..4 {
        let seconds = watched.random.seconds(700, 1200);
        let request = watched.task(&format!("echo begun; sleep {seconds}; echo ended"));
        let submitted = watched.client.submit(request.clone()).await.unwrap();
        racing.push((request, submitted));
    }
    for (request, submitted) in &mut racing {
        let id = request.id.to_string();
        watched
            .event(
                "command that runs",
                |event| matches!(event, Event::CommandBegan { task, .. } if *task == id),
            )
            .await;
        let theirs = cancelled(request, submitted.request_digest());
        let trace = TraceHeaders::default();
        let broker = watched.client.broker();
        broker
            .put_terminal(&theirs, Format::MessagePack, &trace, PATIENCE)
            .await
            .unwrap();
    }
    for (request, mut submitted) in racing {
        submitted.terminal().await.unwrap();
        let id = request.id.to_string();
        // Its worker's comes too, whoever was first.
        watched
            .event(
                "terminal of its worker",
                |event| matches!(event, Event::TerminalPut { task, .. } if *task == id),
            )
            .await;
    }
}

fn cancelled(request: &TaskRequest, digest: &str) -> Terminal {
    let mut terminal: Terminal = serde_json::from_value(json!({
        "task": request.id, "tenant": request.tenant, "run": request.run, "pool": request.pool,
        "attempt": 0, "outcome": Outcome::Cancelled, "attribution": Attribution::User,
        "request_digest": digest,
    }))
    .unwrap();
    terminal.times.finished = Timestamp::now();
    terminal
}

#[tokio::test]
async fn a_gate_that_is_off_is_caught() {
    proves(
        &[],
        dispatcher::NO_GATE,
        &[Invariant::I1, Invariant::I2],
        ended_by_another,
    )
    .await;
}

/// Short tasks, one after another.
async fn one_by_one(watched: &mut Watched) {
    for _ in 0..10 {
        let lines = watched.random.between(1, 50);
        let request = watched.task(&format!("seq {lines}; echo done >&2"));
        assert_eq!(
            watched.client.run(request).await.unwrap().outcome,
            Outcome::Succeeded
        );
    }
}

#[tokio::test]
async fn an_epoch_check_that_is_skipped_is_caught() {
    proves(
        &[set(worker::ZOMBIE, "return")],
        sidecar::NO_EPOCH_CHECK,
        &[Invariant::I3, Invariant::I6],
        one_by_one,
    )
    .await;
}

#[tokio::test]
async fn a_reset_that_is_skipped_is_caught() {
    proves(&[], worker::NO_RESET, &[Invariant::I4], one_by_one).await;
}

/// Tasks that print much more than one frame, and are read to their end.
async fn long_output(watched: &mut Watched) {
    for _ in 0..3 {
        let lines = watched.random.between(100_000, 150_000);
        let request = watched.task(&format!("seq {lines}"));
        let mut output = Box::pin(watched.client.stream(request).await.unwrap().into_stream());
        // What is damaged is the checker's to find.
        while let Some(Ok(_)) = output.next().await {}
    }
}

#[tokio::test]
async fn an_acknowledgement_that_is_ignored_is_caught() {
    proves(
        &[set(worker::FRAME_LOST, "3*off->1*return->5*off->1*return")],
        worker::NO_FRAME_ACK,
        &[Invariant::I5],
        long_output,
    )
    .await;
}

/// Requests that come a second time while the first runs, as after a restart that made the
/// server forget their ids.
async fn delivered_twice(watched: &mut Watched) {
    let mut running = Vec::new();
    for n in 0..2 {
        let seconds = watched.random.seconds(1500, 2500);
        let request = watched.task(&format!("sleep {seconds}"));
        let submitted = watched.client.submit(request.clone()).await.unwrap();
        let id = request.id.to_string();
        watched
            .event(
                "claim",
                |event| matches!(event, Event::Claimed { task, .. } if *task == id),
            )
            .await;
        let broker = watched.client.broker();
        let again = Outgoing {
            subject: broker.subjects().request(&request.tenant, &request.pool),
            message_id: Some(format!("again-{n}")),
            payload: codec::encode(&request, Format::MessagePack).unwrap().into(),
            ..Outgoing::default()
        };
        broker.publish(again, PATIENCE).await.unwrap();
        running.push(submitted);
    }
    for mut submitted in running {
        submitted.terminal().await.unwrap();
    }
}

#[tokio::test]
async fn a_claim_that_is_not_atomic_is_caught() {
    proves(&[], dispatcher::NO_CLAIM, &[Invariant::I7], delivered_twice).await;
}
