//! Whose doing an end is, with real sandboxes: what the code in one can cause is never the
//! infrastructure's, and what it cannot cause is never its own. `docs/blame.md` names these tests.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use broker_schema::{
    Attribution, Command, ErrorCode, FileRead, Outcome, PoolId, RequestLimits, SessionOptions,
    Step, StepKind, TaskRequest, Terminal, Timestamp,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remuda_client::{Client, Session};
use remuda_lease::{LeaseOptions, LeaseStore};
use remuda_telemetry::task::spawn;
use remuda_tests::binaries::workspace;
use remuda_tests::fleet::{Fleet, SharedFleet};
use remuda_tests::wait::eventually;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    client: Client,
    fleet: Arc<Fleet>,
}

impl World {
    async fn new(run: &str) -> Self {
        static FLEET: SharedFleet = SharedFleet::new();
        let config = || {
            json!({"pools": [{"name": "default", "warm": 3, "max": 16, "limits": {
                "memory_bytes": 128 << 20, "pids": 48, "disk_bytes": 24 << 20, "inodes": 2048,
                "open_files": 64,
            }}]})
        };
        let fleet = FLEET.get(config).await.unwrap();
        let client = fleet.client(run).await.unwrap();
        Self { client, fleet }
    }

    fn task(&self, steps: Vec<Step>) -> TaskRequest {
        self.client.task(&pool(), steps)
    }

    async fn run(&self, steps: Vec<Step>) -> Terminal {
        self.client.run(self.task(steps)).await.unwrap()
    }

    async fn session(&self) -> Session {
        let options = SessionOptions::default();
        self.client.open_session(&pool(), options).await.unwrap()
    }
}

fn pool() -> PoolId {
    "default".parse().unwrap()
}

fn shell(script: &str) -> Vec<Step> {
    vec![Step::command(["sh", "-c", script])]
}

fn python(program: &str) -> Vec<Step> {
    vec![Step::command(["python3", "-c", program])]
}

fn read(path: &str) -> Step {
    Step {
        name: String::new(),
        action: StepKind::FileRead(FileRead {
            path: path.to_owned(),
            ..FileRead::default()
        }),
    }
}

#[track_caller]
fn judged(terminal: &Terminal, outcome: Outcome, attribution: Attribution, evidence: &str) {
    let found = (terminal.outcome, terminal.attribution);
    assert_eq!(found, (outcome, attribution), "{terminal:#?}");
    assert!(
        terminal.evidence.contains(evidence),
        "{}",
        terminal.evidence
    );
}

#[track_caller]
fn policys(terminal: &Terminal, outcome: Outcome, evidence: &str) {
    judged(terminal, outcome, Attribution::Policy, evidence);
    assert_eq!(terminal.attempt, 1, "it was not tried again");
}

fn printed(terminal: &Terminal) -> String {
    let steps = terminal.steps.iter();
    steps.map(|step| step.stdout.head.text()).collect()
}

#[tokio::test]
async fn an_exit_code_is_the_policys() {
    let world = World::new("exit").await;
    let good = world.run(shell("exit 0")).await;
    policys(&good, Outcome::Succeeded, "every step exited with 0");
    let bad = world.run(shell("exit 3")).await;
    policys(&bad, Outcome::Failed, "step 0 exited with 3");
}

#[tokio::test]
async fn a_signal_from_inside_is_the_policys() {
    let world = World::new("signal").await;
    for (signal, code) in [(9, 137), (11, 139), (15, 143)] {
        let ended = world.run(shell(&format!("kill -{signal} $$"))).await;
        policys(
            &ended,
            Outcome::Failed,
            &format!("ended by signal {signal}"),
        );
        assert_eq!(ended.exit.unwrap().code, code);
    }
}

#[tokio::test]
async fn a_program_that_cannot_be_started_is_the_policys() {
    let world = World::new("start").await;
    for (program, code) in [
        ("no-such-program", ErrorCode::FileNotFound),
        ("/etc/passwd", ErrorCode::PermissionDenied),
    ] {
        let ended = world.run(vec![Step::command([program])]).await;
        policys(&ended, Outcome::Failed, "could not be started");
        assert_eq!(ended.error.unwrap().code, code);
    }
}

