//! Servers that hold what the fleet did not put there: told, set aside or refused at the start.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use remuda_tests::fleet::{Fleet, finish, remuda};
use remuda_tests::process::Process;
use remuda_tests::servers::{NatsServer, RedisServer, ask_redis_all};
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

#[tokio::test]
async fn a_redis_full_of_foreign_keys() {
    let fleet = Fleet::start().await.unwrap();
    // Another program's, many, beside the fleet's and under its prefix.
    let mut foreign: Vec<Vec<String>> = (0..20_000)
        .map(|n| words(&["SET", &format!("session:{n}"), "x"]))
        .collect();
    foreign.extend((0..2_000).map(|n| words(&["LPUSH", &format!("{{remuda}}:cache:{n}"), "x"])));
    // Under the very names that the fleet uses, in types that it does not.
    for name in ["warm:default", "pools", "workers", "dead", "leader:default"] {
        let key = format!("{{remuda}}:{name}");
        foreign.push(words(&["DEL", &key]));
        foreign.push(words(&["LPUSH", &key, "x"]));
    }
    for name in ["counter", "incarnation"] {
        foreign.push(words(&["SET", &format!("{{remuda}}:{name}"), "garbage"]));
    }
    ask_redis_all(fleet.redis(), &foreign).await.unwrap();

    for n in 0..4 {
        let finished = fleet.run(["echo", &n.to_string()]).await.unwrap();
        assert_eq!(finished.text(), format!("{n}\n"), "{}", finished.stderr);
    }
    let counted = eventually("count of foreign keys", PATIENCE, async || {
        let mut sum = 0.0;
        for part in ["dispatcher", "worker"] {
            let name = format!("remuda_{part}_redis_foreign_keys");
            sum += fleet
                .counted(part, &name, "")
                .await
                .map_err(|error| error.to_string())?;
        }
        if sum >= 5.0 {
            Ok(sum)
        } else {
            Err(sum.to_string())
        }
    });
    counted.await.unwrap();
    assert!(fleet.stop().await.unwrap().success());
}

/// A dispatcher by itself, between servers of the test's own.
struct Alone {
    nats: NatsServer,
    redis: RedisServer,
    home: tempfile::TempDir,
}

impl Alone {
    async fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("nats.conf");
        std::fs::write(&config, "max_payload: 8388608\n").unwrap();
        let kind = remuda_tests::servers::Nats {
            args: vec!["--config".to_owned(), config.display().to_string()],
            ..remuda_tests::servers::Nats::default()
        };
        Self {
            nats: NatsServer::start_with(kind).await.unwrap(),
            redis: RedisServer::start().await.unwrap(),
            home,
        }
    }

    async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(self.nats.client().await.unwrap())
    }

    fn dispatcher(&self, streams: &Value) -> Command {
        let file = self.home.path().join("dispatcher.json");
        let options = json!({
            "nats": {"url": self.nats.url()},
            "redis": {"url": self.redis.url()},
            "streams": streams,
            "pools": [{"name": "default", "warm": 0, "max": 1}],
        });
        std::fs::write(&file, options.to_string()).unwrap();
        command(&file)
    }
}

fn command(config: &Path) -> Command {
    let mut command = remuda().unwrap();
    command.arg("dispatcher").arg("--config").arg(config);
    command
}

#[tokio::test]
async fn a_stream_that_exists_with_other_settings_is_refused_by_name() {
    let alone = Alone::start().await;
    let jetstream = alone.jetstream().await;
    // One that keeps the last of each subject: no gate.
    let stream = Config {
        name: "REMUDA_TERM".to_owned(),
        subjects: vec!["remuda.term.*.*.*".to_owned()],
        max_messages_per_subject: 1,
        discard: DiscardPolicy::Old,
        ..Config::default()
    };
    jetstream.create_stream(stream.clone()).await.unwrap();
    let refused = finish(alone.dispatcher(&json!({}))).await.unwrap();
    assert_eq!(refused.code(), 1, "{}", refused.stderr);
    for part in [
        "REMUDA_TERM",
        "discard",
        "Old",
        "New",
        "[stream_mismatch]",
        "remove it or use another prefix",
    ] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    // It is as it was: nothing of anybody's is changed without being asked to.
    let found = jetstream.get_stream("REMUDA_TERM").await.unwrap();
    assert_eq!(found.cached_info().config.discard, DiscardPolicy::Old);
}

#[tokio::test]
async fn retention_that_is_changed_is_applied_or_refused_at_the_start() {
    let alone = Alone::start().await;
    let jetstream = alone.jetstream().await;
    let age = async |stream: &str| {
        let stream = jetstream.get_stream(stream).await.ok()?;
        let config = &stream.cached_info().config;
        Some((config.max_age.as_secs(), config.max_bytes))
    };
    let day = 24 * 3600;
    for (streams, expected) in [
        (json!({}), (day, 8 << 30)),
        (
            json!({"results_age": "2h", "results_bytes": 64 << 20}),
            (2 * 3600, 64 << 20),
        ),
        (json!({"results_age": "7days"}), (7 * day, 8_i64 << 30)),
    ] {
        let running = Process::spawn(alone.dispatcher(&streams)).unwrap();
        eventually("retention as configured", PATIENCE, async || {
            match age("REMUDA_RES").await {
                Some(found) if found == expected => Ok(()),
                other => Err(format!("{other:?}, {}", running.stderr_tail())),
            }
        })
        .await
        .unwrap();
        running.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(running.wait_exit(PATIENCE).await.unwrap().success());
    }
    // What one server cannot do.
    let refused = finish(alone.dispatcher(&json!({"replicas": 3})))
        .await
        .unwrap();
    assert_eq!(refused.code(), 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("resize"), "{}", refused.stderr);
    assert!(refused.stderr.contains("REMUDA_"), "{}", refused.stderr);
}
