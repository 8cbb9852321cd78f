//! Results for those who read them at their own pace, and for no longer than they asked.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use broker_schema::{Outcome, PoolId, Step, TaskRequest};
use futures::StreamExt as _;
use nix::sys::signal::Signal;
use remuda_client::Until;
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};
use remuda_tests::process::Process;
use remuda_tests::servers::ask_redis;
use remuda_tests::wait::eventually;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

const PATIENCE: Duration = Duration::from_secs(120);
const TASKS: usize = 200;

async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    FLEET.get(default_config).await.unwrap()
}

fn pool() -> PoolId {
    "default".parse().unwrap()
}

/// The sequences and tasks that `remuda results` has printed.
fn printed(process: &Process) -> Vec<(u64, String)> {
    let text = String::from_utf8(process.stdout().unwrap()).unwrap();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|line| {
            let task = line["task"].as_str().unwrap().to_owned();
            (line["seq"].as_u64().unwrap(), task)
        })
        .collect()
}

#[tokio::test]
async fn readers_that_stop_reading_hold_nobody_up() {
    let fleet = fleet().await;
    let client = fleet.client("slow").await.unwrap();
    let run = client.run_id().clone();
    // One that is frozen, one that never takes what it asked for, one that does not even ask.
    let follower = fleet.command(["results", "slow", "--follow"]).unwrap();
    let frozen = Process::spawn(follower).unwrap();
    let first = client.task(&pool(), vec![Step::command(["true"])]);
    client.run(first).await.unwrap();
    eventually("line of the follower", PATIENCE, async || {
        match printed(&frozen).len() {
            1 => Ok(()),
            _ => Err(frozen.stderr_tail()),
        }
    })
    .await
    .unwrap();
    frozen.signal(Signal::SIGSTOP).unwrap();
    let slow = fleet.client("slow").await.unwrap();
    let mut lazy = Box::pin(slow.results(&run, None, Until::Dropped));
    assert!(lazy.next().await.unwrap().is_ok());
    let address = fleet.nats().strip_prefix("nats://").unwrap();
    let address = address.rsplit('@').next().unwrap();
    let mut deaf = tokio::net::TcpStream::connect(address).await.unwrap();
    deaf.write_all(b"CONNECT {\"verbose\":false}\r\nSUB remuda.live.> 1\r\nPING\r\n")
        .await
        .unwrap();

    let requests = (0..TASKS).map(|n| {
        let program = format!("print('{n:06}' * 20000)");
        client.task(&pool(), vec![Step::command(["python3", "-c", &program])])
    });
    let requests: Vec<TaskRequest> = requests.collect();
    let results = client.submit_many(futures::stream::iter(requests), 16);
    let ended: Vec<_> = tokio::time::timeout(PATIENCE, results.collect::<Vec<_>>())
        .await
        .unwrap();
    assert_eq!(ended.len(), TASKS);
    for (_, terminal) in ended {
        assert_eq!(terminal.unwrap().outcome, Outcome::Succeeded);
    }

    // They come back, and have missed nothing.
    let all: Vec<(u64, String)> = client
        .results(&run, None, Until::CaughtUp)
        .map(|item| {
            let (sequence, terminal) = item.unwrap();
            (sequence, terminal.task.to_string())
        })
        .collect()
        .await;
    assert_eq!(all.len(), TASKS + 1);
    frozen.signal(Signal::SIGCONT).unwrap();
    eventually("all lines of the follower", PATIENCE, async || {
        let lines = printed(&frozen);
        if lines.len() == all.len() {
            Ok(())
        } else {
            Err(format!("{} lines; {}", lines.len(), frozen.stderr_tail()))
        }
    })
    .await
    .unwrap();
    assert_eq!(printed(&frozen), all);
    for expected in &all[1..] {
        let next = tokio::time::timeout(PATIENCE, lazy.next()).await.unwrap();
        let (sequence, terminal) = next.unwrap().unwrap();
        assert_eq!((sequence, terminal.task.to_string()), *expected);
    }
}

