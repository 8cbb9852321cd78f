//! Servers that are missing, too old, or lost midway: a person is told which,
//! where, and what to do; no task is lost and none ends twice.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::time::Duration;

use broker_schema::{Outcome, SessionOptions, Step, TaskId, Terminal};
use futures::StreamExt as _;
use remuda_client::{Client, ClientError, Until};
use remuda_telemetry::task;
use remuda_tests::fleet::{Fleet, default_config, finish, remuda};
use remuda_tests::port::Port;
use remuda_tests::wait::eventually;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

const PATIENCE: Duration = Duration::from_secs(100);
const TASKS: usize = 100;

#[tokio::test]
async fn a_server_that_is_missing_is_named_with_its_address_and_the_mend() {
    let port = Port::reserve().unwrap();
    let address = port.address().to_string();
    let nats = format!("nats://user:s3cret@{address}");
    let redis = format!("redis://:s3cret@{address}");
    let cases: [(&[&str], &str, &str, i32); 5] = [
        (
            &["run", "--", "true"],
            "nats-server",
            "[nats_unreachable]",
            125,
        ),
        (&["results", "r"], "nats-server", "[nats_unreachable]", 1),
        (&["session", "open"], "nats-server", "[nats_unreachable]", 1),
        (&["ps"], "edis", "[redis_unreachable]", 1),
        (&["pool", "ls"], "edis", "[redis_unreachable]", 1),
    ];
    for (args, server, code, status) in cases {
        let mut command = remuda().unwrap();
        command
            .args(args)
            .env("REMUDA_NATS", &nats)
            .env("REMUDA_REDIS", &redis);
        let finished = finish(command).await.unwrap();
        assert_eq!(finished.code(), status, "{args:?}: {finished:?}");
        for told in [server, &address, code] {
            assert!(finished.stderr.contains(told), "{args:?}: {finished:?}");
        }
        let mend = ["`remuda up`", "`remuda doctor`"];
        assert!(
            mend.iter().any(|mend| finished.stderr.contains(mend)),
            "{args:?}: {finished:?}"
        );
        assert!(!finished.stderr.contains("s3cret"), "{finished:?}");
    }
}

/// Greets as an old server does, and answers what it must.
async fn old_server() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _serving = task::spawn("old server", async move {
        while let Ok((socket, _)) = listener.accept().await {
            let mut socket = BufReader::new(socket);
            let info = json!({
                "server_id": "OLD", "server_name": "old-one", "version": "2.9.10", "go": "go1.19",
                "host": "127.0.0.1", "port": address.port(), "headers": true,
                "max_payload": 1_048_576, "proto": 1, "jetstream": true,
            });
            let greeting = format!("INFO {info}\r\n");
            if socket.write_all(greeting.as_bytes()).await.is_err() {
                continue;
            }
            let mut line = String::new();
            while socket.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                if line.starts_with("PING") && socket.write_all(b"PONG\r\n").await.is_err() {
                    break;
                }
                line.clear();
            }
        }
    });
    format!("nats://{address}")
}

#[tokio::test]
async fn a_server_that_is_too_old_is_told_with_both_versions() {
    let url = old_server().await;
    for args in [&["run", "--", "true"][..], &["results", "r"]] {
        let mut command = remuda().unwrap();
        command.args(args).env("REMUDA_NATS", &url);
        let finished = finish(command).await.unwrap();
        assert!(matches!(finished.code(), 1 | 125), "{finished:?}");
        for told in [
            "old-one",
            &url,
            "2.9.10",
            "2.10.27",
            "upgrade nats-server",
            "[nats_too_old]",
        ] {
            assert!(finished.stderr.contains(told), "{told}: {finished:?}");
        }
    }
}

/// A fleet that notices a dead worker within seconds.
async fn start() -> Fleet {
    let mut config = default_config();
    config["pools"][0]["max"] = json!(8);
    config["dispatcher"] = json!({
        "redis": {"ttl": "6s"},
        "timings": {"publish": "3s"},
    });
    config["worker"] = json!({
        "redis": {"ttl": "6s"},
        "timings": {"renew": "1s", "heartbeat": "1s"},
    });
    Fleet::start_with(config).await.unwrap()
}

