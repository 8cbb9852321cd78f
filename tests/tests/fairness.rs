//! Weights, quotas and credit of a whole fleet, as its tenants see them.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::{
    ErrorCode, Outcome, PoolId, RunId, SessionOptions, Step, TaskRequest, Terminal,
};
use futures::{StreamExt as _, stream};
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientError, ClientOptions, Pacer};
use remuda_lease::{LeaseOptions, LeaseStore};
use remuda_tests::fleet::{Fleet, SharedFleet};
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

static FLEET: SharedFleet = SharedFleet::new();

const PATIENCE: Duration = Duration::from_secs(120);

fn config() -> Value {
    let limits = json!({
        "memory_bytes": 256 << 20, "pids": 64, "disk_bytes": 64 << 20, "inodes": 4096,
    });
    json!({
        "pools": [
            {"name": "default", "warm": 3, "max": 4, "limits": limits},
            {"name": "other", "warm": 4, "max": 8, "limits": limits},
        ],
        "dispatcher": {"tenants": [
            {"name": "heavy", "weight": 4},
            {"name": "light", "weight": 1},
            {"name": "small", "max_queued": 5},
            {"name": "narrow", "max_running": 2},
            {"name": "keeper", "max_sandboxes": 2, "max_sessions": 1},
        ]},
        "worker": {"slots": 16},
    })
}