#[tokio::test]
async fn several_read_the_same_run_each_at_its_own_place() {
    let fleet = fleet().await;
    let client = fleet.client("shared").await.unwrap();
    let durable = async |name: &str| {
        let finished = fleet
            .remuda(["results", "shared", "--durable", name])
            .await
            .unwrap();
        assert_eq!(finished.code(), 0, "{}", finished.stderr);
        finished.text().lines().count()
    };
    let run = async |count: usize| {
        for _ in 0..count {
            let request = client.task(&pool(), vec![Step::command(["true"])]);
            client.run(request).await.unwrap();
        }
    };
    run(3).await;
    assert_eq!(durable("rewards").await, 3);
    run(2).await;
    assert_eq!(durable("rewards").await, 2);
    assert_eq!(durable("archive").await, 5);
    assert_eq!(durable("rewards").await, 0);
    let all = fleet.remuda(["results", "shared"]).await.unwrap();
    assert_eq!(all.text().lines().count(), 5);
    let both = ["results", "shared", "--durable", "x", "--from", "2"];
    let refused = fleet.remuda(both).await.unwrap();
    assert_eq!(refused.code(), 2, "{}", refused.stderr);
}

#[tokio::test]
async fn results_are_kept_no_longer_than_the_task_asked() {
    let fleet = fleet().await;
    let client = fleet.client("kept").await.unwrap();
    let broker = client.broker();
    let request = |kept| TaskRequest {
        ttl_seconds_after_finished: kept,
        ..client.task(
            &pool(),
            vec![Step::command(["python3", "-c", "print('x' * 10**6)"])],
        )
    };
    let (brief, lasting) = (request(Some(1)), request(None));
    let (subjects, streams) = (broker.subjects(), broker.streams());
    let mut stored = Vec::new();
    for request in [brief, lasting] {
        let (tenant, run, task) = (request.tenant.clone(), request.run.clone(), request.id);
        assert!(client.run(request).await.unwrap().frames > 0);
        let terminal = subjects.terminal(&tenant, &run, task);
        let frames = subjects.result(&tenant, &run, task);
        stored.push((streams.terminals.clone(), terminal));
        stored.push((streams.results.clone(), frames));
    }
    let count = async |(stream, subject): &(String, String)| {
        let counts = broker.subject_counts(stream, subject).await.unwrap();
        counts.values().sum::<usize>()
    };
    // Never sooner than whoever waits may need, whatever was asked for: so it is noted, and
    // nothing is gone.
    let noted = eventually("note of what may go", PATIENCE, async || {
        let (_, name) = &stored[0];
        let name = name.strip_prefix("remuda.term.").unwrap().replace('.', "/");
        let score = ask_redis(fleet.redis(), &["ZSCORE", "{remuda}:removals", &name]).await;
        match score.unwrap() {
            Ok(score) => Ok((name, score.parse::<f64>().unwrap())),
            Err(other) => Err(other),
        }
    });
    let (name, score) = noted.await.unwrap();
    let now = Duration::from_micros(broker_schema::Timestamp::now().0).as_millis() as f64;
    assert!(
        (30_000.0..=61_000.0).contains(&(score - now)),
        "{}",
        score - now
    );
    for place in &stored {
        assert!(count(place).await > 0, "{place:?}");
    }

    // The minute is over.
    let sooner = ["ZADD", "{remuda}:removals", "1", &name];
    ask_redis(fleet.redis(), &sooner).await.unwrap().unwrap();
    eventually("removal", PATIENCE, async || {
        match (count(&stored[0]).await, count(&stored[1]).await) {
            (0, 0) => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await
    .unwrap();
    for place in &stored[2..] {
        assert!(count(place).await > 0, "{place:?}");
    }
    assert!(
        fleet
            .counted("dispatcher", "remuda_dispatcher_removed", "")
            .await
            .unwrap()
            >= 1.0
    );
}