#[tokio::test]
async fn killing_everything_in_sight_hits_only_itself() {
    let world = World::new("kill-all").await;
    let session = world.session().await;
    let hit = "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass\nos.kill(-1, 9)";
    let ended = session.run(python(hit)).await.unwrap();
    policys(&ended, Outcome::Succeeded, "every step exited with 0");
    // As init, and by name.
    let ended = session.run(shell("kill -9 1; kill -STOP 1; exit 5")).await;
    policys(&ended.unwrap(), Outcome::Failed, "exited with 5");
    let after = session.run(shell("echo on")).await.unwrap();
    assert_eq!(printed(&after), "on\n", "the sidecar goes on");
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_time_out_is_the_policys() {
    let world = World::new("time").await;
    let step = Step {
        name: String::new(),
        action: StepKind::Command(Command {
            argv: vec!["sleep".into(), "50".into()],
            timeout_ms: Some(300),
            ..Command::default()
        }),
    };
    let ended = world.run(vec![step]).await;
    policys(
        &ended,
        Outcome::TimedOut,
        "step 0 took longer than its time-out",
    );
    let mut whole = world.task(shell("trap '' TERM INT; while :; do sleep 1; done"));
    whole.timeout_ms = Some(500);
    let ended = world.client.run(whole).await.unwrap();
    policys(
        &ended,
        Outcome::TimedOut,
        "the task took longer than its time-out",
    );
}

#[tokio::test]
async fn a_deadline_is_the_users() {
    let world = World::new("deadline").await;
    let mut task = world.task(shell("sleep 50"));
    task.deadline = Some(Timestamp::now().plus(Duration::from_secs(2)));
    let ended = world.client.run(task).await.unwrap();
    judged(
        &ended,
        Outcome::Expired,
        Attribution::User,
        "the deadline passed",
    );
    assert_eq!(ended.error.unwrap().code, ErrorCode::DeadlineExpired);
}

const HOG: &str = "kept = []\nwhile True: kept.append(bytearray(1 << 22))";

#[tokio::test]
async fn running_out_of_its_memory_is_the_policys() {
    let world = World::new("memory").await;
    let ended = world.run(python(HOG)).await;
    policys(&ended, Outcome::OomKilled, "OOM kills grew by");
    assert!(ended.steps[0].oom_killed);
    // A child is killed, and its parent makes the best of it.
    let parent = format!("import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HOG:?}])");
    let ended = world.run(python(&parent)).await;
    policys(&ended, Outcome::Succeeded, "OOM kills grew by");
}

#[tokio::test]
async fn memory_filled_for_later_tasks_is_the_policys() {
    let world = World::new("memory-later").await;
    let session = world.session().await;
    // Left behind: a process that holds nearly all of it.
    let left = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  kept = bytearray(100 << 20)\n  \
                open('/tmp/full', 'w').close()\n  time.sleep(600)";
    let wait = "for _ in $(seq 600); do [ -e /tmp/full ] && exit 0; sleep 0.1; done; exit 1";
    let ended = session
        .run([python(left), shell(wait)].concat())
        .await
        .unwrap();
    policys(&ended, Outcome::Succeeded, "every step exited with 0");
    for _ in 0..3 {
        let ended = session
            .run(python("kept = bytearray(64 << 20)\nprint(len(kept))"))
            .await
            .unwrap();
        assert_ne!(ended.attribution, Attribution::Infrastructure, "{ended:#?}");
    }
    session.close().await.unwrap();
}

/// Forks until it may not any more, and leaves all of them behind.
const BOMB: &str = "
import os, sys, time
try:
    while True:
        if os.fork() == 0:
            time.sleep(600)
except BlockingIOError:
    print('EAGAIN')
    sys.exit(7)
";

#[tokio::test]
async fn a_fork_bomb_is_the_policys() {
    let world = World::new("bomb").await;
    let session = world.session().await;
    let ended = session.run(python(BOMB)).await.unwrap();
    policys(&ended, Outcome::Failed, "exited with 7");
    assert_eq!(printed(&ended), "EAGAIN\n");
    // Nothing can be forked in there now, except by the sidecar.
    let ended = session.run(shell("true | true; exit 4")).await.unwrap();
    policys(&ended, Outcome::Failed, "step 0 exited with");
    let ended = session.run(vec![Step::command(["echo", "on"])]).await;
    policys(&ended.unwrap(), Outcome::Succeeded, "every step");
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_the_policys() {
    let world = World::new("disk").await;
    let session = world.session().await;
    let ended = session
        .run(shell("cat /dev/zero > /workspace/all; exit 6"))
        .await
        .unwrap();
    policys(&ended, Outcome::Failed, "exited with 6");
    assert!(ended.steps[0].stderr.head.text().contains("No space left"));
    let write = Step::write("more", vec![b'x'; 64 << 10]);
    let ended = session.run(vec![write.clone()]).await.unwrap();
    policys(&ended, Outcome::Failed, "step 0 failed");
    assert_eq!(ended.error.unwrap().code, ErrorCode::NoSpace);
    let ended = session.run([shell("rm all"), vec![write]].concat()).await;
    policys(&ended.unwrap(), Outcome::Succeeded, "every step");
    // And of inodes.
    let many = "i=0; while : > f$i; do i=$((i+1)); done 2> /dev/null; exit 8";
    let ended = session.run(shell(many)).await.unwrap();
    policys(&ended, Outcome::Failed, "exited with");
    let ended = session
        .run(vec![Step::write("one-more", "x")])
        .await
        .unwrap();
    policys(&ended, Outcome::Failed, "step 0 failed");
    assert_eq!(ended.error.unwrap().code, ErrorCode::NoSpace);
    session.close().await.unwrap();
}

#[tokio::test]
async fn running_out_of_descriptors_is_the_policys() {
    let world = World::new("files").await;
    let hog = "kept = []\nwhile True: kept.append(open('/dev/null'))";
    let ended = world.run(python(hog)).await;
    policys(&ended, Outcome::Failed, "exited with 1");
    assert!(
        ended.steps[0]
            .stderr
            .head
            .text()
            .contains("Too many open files")
    );
}

#[tokio::test]
async fn closed_standard_streams_are_the_policys() {
    let world = World::new("closed").await;
    let ended = world.run(shell("exec <&- >&- 2>&-; exit 9")).await;
    policys(&ended, Outcome::Failed, "exited with 9");
    // Somebody who stays holds the output; the step ends with its command all the same.
    let ended = world.run(shell("sleep 600 & echo out; exit 0")).await;
    policys(&ended, Outcome::Succeeded, "every step");
    assert_eq!(printed(&ended), "out\n");
}

#[tokio::test]
async fn a_processor_hog_does_not_keep_the_sidecar_from_answering() {
    let world = World::new("hog").await;
    let session = world.session().await;
    let spin = "import os\nfor _ in range(40):\n  if os.fork() == 0:\n    os.setsid()\n    while True: pass";
    let ended = session.run(python(spin)).await.unwrap();
    policys(&ended, Outcome::Succeeded, "every step");
    for n in 0..3 {
        let steps = vec![
            Step::command(["echo", "on"]),
            Step::write(format!("file-{n}"), "x"),
            read(&format!("file-{n}")),
        ];
        let ended = session.run(steps).await.unwrap();
        policys(&ended, Outcome::Succeeded, "every step");
    }
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_file_step_that_the_sandbox_forbids_is_the_policys() {
    let world = World::new("files-steps").await;
    let session = world.session().await;
    let made = "mkdir folder; mkfifo pipe; ln -s /etc/shadow link; ln -s ../../.. out; true";
    session.run(shell(made)).await.unwrap();
    for (step, code) in [
        (read("nothing"), ErrorCode::FileNotFound),
        (read("folder"), ErrorCode::NotAFile),
        (read("pipe"), ErrorCode::NotAFile),
        (Step::write("/etc/passwd", "x"), ErrorCode::PermissionDenied),
    ] {
        let ended = session.run(vec![step]).await.unwrap();
        policys(&ended, Outcome::Failed, "step 0 failed");
        assert_eq!(ended.error.unwrap().code, code);
    }
    for path in ["link", "out/etc/shadow"] {
        let ended = session.run(vec![read(path)]).await.unwrap();
        judged(
            &ended,
            Outcome::Failed,
            Attribution::Policy,
            "step 0 failed",
        );
    }
    session.close().await.unwrap();
}

#[tokio::test]
async fn output_beyond_its_limit_is_dropped_and_blames_nobody() {
    let world = World::new("output").await;
    let step = Step {
        name: String::new(),
        action: StepKind::Command(Command {
            argv: ["head", "-c", "1000000", "/dev/zero"]
                .map(Into::into)
                .into(),
            output_limit: Some(1000),
            ..Command::default()
        }),
    };
    let ended = world.run(vec![step]).await;
    policys(&ended, Outcome::Succeeded, "every step");
    let stdout = &ended.steps[0].stdout;
    assert_eq!((stdout.bytes, stdout.dropped), (1_000_000, 999_000));
}

/// The sidecar above the command line of a sandboxed process, as this host sees it.
async fn sidecar_of(marker: &str) -> Pid {
    let find = || {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            if words.first() != Some(&b"sleep".as_slice()) || !words.contains(&marker.as_bytes()) {
                continue;
            }
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            return parent
                .and_then(|pid| pid.trim().parse().ok())
                .map(Pid::from_raw);
        }
        None
    };
    eventually("command in a sandbox", PATIENCE, async || {
        find().ok_or("there is none yet")
    })
    .await
    .unwrap()
}

/// A command that can be found among the host's processes; the second time it ends at once.
fn marked(marker: &str) -> Vec<Step> {
    vec![Step::command(["sleep", marker])]
}

async fn sidecar_fault(world: &World, marker: &str, signal: Signal) -> (Terminal, Terminal) {
    // Each runs in a sandbox of its own; the marker says how long, and which.
    let one_shot = world.task(marked(marker));
    let mut one_shot = world.client.submit(one_shot).await.unwrap();
    kill(sidecar_of(marker).await, signal).unwrap();
    let one_shot = one_shot.terminal().await.unwrap();

    let session = world.session().await;
    let inner = session.clone();
    let long = format!("{marker}1");
    let steps = marked(&long);
    let running = spawn("test", async move { inner.run(steps).await });
    kill(sidecar_of(&long).await, signal).unwrap();
    let lost = running.await.unwrap().unwrap();
    let after = session.run(shell("true")).await.unwrap();
    judged(
        &after,
        Outcome::SandboxLost,
        Attribution::Infrastructure,
        "destroyed after an earlier task",
    );
    (one_shot, lost)
}

#[tokio::test]
async fn a_killed_sidecar_is_the_infrastructures_and_its_task_runs_again() {
    let world = World::new("sidecar-killed").await;
    let (one_shot, lost) = sidecar_fault(&world, "7.25", Signal::SIGKILL).await;
    judged(
        &one_shot,
        Outcome::Succeeded,
        Attribution::Policy,
        "every step",
    );
    assert_eq!(one_shot.attempt, 2);
    judged(
        &lost,
        Outcome::SandboxLost,
        Attribution::Infrastructure,
        "the sidecar is gone",
    );
    assert_eq!(lost.error.unwrap().code, ErrorCode::SandboxLost);
}

#[tokio::test]
async fn a_hung_sidecar_is_the_infrastructures_and_its_task_runs_again() {
    let world = World::new("sidecar-hung").await;
    let (one_shot, lost) = sidecar_fault(&world, "6.75", Signal::SIGSTOP).await;
    judged(
        &one_shot,
        Outcome::Succeeded,
        Attribution::Policy,
        "every step",
    );
    assert_eq!(one_shot.attempt, 2);
    judged(
        &lost,
        Outcome::SandboxLost,
        Attribution::Infrastructure,
        "did not answer",
    );
    assert!(world.fleet.pid("worker").is_ok());
}

#[tokio::test]
async fn an_idle_sessions_dead_sidecar_is_the_infrastructures() {
    let world = World::new("sidecar-idle").await;
    let session = world.session().await;
    let ended = session.run(shell("sleep 601.5 & exit 0")).await.unwrap();
    policys(&ended, Outcome::Succeeded, "every step");
    // The shell has ended: its child is the sidecar's now.
    kill(sidecar_of("601.5").await, Signal::SIGKILL).unwrap();
    let after = session.run(shell("true")).await.unwrap();
    let infrastructure = Attribution::Infrastructure;
    judged(&after, Outcome::SandboxLost, infrastructure, "sidecar");
}

#[tokio::test]
async fn a_session_that_was_closed_or_has_expired_is_the_users() {
    let world = World::new("expired").await;
    let options = LeaseOptions {
        url: world.fleet.redis().to_owned(),
        ..LeaseOptions::default()
    };
    let leases = LeaseStore::connect(&options).await.unwrap();
    let closed = world.session().await;
    closed.close().await.unwrap();
    let late = closed.run(shell("true")).await.unwrap();
    judged(&late, Outcome::SandboxLost, Attribution::User, "closed");
    assert_eq!(late.error.unwrap().code, ErrorCode::SessionClosed);
    for (options, evidence) in [
        (
            SessionOptions {
                idle_timeout_ms: 200,
                ..SessionOptions::default()
            },
            "200 ms, its idle_timeout_ms",
        ),
        (
            SessionOptions {
                max_life_ms: 300,
                ..SessionOptions::default()
            },
            "300 ms, its max_life_ms",
        ),
    ] {
        let session = world.client.open_session(&pool(), options).await.unwrap();
        // A task would keep it from idling: its lease tells when it is over.
        let sandbox = session.sandbox().sandbox;
        eventually("expired session", PATIENCE, async || {
            let leases = leases.leases().await.map_err(|error| error.to_string())?;
            match leases.iter().find(|lease| lease.sandbox.sandbox == sandbox) {
                None => Ok(()),
                Some(lease) => Err(format!("{lease:?}")),
            }
        })
        .await
        .unwrap();
        let late = session.run(shell("true")).await.unwrap();
        judged(&late, Outcome::SandboxLost, Attribution::User, evidence);
        assert_eq!(late.error.unwrap().code, ErrorCode::SessionExpired);
    }
}

#[tokio::test]
async fn a_bad_request_is_the_users() {
    let world = World::new("bad").await;
    let session = world.session().await;
    // Past the client's own check, as a client of another make may send it.
    let mut bad = session.task(vec![Step::command([""])]);
    assert!(bad.validate(&RequestLimits::default()).is_err());
    bad.session = Some(session.sandbox().clone());
    let broker = world.client.broker();
    let placement = broker_schema::Placement {
        request_digest: String::new(),
        attempt: 1,
        sandbox: session.sandbox().clone(),
        dispatched_at: Timestamp::now(),
        task: bad.clone(),
    };
    let sandbox = session.sandbox();
    let message = remuda_client::broker::Outgoing {
        subject: broker
            .subjects()
            .placement(&sandbox.worker, &bad.tenant, sandbox.sandbox),
        message_id: Some(placement.message_id()),
        payload: serde_json::to_vec(&placement).unwrap().into(),
        format: broker_schema::codec::Format::Json,
        ..Default::default()
    };
    broker.publish(message, PATIENCE).await.unwrap();
    let ended = eventually("terminal", PATIENCE, async || {
        let found = broker.terminal_of(&bad.tenant, &bad.run, bad.id).await;
        found.unwrap().ok_or("there is none yet")
    })
    .await
    .unwrap();
    judged(&ended, Outcome::Rejected, Attribution::User, "not valid");
    assert_eq!(ended.error.unwrap().code, ErrorCode::EmptyArgv);
    session.close().await.unwrap();
}

/// The rows of the table in `docs/blame.md`, cell by cell.
fn rows() -> Vec<Vec<String>> {
    let page = std::fs::read_to_string(workspace().join("docs/blame.md")).unwrap();
    let (_, tables) = page.split_once("## What the code did").unwrap();
    let rows = tables.lines().filter(|line| line.starts_with("| "));
    let cells = |line: &str| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
    };
    rows.map(cells)
        .filter(|row| {
            row.first()
                .is_some_and(|cell| cell != "what happens" && !cell.starts_with("---"))
        })
        .collect()
}

#[test]
fn every_row_of_the_table_has_its_test() {
    let rows = rows();
    assert!(rows.len() >= 40, "{} rows", rows.len());
    let mut events = BTreeSet::new();
    for row in &rows {
        let [event, outcome, attribution, evidence, again, test] = row.as_slice() else {
            panic!("a row has {} cells: {row:?}", row.len());
        };
        assert!(events.insert(event), "{event} is there twice");
        assert!(!evidence.is_empty() && !again.is_empty(), "{event}");
        let outcomes = [
            Outcome::Succeeded,
            Outcome::Failed,
            Outcome::TimedOut,
            Outcome::OomKilled,
            Outcome::Cancelled,
            Outcome::Expired,
            Outcome::Rejected,
            Outcome::SandboxLost,
            Outcome::DeadLettered,
        ];
        let known = outcome.split(" or ").all(|word| {
            let word = word.trim_matches('`');
            word == "of the next attempt" || outcomes.iter().any(|known| known.as_str() == word)
        });
        assert!(known, "{event}: outcome {outcome:?}");
        let known = ["policy", "user", "infrastructure", "–"];
        assert!(
            known.contains(&attribution.as_str()),
            "{event}: {attribution:?}"
        );
        let (file, name) = test.trim_matches('`').split_once("::").unwrap();
        let source = std::fs::read_to_string(workspace().join(file));
        let source = source.unwrap_or_else(|error| panic!("{event}: {file}: {error}"));
        let defined = source.contains(&format!("fn {name}("));
        assert!(defined, "{event}: no test {name} in {file}");
    }
}
