//! Faults of redis-server and of what it remembers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::FutureExt as _;

use super::super::scene::Scene;
use super::super::shape::Who;
use super::{Fault, Lengths, NOTHING, SESSIONS};
use crate::proxy::Rules;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 8,
        name: "redis-kill",
        what: "SIGKILL to redis-server, started again from its append-only file; twice",
        checks: "leases go on",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| kill(scene).boxed(),
        lengths: Lengths::one("2 kills"),
        forgiven: NOTHING,
        ci: true,
    },
    Fault {
        number: 9,
        name: "redis-flush",
        what: "FLUSHALL in the middle of everything",
        checks: "a new incarnation is in force",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| flush(scene).boxed(),
        lengths: Lengths::one("1 flush"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 10,
        name: "redis-old-state",
        what: "SIGKILL to redis-server, its data replaced by an older copy, started again",
        checks: "a new incarnation is in force: old epochs are refused",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| old_state(scene).boxed(),
        lengths: Lengths::one("a copy 1 to 3 s old"),
        forgiven: SESSIONS,
        ci: false,
    },
    Fault {
        number: 11,
        name: "redis-freeze",
        what: "SIGSTOP to redis-server for longer than a lease holds, then SIGCONT",
        checks: "workers end what they cannot renew",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| freeze(scene).boxed(),
        lengths: Lengths::one("a lease's life and 3 s"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 12,
        name: "redis-full",
        what: "maxmemory below what is used: Redis refuses every write, then has room again",
        checks: "no lease is lost",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| full(scene).boxed(),
        lengths: Lengths::one("2 s, twice"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 13,
        name: "redis-slow",
        what: "DEBUG SLEEP 5, then 5 s of latency between Redis and one worker and one dispatcher",
        checks: "a grant that comes too late is not used",
        needs: &[],
        shape: |shape, _| {
            shape.redis.args = vec!["--enable-debug-command".into(), "local".into()];
            shape.proxied = vec![Who::Worker(0), Who::Dispatcher(0)];
        },
        strike: |scene| slow(scene).boxed(),
        lengths: Lengths::one("5 s and 5 s"),
        forgiven: SESSIONS,
        ci: false,
    },
];

async fn kill(scene: &mut Scene) -> anyhow::Result<()> {
    for (first, last) in [(10, 35), (55, 90)] {
        scene.moment(first, last).await;
        let since = Instant::now();
        scene.world.redis.kill().await?;
        scene.wait(50, 1500).await;
        scene.world.redis.restart().await?;
        scene.was_away("Redis", since.elapsed());
    }
    Ok(())
}

async fn flush(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(20, 70).await;
    let before = scene.incarnation().await?;
    scene.world.redis.command(&["FLUSHALL"]).await?;
    newer(scene, before).await
}

/// A new incarnation is put in force soon.
async fn newer(scene: &mut Scene, before: u32) -> anyhow::Result<()> {
    let patience = Duration::from_secs(20);
    let newer = crate::wait::eventually("new incarnation", patience, async || {
        let now = scene
            .incarnation()
            .await
            .map_err(|error| error.to_string())?;
        if now > before {
            Ok(now)
        } else {
            Err(format!("it is still {now}"))
        }
    })
    .await;
    match newer {
        Ok(now) => scene.note(format!("incarnation {before} became {now}")),
        Err(error) => scene.demand(false, format!("{error:#}")),
    }
    Ok(())
}

async fn old_state(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 40).await;
    let data = scene.world.redis.data().to_path_buf();
    let copy = scene.world.folder().join("redis-then");
    copy_folder(&data, &copy)?;
    scene.wait(1000, 3000).await;
    let before = scene.incarnation().await?;
    scene.world.redis.kill().await?;
    for entry in std::fs::read_dir(&data)? {
        let path = entry?.path();
        if path.is_dir() {
            std::fs::remove_dir_all(&path)?;
        } else {
            std::fs::remove_file(&path)?;
        }
    }
    copy_folder(&copy, &data)?;
    scene.world.redis.restart().await?;
    newer(scene, before).await
}

fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

async fn freeze(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 50).await;
    scene.world.redis.pause().await?;
    tokio::time::sleep(scene.past_ttl()).await;
    scene.world.redis.resume().await
}

async fn full(scene: &mut Scene) -> anyhow::Result<()> {
    for (first, last) in [(10, 30), (60, 80)] {
        scene.moment(first, last).await;
        let redis = &scene.world.redis;
        redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await?;
        // Less than what lies between two renewals and the end of a lease.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let redis = &scene.world.redis;
        redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await?;
    }
    Ok(())
}

async fn slow(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 25).await;
    // Answers only when it is over.
    scene.world.redis.command(&["DEBUG", "SLEEP", "5"]).await?;
    scene.wait(200, 1000).await;
    let late = Rules {
        latency: Duration::from_secs(5),
        ..Rules::default()
    };
    for who in [Who::Worker(0), Who::Dispatcher(0)] {
        scene.world.proxies(who)?.redis.set(late.clone());
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for who in [Who::Worker(0), Who::Dispatcher(0)] {
        scene.world.proxies(who)?.redis.heal();
    }
    Ok(())
}