async fn client(fleet: &Fleet, tenant: &str, run: &str) -> Client {
    let options = ClientOptions::new(tenant.parse().unwrap(), run.parse().unwrap());
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

fn pool(name: &str) -> PoolId {
    name.parse().unwrap()
}

fn sh(client: &Client, name: &str, script: &str) -> TaskRequest {
    client.task(&pool(name), vec![Step::command(["sh", "-c", script])])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heavier_tenant_and_a_heavier_run_get_their_shares() {
    let fleet = FLEET.get(config).await.unwrap();
    let mut waiting = Vec::new();
    for (tenant, run, run_weight) in [
        ("heavy", "plain", None),
        ("light", "train", None),
        ("light", "eval", Some(3)),
    ] {
        let client = client(&fleet, tenant, run).await;
        for _ in 0..60 {
            let task = TaskRequest {
                run_weight,
                ..sh(&client, "default", "sleep 0.05")
            };
            waiting.push((client.clone(), task));
        }
    }
    let ended: Vec<Terminal> = stream::iter(waiting)
        .map(|(client, task)| async move { client.run(task).await.unwrap() })
        .buffer_unordered(256)
        .collect()
        .await;
    let mut started: Vec<(_, RunId)> = ended
        .iter()
        .map(|terminal| {
            assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
            (terminal.times.dispatched.unwrap(), terminal.run.clone())
        })
        .collect();
    started.sort();
    // While all of them wait: the first few went before the others were there.
    let mut counts = BTreeMap::<&str, usize>::new();
    for (_, run) in &started[10..60] {
        *counts.entry(run.as_str()).or_default() += 1;
    }
    let of = |run: &str| counts.get(run).copied().unwrap_or_default();
    // Of 50: heavy 40, and of light's 10 eval 7 or 8.
    assert!((36..=44).contains(&of("plain")), "{counts:?}");
    assert!(of("eval") > of("train") && of("train") >= 1, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_refuse_the_newest_and_hold_back_the_others() {
    let fleet = FLEET.get(config).await.unwrap();
    let store = lease(&fleet).await;
    // A pool's worth of work, and more than may wait.
    let small = client(&fleet, "small", "flood").await;
    let tasks: Vec<TaskRequest> = (0..40).map(|_| sh(&small, "other", "sleep 3")).collect();
    let ended: Vec<Terminal> = small
        .submit_many(stream::iter(tasks), 40)
        .map(|(_, terminal)| terminal.unwrap())
        .collect()
        .await;
    let mut refused = 0;
    for terminal in &ended {
        match terminal.outcome {
            Outcome::Succeeded => {}
            Outcome::Rejected => {
                let error = terminal.error.as_ref().unwrap();
                assert_eq!(error.code, ErrorCode::QuotaExceeded);
                assert!(error.message.contains("max_queued is 5"), "{error}");
                refused += 1;
            }
            other => panic!("{other}: {}", terminal.evidence),
        }
    }
    // Eight run and five wait at the time of the look.
    assert!((20..=35).contains(&refused), "{refused} of 40 were refused");

    // At most two at once, though the pool has more, and all of them in the end.
    let narrow = client(&fleet, "narrow", "narrow").await;
    let tasks: Vec<TaskRequest> = (0..12).map(|_| sh(&narrow, "other", "sleep 0.2")).collect();
    let ended: Vec<Terminal> = narrow
        .submit_many(stream::iter(tasks), 12)
        .map(|(_, terminal)| terminal.unwrap())
        .collect()
        .await;
    let mut edges = Vec::new();
    for terminal in &ended {
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
        edges.push((terminal.times.started.unwrap(), 1));
        edges.push((terminal.times.finished, -1));
    }
    edges.sort();
    let most = edges.iter().scan(0, |now, (_, change)| {
        *now += change;
        Some(*now)
    });
    assert_eq!(most.max(), Some(2));

    // One session; the second is refused, and a task waits for nobody.
    let keeper = client(&fleet, "keeper", "keeper").await;
    let options = SessionOptions::default();
    let session = keeper.open_session(&pool("other"), options).await.unwrap();
    let Err(ClientError::SessionRefused { terminal, .. }) =
        keeper.open_session(&pool("other"), options).await
    else {
        panic!("a second session was given");
    };
    let error = terminal.error.unwrap();
    assert_eq!(error.code, ErrorCode::QuotaExceeded);
    assert!(error.message.contains("max_sessions is 1"), "{error}");
    let well = keeper.run(sh(&keeper, "other", "true")).await.unwrap();
    assert_eq!(well.outcome, Outcome::Succeeded);
    session.close().await.unwrap();
    let tenant = keeper.tenant();
    eventually("free places", PATIENCE, async || {
        let used = store.tenant_use(tenant).await.unwrap();
        if used.sandboxes == 0 {
            Ok(())
        } else {
            Err(format!("{used:?}"))
        }
    })
    .await
    .unwrap();
    let again = keeper.open_session(&pool("other"), options).await.unwrap();
    again.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trainer_paces_itself_by_the_credit() {
    let fleet = FLEET.get(config).await.unwrap();
    let client = client(&fleet, "paced", "paced").await;
    let credit = client.credit(&pool("other")).await.unwrap();
    assert_eq!(credit.max, 8);
    let tasks: Vec<TaskRequest> = (0..150)
        .map(|_| sh(&client, "other", "sleep 0.1"))
        .collect();
    let paced = client
        .submit_paced(&pool("other"), stream::iter(tasks), Pacer::new(150))
        .await
        .unwrap();
    let watched = client.credits(&pool("other")).await.unwrap();
    let all = paced
        .map(|(_, terminal)| terminal.unwrap().outcome)
        .collect::<Vec<_>>();
    let mut all = std::pin::pin!(all);
    let mut watched = std::pin::pin!(watched);
    let mut longest = 0;
    let outcomes = loop {
        tokio::select! {
            outcomes = &mut all => break outcomes,
            Some(credit) = watched.next() => longest = longest.max(credit.queued),
        }
    };
    assert_eq!(outcomes.len(), 150);
    assert!(
        outcomes
            .iter()
            .all(|outcome| *outcome == Outcome::Succeeded)
    );
    assert!(longest < 120, "{longest} waited at once");
    // People see it too.
    let shown = fleet.remuda(["pool", "ls", "-o", "json"]).await.unwrap();
    let text = shown.text();
    let line = text
        .lines()
        .find(|line| line.contains("\"other\""))
        .unwrap();
    let seen: Value = serde_json::from_str(line).unwrap();
    assert!(seen["queued"].is_u64(), "{seen}");
    assert!(
        fleet
            .remuda(["ps"])
            .await
            .unwrap()
            .text()
            .contains("QUEUED")
    );
}
