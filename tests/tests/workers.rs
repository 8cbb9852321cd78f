//! Workers that die, leave and are replaced, and sessions without a dispatcher: real processes,
//! real sandboxes.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use broker_schema::{
    Attribution, ErrorCode, Outcome, PoolId, SessionOptions, Step, TaskRequest, Terminal,
};
use futures::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remuda_client::{Client, Session};
use remuda_telemetry::task::spawn;
use remuda_tests::cluster::{Cluster, Member};
use remuda_tests::leftovers::cgroups_of;
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
/// What the fleet promises.
const RUNS_AGAIN_WITHIN: Duration = Duration::from_secs(15);

fn pools(warm: u32, max: u32) -> Value {
    json!([{"name": "default", "warm": warm, "max": max, "limits": {
        "memory_bytes": 128 << 20, "pids": 64, "disk_bytes": 32 << 20, "inodes": 4096,
    }}])
}

fn pool() -> PoolId {
    "default".parse().unwrap()
}

fn shell(script: &str) -> Vec<Step> {
    vec![Step::command(["sh", "-c", script])]
}

async fn session(client: &Client) -> Session {
    let options = SessionOptions::default();
    client.open_session(&pool(), options).await.unwrap()
}

fn printed(terminal: &Terminal) -> String {
    let steps = terminal.steps.iter();
    steps.map(|step| step.stdout.head.text()).collect()
}

