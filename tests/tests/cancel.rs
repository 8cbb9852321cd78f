//! Cancelling tasks, groups and runs of a whole fleet: everything ends once, as both sides were
//! told, and nothing of it is left.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use broker_schema::{
    Outcome, PoolId, Priority, RunId, SessionOptions, Step, TaskId, TaskRequest, Terminal,
};
use futures::{StreamExt as _, stream};
use remuda_client::broker::BrokerOptions;
use remuda_client::{CancelState, Client, ClientOptions, Until};
use remuda_lease::{LeaseOptions, LeaseStore, TenantUse};
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};
use remuda_tests::leftovers::descendants;
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

static FLEET: SharedFleet = SharedFleet::new();

const PATIENCE: Duration = Duration::from_secs(120);
/// Tasks that are cancelled while they end.
const RACED: u32 = 400;

/// The race has a pool of its own: what the others hold for long must not be in its way.
fn config() -> Value {
    let mut config = default_config();
    let mut race = config["pools"][0].clone();
    race["name"] = json!("race");
    config["pools"].as_array_mut().unwrap().push(race);
    config
}

fn pool(name: &str) -> PoolId {
    name.parse().unwrap()
}

/// Each test is a tenant of its own, so that what it leaves can be counted.
async fn client(fleet: &Fleet, name: &str) -> Client {
    let options = ClientOptions::new(name.parse().unwrap(), name.parse().unwrap());
    let broker = BrokerOptions {
        url: fleet.nats().to_owned(),
        ..options.broker.clone()
    };
    Client::connect(ClientOptions { broker, ..options })
        .await
        .unwrap()
}

async fn lease(fleet: &Fleet) -> LeaseStore {
    let options = LeaseOptions {
        url: fleet.redis().to_owned(),
        ..LeaseOptions::default()
    };
    LeaseStore::connect(&options).await.unwrap()
}

fn sh(client: &Client, script: &str) -> TaskRequest {
    let steps = vec![Step::command(["sh", "-c", script])];
    client.task(&pool("default"), steps)
}

async fn terminals(client: &Client, run: &RunId) -> BTreeMap<TaskId, Vec<Terminal>> {
    let mut found: BTreeMap<TaskId, Vec<Terminal>> = BTreeMap::new();
    let results = client.results(run, None, Until::CaughtUp);
    for stored in results.collect::<Vec<_>>().await {
        let (_, terminal) = stored.unwrap();
        found.entry(terminal.task).or_default().push(terminal);
    }
    found
}

/// Waits until as many tasks of a run hold a sandbox.
async fn running(store: &LeaseStore, run: &RunId, least: usize) {
    eventually("running tasks", PATIENCE, async || {
        let leases = store.leases().await.unwrap();
        let ours = leases.iter().filter(|lease| lease.run == *run).count();
        if ours >= least {
            Ok(())
        } else {
            Err(format!("{ours} of {least}"))
        }
    })
    .await
    .unwrap();
}

/// Waits until no task of a run holds a sandbox, and none of these processes is left.
async fn gone(fleet: &Fleet, store: &LeaseStore, run: &RunId, mark: &str) {
    let worker = fleet.pid("worker").unwrap();
    eventually("end of everything", PATIENCE, async || {
        let leases = store.leases().await.unwrap();
        let ours = leases.iter().filter(|lease| lease.run == *run).count();
        let processes: Vec<i32> = descendants(worker)
            .unwrap()
            .into_iter()
            .filter(|seen| command_of(seen.pid).contains(mark))
            .map(|seen| seen.pid)
            .collect();
        if ours == 0 && processes.is_empty() {
            Ok(())
        } else {
            Err(format!("{ours} leases, processes {processes:?}"))
        }
    })
    .await
    .unwrap();
}

