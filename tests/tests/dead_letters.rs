//! `remuda dlq` on a real fleet without workers.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::process::Command;
use std::time::Duration;

use broker_schema::{TaskId, TaskRequest};
use remuda_tests::binaries;
use remuda_tests::fleet::{Finished, finish, remuda};
use remuda_tests::process::Process;
use remuda_tests::servers::{NatsServer, RedisServer};
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

struct Scene {
    nats: NatsServer,
    _redis: RedisServer,
    _dispatcher: Process,
    jetstream: async_nats::jetstream::Context,
}

impl Scene {
    async fn start() -> Self {
        let (nats, redis) = (
            NatsServer::start().await.unwrap(),
            RedisServer::start().await.unwrap(),
        );
        let config = nats.data().join("dispatcher.yaml");
        let options = json!({
            "nats": {"url": nats.url()},
            "redis": {"url": redis.url()},
            "pools": [{"name": "py", "backend": "fake"}],
        });
        std::fs::write(&config, options.to_string()).unwrap();
        let mut command = Command::new(binaries::program("remuda-dispatcher").unwrap());
        command.arg("--config").arg(&config);
        let dispatcher = Process::spawn(command).unwrap();
        let jetstream = async_nats::jetstream::new(nats.client().await.unwrap());
        let scene = Self {
            nats,
            _redis: redis,
            _dispatcher: dispatcher,
            jetstream,
        };
        eventually("streams", PATIENCE, async || {
            // The last one that is made.
            scene.jetstream.get_stream("REMUDA_INC").await.map(drop)
        })
        .await
        .unwrap();
        scene
    }

    /// Publishes a message for the pool, under an id of its own or none.
    async fn publish(&self, id: Option<String>, payload: Vec<u8>) {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Content-Type", "application/json");
        if let Some(id) = id {
            headers.insert("Nats-Msg-Id", id);
        }
        self.jetstream
            .publish_with_headers("remuda.req.acme.py", headers, payload.into())
            .await
            .unwrap()
            .await
            .unwrap();
    }

    async fn dlq(&self, args: &[&str]) -> Finished {
        let mut command = remuda().unwrap();
        command
            .env("REMUDA_NATS", self.nats.url())
            .arg("dlq")
            .args(args);
        finish(command).await.unwrap()
    }

    async fn listed(&self, count: usize) -> Vec<Value> {
        eventually("dead letters", PATIENCE, async || {
            let finished = self.dlq(&["list", "--all-tenants", "--json"]).await;
            assert_eq!(finished.code(), 0, "{finished:?}");
            let letters: Vec<Value> = finished
                .text()
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            if letters.len() == count {
                Ok(letters)
            } else {
                Err(format!("{letters:?}"))
            }
        })
        .await
        .unwrap()
    }
}

fn task() -> TaskRequest {
    let ids = ["acme", "r1", "py"].map(str::to_owned);
    TaskRequest::new(
        ids[0].parse().unwrap(),
        ids[1].parse().unwrap(),
        ids[2].parse().unwrap(),
        vec![broker_schema::Step::command(["true"])],
    )
}

#[tokio::test]
async fn dead_letters_are_listed_shown_and_sent_again() {
    let scene = Scene::start().await;
    let none = scene.dlq(&["list"]).await;
    assert_eq!((none.code(), none.text().as_str()), (0, ""));
    assert!(none.stderr.contains("--all-tenants"), "{none:?}");

    // Nobody can tell whose it is; and an id that is used for two requests, of which the first
    // has its end.
    scene.publish(None, b"\x1b[2Jgarbage".to_vec()).await;
    scene.listed(1).await;
    let mut expired = task();
    let soon = Duration::from_millis(200);
    expired.deadline = Some(broker_schema::Timestamp::now().plus(soon));
    let message_id = Some(expired.message_id());
    scene
        .publish(message_id, serde_json::to_vec(&expired).unwrap())
        .await;
    let terminal = format!("remuda.term.acme.r1.{}", expired.id);
    eventually("its end", PATIENCE, async || {
        let stream = scene.jetstream.get_stream("REMUDA_TERM").await;
        let stream = stream.map_err(|error| error.to_string())?;
        let last = stream.get_last_raw_message_by_subject(&terminal).await;
        last.map(drop).map_err(|error| error.to_string())
    })
    .await
    .unwrap();
    let mut second = expired.clone();
    second.deadline = None;
    second.timeout_ms = Some(4321);
    scene
        .publish(None, serde_json::to_vec(&second).unwrap())
        .await;
    let letters = scene.listed(2).await;
    assert_eq!(letters[1]["code"], "id_conflict", "{letters:?}");
    assert_eq!(letters[1]["task"], json!(expired.id));
    assert_eq!(letters[1]["subject"], "remuda.req.acme.py");
    assert!(letters[1]["time"].as_u64().unwrap() > 1_700_000_000_000_000);

    let table = scene
        .dlq(&["--tenant", "acme", "list", "--pool", "py"])
        .await
        .text();
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(
        table.starts_with("SEQ") && table.contains("id_conflict"),
        "{table}"
    );
    let other = scene
        .dlq(&["--tenant", "acme", "list", "--pool", "rs"])
        .await;
    assert_eq!(other.text(), "");

    let shown = scene.dlq(&["show", "2"]).await.text();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["request"]["timeout_ms"], 4321, "{shown}");
    assert_eq!(shown["headers"]["Remuda-Code"], "id_conflict", "{shown}");
    let garbage = scene.dlq(&["show", "1"]).await.text();
    assert!(
        !garbage.contains('\u{1b}') && garbage.contains("garbage"),
        "{garbage}"
    );
    let raw = scene.dlq(&["show", "1", "--raw"]).await;
    assert_eq!(raw.stdout, b"\x1b[2Jgarbage");
    let missing = scene.dlq(&["show", "99"]).await;
    assert_eq!(missing.code(), 1);
    assert!(missing.stderr.contains("no dead letter 99"), "{missing:?}");

    // All that can be sent again is, and what cannot be is named and stays.
    let all = scene
        .dlq(&["requeue", "--all", "--all-tenants", "--json"])
        .await;
    assert_eq!(all.code(), 1, "{all:?}");
    assert!(all.stderr.contains("--force"), "{all:?}");
    let sent: Value = serde_json::from_str(all.text().trim()).unwrap();
    assert_eq!(
        (&sent["seq"], &sent["was"]),
        (&json!(2), &json!(expired.id))
    );
    assert_eq!(sent["new_deadline"], false);
    let new: TaskId = sent["task"].as_str().unwrap().parse().unwrap();
    assert_ne!(new, expired.id);
    let left = scene.listed(1).await;
    assert_eq!(left[0]["seq"], 1);

    let forced = scene.dlq(&["requeue", "1", "--force"]).await;
    assert_eq!(forced.code(), 0, "{forced:?}");
    assert!(
        forced
            .text()
            .contains("published again to remuda.req.acme.py"),
        "{forced:?}"
    );
    let back = eventually("the same one again", PATIENCE, async || {
        let letters = scene.listed(1).await;
        if letters[0]["seq"] == 3 {
            Ok(())
        } else {
            Err(format!("{letters:?}"))
        }
    });
    back.await.unwrap();
}
