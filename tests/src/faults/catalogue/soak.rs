//! One fault after the other for a long time.

use std::time::Duration;

use futures::FutureExt as _;
use nix::sys::signal::Signal;

use super::super::plan::Size;
use super::super::scene::Scene;
use super::{Fault, Lengths, REPEATED_DEATHS};

pub(super) const FAULTS: &[Fault] = &[Fault {
    number: 35,
    name: "soak",
    what: "faults of the seed's choice, one after the other, under a load that goes on",
    checks: "nothing is left on the host; memory of the daemons stays flat",
    needs: &[],
    shape: |shape, full| {
        let minutes = minutes(full);
        shape.load = Size {
            tasks: minutes as usize * 200,
            sessions: 4 * minutes as usize,
            steps: 8,
            over: Duration::from_secs(60 * minutes),
        };
    },
    strike: |scene| soak(scene).boxed(),
    lengths: Lengths::two("2 min", "4 h"),
    forgiven: REPEATED_DEATHS,
    ci: false,
}];

fn minutes(full: bool) -> u64 {
    if full { 240 } else { 2 }
}

/// What a daemon may grow by, in bytes, beside what a load of its size needs.
const GROWTH: u64 = 64 << 20;

async fn soak(scene: &mut Scene) -> anyhow::Result<()> {
    let end = scene.load.began + scene.world.shape().load.over;
    let before = largest(scene)?;
    let mut done = std::collections::BTreeMap::<&str, u32>::new();
    while tokio::time::Instant::now() < end {
        let name = match scene.random.below(9) {
            0 => {
                scene.world.nats.kill().await?;
                scene.wait(0, 1500).await;
                scene.world.nats.restart().await?;
                "nats-kill"
            }
            1 => {
                scene.world.nats.restart().await?;
                "nats-restart"
            }
            2 => {
                scene.world.nats.pause().await?;
                scene.wait(500, 6000).await;
                scene.world.nats.resume().await?;
                "nats-freeze"
            }
            3 => {
                scene.world.redis.kill().await?;
                scene.wait(0, 1500).await;
                scene.world.redis.restart().await?;
                "redis-kill"
            }
            4 => {
                scene.world.redis.command(&["FLUSHALL"]).await?;
                "redis-flush"
            }
            5 => {
                scene.world.redis.pause().await?;
                scene.wait(500, 9000).await;
                scene.world.redis.resume().await?;
                "redis-freeze"
            }
            6 => {
                let worker = scene.a_worker();
                scene.world.workers[worker].kill().await?;
                scene.wait(0, 1500).await;
                scene.world.workers[worker].start()?;
                "worker-kill"
            }
            7 => {
                let worker = scene.a_worker();
                scene.world.workers[worker].signal(Signal::SIGSTOP)?;
                scene.wait(500, 9000).await;
                scene.world.workers[worker].signal(Signal::SIGCONT)?;
                "worker-freeze"
            }
            _ => {
                let dispatcher = scene.a_dispatcher();
                scene.world.dispatchers[dispatcher].kill().await?;
                scene.wait(0, 1500).await;
                scene.world.dispatchers[dispatcher].start()?;
                "dispatcher-kill"
            }
        };
        *done.entry(name).or_default() += 1;
        // Time to recover: what cannot be done is not to be asked for.
        scene.wait(4000, 10_000).await;
    }
    let told: Vec<String> = done
        .iter()
        .map(|(name, times)| format!("{name} {times}"))
        .collect();
    scene.note(told.join(", "));
    let after = largest(scene)?;
    scene.note(format!(
        "largest daemon {} MB, then {} MB",
        before >> 20,
        after >> 20
    ));
    scene.demand(after < before + GROWTH, "a daemon's memory grew");
    Ok(())
}

/// The resident memory of the largest daemon, in bytes.
fn largest(scene: &Scene) -> anyhow::Result<u64> {
    let mut largest = 0;
    for daemon in scene.world.dispatchers.iter().chain(&scene.world.workers) {
        if daemon.runs() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid()?))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kib = line
                .and_then(|line| line.trim().strip_suffix(" kB"))
                .and_then(|kib| kib.parse::<u64>().ok());
            largest = largest.max(kib.unwrap_or_default() << 10);
        }
    }
    Ok(largest)
}