fn command_of(pid: i32) -> String {
    let read = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&read).replace('\0', " ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_200_ends_at_once_and_each_task_once() {
    let fleet = FLEET.get(config).await.unwrap();
    let store = lease(&fleet).await;
    let client = client(&fleet, "sweep").await;
    let run = client.run_id().clone();
    // A process tree that ignores what can be ignored, under a name that is found again.
    let script = "trap '' TERM INT; (trap '' TERM; setsid sleep 4711 &) ; sleep 4711 & wait";
    let tasks: Vec<TaskRequest> = (0..200)
        .map(|index| TaskRequest {
            priority: Priority::ALL[index % 3],
            timeout_ms: Some(600_000),
            ..sh(&client, script)
        })
        .collect();
    let submitted: Vec<_> = stream::iter(tasks.clone())
        .map(|task| client.submit(task))
        .buffer_unordered(32)
        .collect()
        .await;
    running(&store, &run, 6).await;

    let told = fleet
        .remuda(["--tenant", "sweep", "cancel", "--run", run.as_str()])
        .await
        .unwrap();
    assert_eq!((told.code(), told.text().trim()), (0, "cancelling"));
    for submitted in submitted {
        let mut submitted = submitted.unwrap();
        let ended = tokio::time::timeout(PATIENCE, submitted.terminal()).await;
        let terminal = ended.unwrap().unwrap();
        assert_eq!(terminal.outcome, Outcome::Cancelled, "{terminal:?}");
        assert!(
            terminal.evidence.contains("its run"),
            "{}",
            terminal.evidence
        );
    }
    gone(&fleet, &store, &run, "sleep 4711").await;
    let found = terminals(&client, &run).await;
    assert_eq!(found.len(), tasks.len());
    assert!(found.values().all(|all| all.len() == 1));
    let used = store.tenant_use(client.tenant()).await.unwrap();
    assert_eq!(used, TenantUse::default(), "a count leaks");
    // What comes late belongs to a run that is over; the fleet goes on.
    let late = client.run(sh(&client, "true")).await.unwrap();
    assert_eq!(late.outcome, Outcome::Cancelled);
    let other = client.with_run("another".parse().unwrap());
    let well = other.run(sh(&other, "true")).await.unwrap();
    assert_eq!(well.outcome, Outcome::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_stops_early_and_another_is_cancelled() {
    let fleet = FLEET.get(config).await.unwrap();
    let store = lease(&fleet).await;
    let client = client(&fleet, "groups").await;
    let run = client.run_id().clone();
    // Two succeed at once, one fails: three valid results. The others would take for ever.
    let member = |index: usize| {
        let script = match index {
            0 | 1 => "true",
            2 => "exit 3",
            _ => "sleep 4712",
        };
        TaskRequest {
            group: Some("prompt-1".parse().unwrap()),
            group_size: Some(12),
            min_valid: Some(3),
            timeout_ms: Some(600_000),
            ..sh(&client, script)
        }
    };
    let tasks: Vec<TaskRequest> = (0..12).map(member).collect();
    let ids: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
    let ended: BTreeMap<TaskId, Terminal> = client
        .submit_many(stream::iter(tasks), 12)
        .map(|(task, terminal)| (task, terminal.unwrap()))
        .collect()
        .await;
    let outcomes: Vec<Outcome> = ids.iter().map(|id| ended[id].outcome).collect();
    let three = [Outcome::Succeeded, Outcome::Succeeded, Outcome::Failed];
    assert_eq!(outcomes[..3], three);
    for id in &ids[3..] {
        let terminal = &ended[id];
        assert_eq!(terminal.outcome, Outcome::Cancelled, "{terminal:?}");
        assert!(
            terminal.evidence.contains("3 valid results"),
            "{}",
            terminal.evidence
        );
    }
    gone(&fleet, &store, &run, "sleep 4712").await;

    // A group is cancelled by hand; its neighbour of the same run is not.
    let named = |group: &str, script: &str| TaskRequest {
        group: Some(group.parse().unwrap()),
        timeout_ms: Some(600_000),
        ..sh(&client, script)
    };
    let mut submitted = Vec::new();
    for index in 0..10 {
        let script = ["sleep 4713", "sleep 4713 & wait"][index % 2];
        submitted.push(client.submit(named("prompt-2", script)).await.unwrap());
    }
    running(&store, &run, 4).await;
    let state = client
        .cancel_group(&run, &"prompt-2".parse().unwrap())
        .await
        .unwrap();
    assert_eq!(state, CancelState::Cancelling);
    for mut submitted in submitted {
        let terminal = submitted.terminal().await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Cancelled);
        assert!(
            terminal.evidence.contains("its group"),
            "{}",
            terminal.evidence
        );
    }
    gone(&fleet, &store, &run, "sleep 4713").await;
    let neighbour = client.run(named("prompt-3", "true")).await.unwrap();
    assert_eq!(neighbour.outcome, Outcome::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_run_takes_its_sessions_and_their_tasks_with_it() {
    let fleet = FLEET.get(config).await.unwrap();
    let store = lease(&fleet).await;
    let client = client(&fleet, "sessions").await;
    let run = client.run_id().clone();
    let open = async || {
        let options = SessionOptions::default();
        client
            .open_session(&pool("default"), options)
            .await
            .unwrap()
    };
    let (busy, idle) = (open().await, open().await);
    let steps = || vec![Step::command(["sh", "-c", "sleep 4714 & sleep 4714"])];
    let (first, second) = (busy.clone(), busy.clone());
    let long = |session: remuda_client::Session| async move {
        let task = TaskRequest {
            timeout_ms: Some(600_000),
            ..session.task(steps())
        };
        session.run_task(task).await.unwrap()
    };
    let both = async { tokio::join!(long(first), long(second)) };
    let cancel = async {
        running(&store, &run, 2).await;
        // The first task is written down once it has run for a while.
        eventually("running session task", PATIENCE, async || {
            let leases = store.leases().await.unwrap();
            let busy = leases.iter().any(|lease| {
                lease.sandbox.sandbox == busy.sandbox().sandbox && lease.task.is_some()
            });
            if busy { Ok(()) } else { Err("not yet") }
        })
        .await
        .unwrap();
        client.cancel_run(&run).await.unwrap()
    };
    let ((first, second), state) = tokio::join!(both, cancel);
    assert_eq!(state, CancelState::Cancelling);
    for terminal in [&first, &second] {
        assert_eq!(terminal.outcome, Outcome::Cancelled, "{terminal:?}");
    }
    gone(&fleet, &store, &run, "sleep 4714").await;
    let after = idle.run(vec![Step::command(["true"])]).await.unwrap();
    assert_eq!(after.outcome, Outcome::SandboxLost, "{after:?}");
}

/// Tasks end by themselves at about the time at which they are cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_finish_and_cancel_one_wins_and_both_sides_are_told_the_same() {
    let fleet = FLEET.get(config).await.unwrap();
    let store = lease(&fleet).await;
    let client = client(&fleet, "race").await;
    let run = client.run_id().clone();
    let task = || TaskRequest {
        pool: pool("race"),
        ..sh(&client, "exit 0")
    };
    // How long a task takes here and now: it is cancelled at any time within twice that.
    let began = Instant::now();
    let all: Vec<_> = client
        .submit_many(stream::iter((0..40).map(|_| task()).collect::<Vec<_>>()), 8)
        .collect()
        .await;
    assert!(all.iter().all(|(_, ended)| ended.is_ok()));
    let usual = began.elapsed() * 8 / 40;
    let raced: Vec<(TaskId, Terminal, CancelState)> = stream::iter(0..RACED)
        .map(|index| {
            let (client, run, task) = (client.clone(), run.clone(), task());
            async move {
                // From before it is placed until after it has ended.
                let (id, named) = (task.id, index % 4 != 0);
                let mut submitted = client.submit(task).await.unwrap();
                let ended = submitted.terminal();
                let cancel = async {
                    let share = f64::from(index * 37 % RACED) / f64::from(RACED);
                    tokio::time::sleep((usual * 2).mul_f64(share)).await;
                    client.cancel(id, named.then_some(run)).await.unwrap()
                };
                let (terminal, state) = tokio::join!(ended, cancel);
                (id, terminal.unwrap(), state)
            }
        })
        .buffer_unordered(8)
        .collect()
        .await;
    let found = terminals(&client, &run).await;
    let mut won = BTreeMap::<&str, usize>::new();
    for (id, terminal, state) in &raced {
        let stored = &found[id];
        assert_eq!(stored.len(), 1, "{stored:?}");
        assert_eq!(&stored[0], terminal, "the reader was told something else");
        let cancelled = terminal.outcome == Outcome::Cancelled;
        assert!(
            cancelled || terminal.outcome == Outcome::Succeeded,
            "{terminal:?}"
        );
        match state {
            CancelState::Cancelled => assert!(cancelled, "{terminal:?}"),
            CancelState::Finished => assert!(!cancelled, "{terminal:?}"),
            // The terminal was still to come, and nobody was told how it would be.
            CancelState::Cancelling | CancelState::Unknown => {}
        }
        *won.entry(terminal.outcome.as_str()).or_default() += 1;
    }
    assert_eq!(found.len(), raced.len() + 40);
    // Both sides win some: else nothing was raced.
    assert!(won.len() == 2, "{won:?}");
    gone(&fleet, &store, &run, "exit 0").await;
}
