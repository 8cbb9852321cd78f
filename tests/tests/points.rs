//! The points of failure are where they say: a task passes each of them, in their order, and one
//! that is told to dies there.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::time::Duration;

use broker_schema::{Outcome, PoolId, Step, TaskRequest};
use remuda_client::Client;
use remuda_telemetry::failpoint::{dispatcher, worker};
use remuda_tests::fleet::{self, Fleet, default_config};
use remuda_tests::wait::eventually;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

async fn fleet(points: &str) -> Fleet {
    let mut config = default_config();
    for part in ["dispatcher", "worker"] {
        config[part]["telemetry"]["failpoints"] = json!(points);
    }
    let home = fleet::home().unwrap();
    let needs = "programs with the feature failpoints: run `cargo xtask build`";
    Fleet::start_in(home, config).await.expect(needs)
}

/// More than a terminal carries: it has frames.
fn task(client: &Client) -> TaskRequest {
    let pool: PoolId = "default".parse().unwrap();
    client.task(&pool, vec![Step::command(["seq", "20000"])])
}

/// The points that a log says were passed, each once, in the order of their first time.
fn passed(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap();
    let mut points: Vec<String> = Vec::new();
    for line in text.lines() {
        let told = line.split_once("failpoint ").map(|(_, rest)| rest);
        let Some((point, _)) = told.and_then(|rest| rest.split_once(" executed")) else {
            continue;
        };
        if !points.iter().any(|known| known == point) {
            points.push(point.to_owned());
        }
    }
    points
}

#[tokio::test]
async fn a_task_passes_every_step_in_its_order() {
    let steps = [&dispatcher::STEPS[..], &worker::STEPS].concat();
    let points: Vec<String> = steps.iter().map(|step| format!("{step}=print")).collect();
    let fleet = fleet(&points.join(";")).await;
    let client = fleet.client("points").await.unwrap();
    let ended = client.run(task(&client)).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Succeeded);
    assert!(ended.frames > 0);
    let logs = fleet.data().join("data/logs");
    eventually("pass of every step", PATIENCE, async || {
        for (log, steps) in [
            ("dispatcher.log", &dispatcher::STEPS[..]),
            ("worker.log", &worker::STEPS),
        ] {
            let passed = passed(&logs.join(log));
            anyhow::ensure!(passed == steps, "{log}: {passed:?}");
        }
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn who_takes_the_file_dies_and_the_next_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("die");
    let fleet = fleet(&format!(
        "{}=return({})",
        dispatcher::PLACED,
        file.display()
    ))
    .await;
    let client = fleet.client("points").await.unwrap();
    let first = fleet.pid("dispatcher").unwrap();
    let ended = client.run(task(&client)).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Succeeded);
    assert_eq!(
        fleet.pid("dispatcher").unwrap(),
        first,
        "it was not told to"
    );
    std::fs::write(&file, "").unwrap();
    let ended = client.run(task(&client)).await.unwrap();
    assert_eq!((ended.outcome, ended.attempt), (Outcome::Succeeded, 1));
    fleet.started_again("dispatcher", first).await.unwrap();
    assert!(!file.exists());
    let ended = client.run(task(&client)).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Succeeded);
}