/// Runs a batch of short tasks, does something to the fleet when a quarter of
/// them has ended, and checks that each ends once.
async fn under_load(fleet: &Fleet, run: &str, harm: impl AsyncFnOnce(&Fleet)) -> Vec<Terminal> {
    let client = fleet.client(run).await.unwrap();
    let pool = "default".parse().unwrap();
    let requests: Vec<_> = (0..TASKS)
        .map(|n| {
            let script = format!("echo {n}; sleep 0.05");
            client.task(&pool, vec![Step::command(["sh", "-c", &script])])
        })
        .collect();
    let wanted: BTreeSet<TaskId> = requests.iter().map(|request| request.id).collect();
    let mut ended = Box::pin(client.submit_many(futures::stream::iter(requests), TASKS));
    let mut got = Vec::new();
    let all = async {
        let mut harm = Some(harm);
        while let Some((task, result)) = ended.next().await {
            got.push((task, result));
            if got.len() == TASKS / 4
                && let Some(harm) = harm.take()
            {
                harm(fleet).await;
            }
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, all).await.is_ok();
    assert!(in_time, "{} of {TASKS} ended", got.len());

    let told: BTreeSet<TaskId> = got.iter().map(|(task, _)| *task).collect();
    assert_eq!(told, wanted);
    let terminals: Vec<Terminal> = got
        .into_iter()
        .map(|(task, result)| {
            result.unwrap_or_else(|error: ClientError| panic!("{task}: {error:?}"))
        })
        .collect();
    // The stream has the same, once each.
    let stored = stored(&client, run).await;
    assert_eq!(stored.len(), TASKS);
    for terminal in &terminals {
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
        assert!(stored.contains(terminal), "{terminal:?} is not stored");
    }
    quiet(fleet).await;
    terminals
}

async fn stored(client: &Client, run: &str) -> Vec<Terminal> {
    let results = client.results(&run.parse().unwrap(), None, Until::CaughtUp);
    results
        .map(|item| item.unwrap().1)
        .collect::<Vec<Terminal>>()
        .await
}

/// Nothing is left under way, and the fleet runs the next task.
async fn quiet(fleet: &Fleet) {
    let nats = async_nats::connect(fleet.nats()).await.unwrap();
    let jetstream = async_nats::jetstream::new(nats);
    eventually("empty queues", PATIENCE, async || {
        for name in ["REMUDA_REQ", "REMUDA_RUN"] {
            let stream = jetstream.get_stream(name).await;
            let mut stream = stream.map_err(|error| error.to_string())?;
            let info = stream.info().await.map_err(|error| error.to_string())?;
            if info.state.messages > 0 {
                return Err(format!("{name} has {}", info.state.messages));
            }
        }
        Ok(())
    })
    .await
    .unwrap();
    let finished = fleet.run(["echo", "on"]).await.unwrap();
    assert_eq!(finished.text(), "on\n", "{}", finished.stderr);
}

async fn loses(part: &'static str) -> Vec<Terminal> {
    let fleet = start().await;
    let before = fleet.pid(part).unwrap();
    let terminals = under_load(&fleet, part, async |fleet| {
        fleet.kill(part).unwrap();
    })
    .await;
    fleet.started_again(part, before).await.unwrap();
    assert!(fleet.stop().await.unwrap().success());
    terminals
}

#[tokio::test]
async fn a_lost_nats_server_costs_no_task() {
    loses("nats").await;
}

#[tokio::test]
async fn a_lost_redis_server_costs_no_task() {
    loses("redis").await;
}

#[tokio::test]
async fn a_lost_dispatcher_costs_no_task() {
    loses("dispatcher").await;
}

#[tokio::test]
async fn a_lost_worker_costs_no_task() {
    let terminals = loses("worker").await;
    // What it was running when it was killed was tried again.
    let again = terminals.iter().filter(|terminal| terminal.attempt > 1);
    assert!(again.count() > 0);
}

#[tokio::test]
async fn a_flushed_redis_costs_no_task() {
    let fleet = start().await;
    under_load(&fleet, "flushed", async |fleet| {
        let rest = fleet.redis().strip_prefix("redis://:").unwrap();
        let (password, address) = rest.split_once('@').unwrap();
        let (host, port) = address.split_once(':').unwrap();
        let mut command = std::process::Command::new("redis-cli");
        command
            .args(["-h", host, "-p", port, "FLUSHALL"])
            .env("REDISCLI_AUTH", password);
        let finished = finish(command).await.unwrap();
        assert_eq!(finished.text().trim(), "OK", "{finished:?}");
    })
    .await;
    assert!(fleet.stop().await.unwrap().success());
}

/// While the servers are away nothing ends, and a command that was given says
/// nothing wrong; when they are back, it ends.
#[tokio::test]
async fn a_session_outlives_its_nats_server_and_dispatcher() {
    let fleet = start().await;
    let client = fleet.client("session").await.unwrap();
    let pool = "default".parse().unwrap();
    let session = client
        .open_session(&pool, SessionOptions::default())
        .await
        .unwrap();
    let shell = |script: &str| vec![Step::command(["sh", "-c", script])];
    session.run(shell("echo kept > note")).await.unwrap();
    for part in ["nats", "dispatcher"] {
        let before = fleet.kill(part).unwrap();
        let terminal = session.run(shell("cat note")).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{part}: {terminal:?}");
        assert_eq!(terminal.steps[0].stdout.head.as_slice(), b"kept\n");
        fleet.started_again(part, before).await.unwrap();
    }
    session.close().await.unwrap();
}