/// Waits until one of these has a task or a session; which.
async fn holder<'a>(cluster: &Cluster, members: &'a [Member], leases: usize) -> &'a Member {
    let store = cluster.leases().await.unwrap();
    eventually("leases of one worker", PATIENCE, async || {
        let workers = store.workers().await.map_err(|error| error.to_string())?;
        let found = members.iter().find(|member| {
            let mut mine = workers.iter().filter(|info| member.is(info));
            mine.any(|info| {
                let leased = info.record.pools.values().map(|count| count.leased);
                leased.sum::<u32>() as usize >= leases
            })
        });
        found.ok_or_else(|| "nobody has them".to_owned())
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_workers_tasks_run_again_elsewhere_in_time_and_its_sessions_end() {
    let cluster = Cluster::start(pools(4, 16)).await.unwrap();
    let first = cluster.worker("first", 4).await.unwrap();
    let client = cluster.client("killed").await.unwrap();
    let session = session(&client).await;
    // One has said something already, the other has not.
    let request = client.task(&pool(), shell("echo up; sleep 10; echo done"));
    let mut one_shot = client.submit(request).await.unwrap();
    let quiet = client.task(&pool(), shell("sleep 10; echo done"));
    let mut second_one = client.submit(quiet).await.unwrap();
    let members = [first];
    holder(&cluster, &members, 3).await;
    let stuck = session.task(shell("sleep 50"));
    let stuck_id = stuck.id;
    let in_session = {
        let session = session.clone();
        spawn("test", async move { session.run_task(stuck).await })
    };
    eventually("session task that runs", PATIENCE, async || {
        let leases = cluster.leases().await.unwrap().leases().await.unwrap();
        let found = leases.iter().any(|lease| lease.task == Some(stuck_id));
        found.then_some(()).ok_or("it is not written down yet")
    })
    .await
    .unwrap();
    let [first] = members;

    let second = cluster.worker("second", 0).await.unwrap();
    let killed = Instant::now();
    first.process.signal(Signal::SIGKILL).unwrap();
    first.process.wait_exit(PATIENCE).await.unwrap();
    let members = [second];
    holder(&cluster, &members, 2).await;
    let took = killed.elapsed();
    println!("one-shot tasks of a killed worker ran again after {took:?}");
    assert!(took < RUNS_AGAIN_WITHIN, "{took:?}");

    for submitted in [&mut one_shot, &mut second_one] {
        let terminal = submitted.terminal().await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
        assert_eq!(terminal.attempt, 2);
        assert!(printed(&terminal).ends_with("done\n"));
    }
    let terminal = in_session.await.unwrap().unwrap();
    assert_eq!(terminal.outcome, Outcome::SandboxLost);
    assert_eq!(terminal.attribution, Attribution::Infrastructure);
    assert_eq!(terminal.error.unwrap().code, ErrorCode::SandboxLost);
    assert!(
        terminal.evidence.contains("is gone"),
        "{}",
        terminal.evidence
    );
    // One that comes later is told the same.
    let late = session.run(shell("true")).await.unwrap();
    assert_eq!(late.outcome, Outcome::SandboxLost);
    assert_eq!(late.attribution, Attribution::Infrastructure);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_while_no_dispatcher_is_up() {
    let mut cluster = Cluster::start(pools(2, 8)).await.unwrap();
    let _worker = cluster.worker("only", 2).await.unwrap();
    let client = cluster.client("headless").await.unwrap();
    let sessions = [session(&client).await, session(&client).await];
    cluster.kill_dispatcher().await.unwrap();
    // Far beyond the life of a lease that nobody renews.
    let until = Instant::now() + Duration::from_secs(18);
    let mut turns = 0;
    while Instant::now() < until {
        turns += 1;
        for session in &sessions {
            let terminal = session
                .run(shell("echo x >> note; wc -l < note; sleep 0.5"))
                .await
                .unwrap();
            assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
            assert_eq!(printed(&terminal).trim(), turns.to_string());
        }
    }
    let renewed = sessions[0].renew().await.unwrap();
    assert_eq!(renewed.outcome, Outcome::Succeeded);
    // Queued until one is up.
    let request = client.task(&pool(), shell("echo later"));
    let mut waiting = client.submit(request).await.unwrap();
    let closed = sessions[1].close().await.unwrap();
    assert_eq!((closed.outcome, closed.kept), (Outcome::Succeeded, false));
    cluster.start_dispatcher().await.unwrap();
    let terminal = waiting.terminal().await.unwrap();
    assert_eq!(printed(&terminal), "later\n");
    let last = sessions[0].run(shell("wc -l < note")).await.unwrap();
    assert_eq!(printed(&last).trim(), turns.to_string());
}

/// What becomes of the load while the fleet is replaced.
#[derive(Debug, Default)]
struct Tally {
    ends: BTreeMap<(&'static str, &'static str), usize>,
    again: usize,
}

impl Tally {
    fn add(&mut self, terminal: &Terminal) {
        let end = (terminal.outcome.as_str(), terminal.attribution.as_str());
        *self.ends.entry(end).or_default() += 1;
        self.again += usize::from(terminal.attempt > 1);
    }
}

/// At least; more where replacing the fleet takes longer than they do.
const ONE_SHOTS: usize = 240;
const SUBMITTERS: usize = 12;
const SESSIONS: usize = 6;

/// One-shot tasks, one after the other, until the fleet is replaced and there were enough.
async fn submit_until(client: Client, over: Arc<AtomicBool>) -> Vec<Terminal> {
    let mut ends = Vec::new();
    while !over.load(Ordering::Relaxed) || ends.len() < ONE_SHOTS / SUBMITTERS {
        let n = ends.len();
        let script = format!("sleep 0.{}; echo {n}", n % 10);
        let mut request = client.task(&pool(), shell(&script));
        request.timeout_ms = Some(60_000);
        let terminal = client.run(request).await.unwrap();
        assert_eq!(printed(&terminal), format!("{n}\n"), "{terminal:?}");
        ends.push(terminal);
    }
    ends
}

/// Sessions, one after the other, a few turns each.
async fn turns_until(client: Client, over: Arc<AtomicBool>) -> Vec<Terminal> {
    let mut ends = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let session = session(&client).await;
        for turn in 1..=6 {
            let terminal = session
                .run(shell("echo x >> note; wc -l < note; sleep 0.3"))
                .await
                .unwrap();
            let lost = terminal.outcome == Outcome::SandboxLost;
            if !lost {
                // In order, each once, in the same sandbox.
                assert_eq!(printed(&terminal).trim(), turn.to_string(), "{terminal:?}");
            }
            ends.push(terminal);
            if lost {
                break;
            }
        }
        if ends.last().is_some_and(|end| end.kept) {
            session.close().await.unwrap();
        }
    }
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_is_replaced_under_load_loses_nothing() {
    let cluster = Cluster::start(pools(9, 48)).await.unwrap();
    let mut members = Vec::new();
    for name in ["old-1", "old-2", "old-3"] {
        members.push(cluster.worker(name, 1).await.unwrap());
    }
    let client = cluster.client("replaced").await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let one_shots = (0..SUBMITTERS).map(|_| submit_until(client.clone(), over.clone()));
    let one_shots = spawn("test", join_all(one_shots.collect::<Vec<_>>()));
    let in_sessions = (0..SESSIONS).map(|_| turns_until(client.clone(), over.clone()));
    let in_sessions = spawn("test", join_all(in_sessions.collect::<Vec<_>>()));

    let mut replaced = Vec::new();
    for (name, old) in ["new-1", "new-2", "new-3"].into_iter().zip(members) {
        replaced.push(cluster.worker(name, 1).await.unwrap());
        let pid = old.process.pid();
        old.leave().await.unwrap();
        let left = cgroups_of(pid).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    over.store(true, Ordering::Relaxed);
    let mut tally = Tally::default();
    for terminal in one_shots.await.unwrap().iter().flatten() {
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
        tally.add(terminal);
    }
    for terminal in in_sessions.await.unwrap().iter().flatten() {
        match terminal.outcome {
            Outcome::Succeeded => {}
            Outcome::SandboxLost => {
                assert_eq!(terminal.attribution, Attribution::Infrastructure);
                assert!(terminal.evidence.contains("left"), "{}", terminal.evidence);
            }
            _ => panic!("{terminal:?}"),
        }
        tally.add(terminal);
    }
    println!("{tally:?}");
    let all: usize = tally.ends.values().sum();
    assert!(all >= 300, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_does_not_fit_the_fleet_says_so_and_takes_nothing() {
    let mut cluster = Cluster::start(pools(1, 4)).await.unwrap();
    let leases = cluster.leases().await.unwrap();
    eventually(
        "versions that the fleet takes",
        PATIENCE,
        async || match leases.schemas().await {
            Ok(Some(range)) if range.contains(&broker_schema::SCHEMA_VERSION) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await
    .unwrap();
    // Nobody who would write it down again.
    cluster.kill_dispatcher().await.unwrap();
    for (range, mend) in [
        (7..=9, "install a newer worker"),
        (0..=0, "upgrade the dispatchers first"),
    ] {
        leases.set_schemas(range.clone()).await.unwrap();
        let member = cluster.start_worker("misfit", json!({})).unwrap();
        let status = member.process.wait_exit(PATIENCE).await.unwrap();
        let stderr = member.process.stderr().unwrap();
        assert_eq!(status.code(), Some(78), "{stderr}");
        let told = format!("the fleet takes {} to {}", range.start(), range.end());
        for part in [told.as_str(), mend, "[unsupported_schema]"] {
            assert!(stderr.contains(part), "{part} is not in {stderr}");
        }
        assert!(leases.workers().await.unwrap().is_empty());
    }
    // One that fitted and does no more leaves by itself.
    leases.set_schemas(1..=1).await.unwrap();
    let member = cluster.start_worker("fitted", json!({})).unwrap();
    eventually("registered worker", PATIENCE, async || {
        let workers = leases.workers().await.unwrap();
        let found = workers.iter().any(|info| member.is(info));
        found
            .then_some(())
            .ok_or_else(|| member.process.stderr_tail())
    })
    .await
    .unwrap();
    leases.set_schemas(2..=2).await.unwrap();
    let status = member.process.wait_exit(PATIENCE).await.unwrap();
    assert!(status.success(), "{}", member.process.stderr_tail());
    assert!(leases.workers().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_lets_sessions_finish_and_ends_the_idle_ones() {
    let cluster = Cluster::start(pools(3, 8)).await.unwrap();
    let only = cluster.worker("only", 3).await.unwrap();
    let client = cluster.client("drained").await.unwrap();
    let (busy, idle) = (session(&client).await, session(&client).await);
    let first = busy.task(shell("echo up; sleep 3; echo first"));
    let first_id = first.id;
    let running = {
        let busy = busy.clone();
        spawn("test", async move { busy.run_task(first).await })
    };
    eventually("session task that runs", PATIENCE, async || {
        let leases = cluster.leases().await.unwrap().leases().await.unwrap();
        let found = leases.iter().any(|lease| lease.task == Some(first_id));
        found.then_some(()).ok_or("it is not written down yet")
    })
    .await
    .unwrap();
    only.process.signal(Signal::SIGTERM).unwrap();
    let terminal = running.await.unwrap().unwrap();
    assert_eq!(printed(&terminal), "up\nfirst\n", "{terminal:?}");
    // It goes on: the worker leaves once nobody has used it for a while.
    let terminal = busy.run(shell("echo second")).await.unwrap();
    assert_eq!(printed(&terminal), "second\n", "{terminal:?}");
    let status = only.process.wait_exit(PATIENCE).await.unwrap();
    assert!(status.success());
    let terminal = idle.run(shell("true")).await.unwrap();
    assert_eq!(terminal.outcome, Outcome::SandboxLost);
    assert_eq!(terminal.attribution, Attribution::Infrastructure);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sessions_task_that_is_sent_again_is_not_run_again() {
    let mut cluster = Cluster::start(pools(1, 4)).await.unwrap();
    let _worker = cluster.worker("only", 1).await.unwrap();
    let client = cluster.client("again").await.unwrap();
    let session = session(&client).await;
    let request: TaskRequest = session.task(shell("echo x >> note; wc -l < note"));
    let first = session.run_task(request.clone()).await.unwrap();
    assert_eq!(printed(&first).trim(), "1");
    // Another client, that knows nothing of the first.
    let other = cluster.client("again").await.unwrap();
    let same = other.session(pool(), session.sandbox().clone());
    assert_eq!(same.run_task(request.clone()).await.unwrap(), first);
    // The server forgets message ids and terminals: what is left is the worker's memory.
    let js = cluster.nats.client().await.unwrap();
    let js = async_nats::jetstream::new(js);
    for stream in ["REMUDA_TERM", "REMUDA_RUN"] {
        js.get_stream(stream).await.unwrap().purge().await.unwrap();
    }
    cluster.nats.restart().await.unwrap();
    let third = cluster.client("again").await.unwrap();
    let same = third.session(pool(), session.sandbox().clone());
    assert_eq!(same.run_task(request).await.unwrap(), first);
    let note = session.run(shell("wc -l < note")).await.unwrap();
    assert_eq!(printed(&note).trim(), "1", "it ran once");
}

/// The processes whose parent is this one.
fn children_of(parent: Pid) -> Vec<Pid> {
    let is_child = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        line.is_some_and(|text| text.trim() == parent.to_string())
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(is_child)
        .map(Pid::from_raw)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_can_make_no_sandboxes_any_more_leaves() {
    let cluster = Cluster::start(pools(2, 8)).await.unwrap();
    let broken = cluster.worker("broken", 2).await.unwrap();
    let client = cluster.client("forker").await.unwrap();
    let lost = session(&client).await;
    let request = client.task(&pool(), shell("echo up; sleep 9; echo done"));
    let mut one_shot = client.submit(request).await.unwrap();
    let members = [broken];
    holder(&cluster, &members, 2).await;
    let [broken] = members;
    // The only process that the worker itself has started: sandboxes are this one's.
    let forker = children_of(broken.process.pid());
    assert_eq!(forker.len(), 1, "{forker:?}");
    kill(forker[0], Signal::SIGKILL).unwrap();
    let late = lost.run(shell("true")).await.unwrap();
    assert_eq!(late.outcome, Outcome::SandboxLost);
    assert_eq!(late.attribution, Attribution::Infrastructure, "{late:?}");
    let left = broken.process.wait_exit(PATIENCE).await.unwrap();
    assert!(left.success(), "{}", broken.process.stderr_tail());
    let _whole = cluster.worker("whole", 0).await.unwrap();
    let terminal = one_shot.terminal().await.unwrap();
    assert_eq!(printed(&terminal), "up\ndone\n", "{terminal:?}");
    assert!(
        terminal.attempt > 1,
        "{terminal:#?} {}",
        broken.process.stderr_tail()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_for_a_while_keeps_its_tasks() {
    let cluster = Cluster::start(pools(2, 8)).await.unwrap();
    let slow = cluster.worker("slow", 2).await.unwrap();
    let client = cluster.client("still").await.unwrap();
    let session = session(&client).await;
    let request = client.task(&pool(), shell("sleep 12; echo done"));
    let mut one_shot = client.submit(request).await.unwrap();
    let members = [slow];
    holder(&cluster, &members, 2).await;
    let [slow] = members;
    let leases = cluster.leases().await.unwrap();
    eventually("leases that were just renewed", PATIENCE, async || {
        let all = leases.leases().await.map_err(|error| error.to_string())?;
        let least = all.iter().map(|lease| lease.remaining).min();
        match least {
            Some(least) if least > Duration::from_millis(14_600) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    slow.process.signal(Signal::SIGSTOP).unwrap();
    // Beyond the silence that a killed worker is taken for dead after; its connection stands.
    eventually("long silence", PATIENCE, async || {
        let workers = leases.workers().await.map_err(|error| error.to_string())?;
        let info = workers.iter().find(|info| slow.is(info));
        match info.map(|info| info.last_seen) {
            Some(silent) if silent > Duration::from_millis(9_500) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    slow.process.signal(Signal::SIGCONT).unwrap();
    let terminal = one_shot.terminal().await.unwrap();
    assert_eq!(
        (terminal.outcome, terminal.attempt),
        (Outcome::Succeeded, 1)
    );
    let after = session.run(shell("echo on")).await.unwrap();
    assert_eq!(printed(&after), "on\n", "{after:?}");
}

/// The pid and the parent of a command with this argument, as this host sees them.
fn command_with(argument: &str) -> Option<(Pid, Pid)> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let mut words = line.split(|byte| *byte == 0);
            words.find(|word| *word == argument.as_bytes())?;
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((
                Pid::from_raw(pid),
                Pid::from_raw(parent.trim().parse().ok()?),
            ))
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_takes_sandboxes_along_whose_sidecar_hangs() {
    let cluster = Cluster::start(pools(1, 4)).await.unwrap();
    let only = cluster.worker("only", 1).await.unwrap();
    let client = cluster.client("hung").await.unwrap();
    let session = session(&client).await;
    // Only its sidecar is above what it leaves behind. It has acted as the sandbox's user.
    let mut steps = vec![Step::write("file", "x")];
    steps.extend(shell("sleep 611.75 & exit 0"));
    let ended = session.run(steps).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Succeeded, "{ended:?}");
    let (left, sidecar) = command_with("611.75").unwrap();
    kill(sidecar, Signal::SIGSTOP).unwrap();
    only.process.signal(Signal::SIGKILL).unwrap();
    only.process.wait_exit(PATIENCE).await.unwrap();
    eventually("end of the sandbox", PATIENCE, async || {
        let runs = |pid: Pid| std::path::Path::new(&format!("/proc/{pid}")).exists();
        match (runs(sidecar), command_with("611.75")) {
            (false, None) => Ok(()),
            found => Err(format!("{found:?}, its command was {left}")),
        }
    })
    .await
    .unwrap();
}
