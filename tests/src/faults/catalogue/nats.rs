//! Faults of nats-server and of what it keeps.

use std::time::Duration;

use anyhow::Context as _;
use broker_schema::Priority;
use broker_schema::stream::Sizes;
use futures::FutureExt as _;
use serde_json::json;

use super::super::damage::{self, Damage};
use super::super::plan::{PlannedTask, Work};
use super::super::scene::Scene;
use super::super::versions;
use super::super::world::jetstream_folder;
use super::{Fault, Lengths, NOTHING, Need, STORAGE};

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 1,
        name: "nats-kill",
        what: "SIGKILL to nats-server under load, started again on the same data; twice",
        checks: "nothing that was accepted is lost",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| kill(scene).boxed(),
        lengths: Lengths::one("2 kills"),
        forgiven: NOTHING,
        ci: true,
    },
    Fault {
        number: 2,
        name: "nats-restart-resubmit",
        what: "a clean restart, which forgets message ids; then every id is submitted again",
        checks: "no second terminal",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| restart_resubmit(scene).boxed(),
        lengths: Lengths::one("1 restart"),
        forgiven: NOTHING,
        ci: true,
    },
    Fault {
        number: 3,
        name: "nats-freeze",
        what: "SIGSTOP to nats-server, then SIGCONT",
        checks: "clients recover by themselves",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| freeze(scene).boxed(),
        lengths: Lengths::two("10 s", "60 s"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 4,
        name: "nats-wipe",
        what: "SIGKILL to nats-server, its JetStream folder removed, started again empty",
        checks: "clients submit again what is gone",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| wipe(scene).boxed(),
        lengths: Lengths::one("1 wipe"),
        forgiven: STORAGE,
        ci: true,
    },
    Fault {
        number: 5,
        name: "nats-disk-full",
        what: "the disk of nats-server is filled up; room is made, and it is started again",
        checks: "submissions fail meanwhile and pass afterwards",
        needs: &[Need::Mounts],
        shape: |shape, _| {
            shape.nats_store = Some(192 << 20);
        },
        strike: |scene| disk_full(scene).boxed(),
        lengths: Lengths::one("4 to 8 s"),
        forgiven: STORAGE,
        ci: false,
    },
    Fault {
        number: 6,
        name: "stream-full",
        what: "the stream of requests is filled to its limit while no dispatcher takes any",
        checks: "the refusal reaches the submitter, who is accepted once there is room",
        needs: &[],
        shape: |shape, _| {
            shape.dispatcher_config = json!({"streams": {"requests_bytes": 16 << 20}});
        },
        strike: |scene| stream_full(scene).boxed(),
        lengths: Lengths::one("24 requests of 1 MB into 16 MB"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 7,
        name: "block-damage",
        what: "SIGKILL to nats-server, the last block of a stream truncated or a bit of it flipped",
        checks: "found or healed; nobody stops",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| block_damage(scene).boxed(),
        lengths: Lengths::one("1 block"),
        forgiven: STORAGE,
        ci: false,
    },
    Fault {
        number: 32,
        name: "nats-upgrade",
        what: "nats-server replaced by a newer version, twice, on the same data",
        checks: "every stream has the settings that were asked for, with every version",
        needs: &[Need::OldNats],
        shape: |shape, _| {
            shape.nats.program = versions::oldest();
        },
        strike: |scene| upgrade(scene).boxed(),
        lengths: Lengths::one("every version at hand"),
        forgiven: NOTHING,
        ci: false,
    },
];

async fn kill(scene: &mut Scene) -> anyhow::Result<()> {
    for (first, last) in [(10, 35), (55, 90)] {
        scene.moment(first, last).await;
        scene.world.nats.kill().await?;
        scene.wait(50, 1500).await;
        scene.world.nats.restart().await?;
    }
    Ok(())
}

async fn restart_resubmit(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(30, 80).await;
    scene.world.nats.restart().await?;
    let count = scene.load.resubmit().await;
    scene.note(format!("{count} submitted again"));
    Ok(())
}

async fn freeze(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 60).await;
    scene.world.nats.pause().await?;
    let time = if scene.full { 60 } else { 10 };
    tokio::time::sleep(Duration::from_secs(time)).await;
    scene.world.nats.resume().await
}

async fn wipe(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(20, 60).await;
    scene.world.nats.kill().await?;
    let folder = jetstream_folder(&scene.world)?;
    std::fs::remove_dir_all(&folder)
        .with_context(|| format!("cannot remove {}", folder.display()))?;
    scene.world.nats.restart().await
}

async fn disk_full(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 40).await;
    let volume = scene.world.nats_volume.as_ref().context("no volume")?;
    let taken = volume.fill()?;
    scene.note(format!("{} MB taken", taken >> 20));
    scene.wait(4000, 8000).await;
    let volume = scene.world.nats_volume.as_ref().context("no volume")?;
    volume.empty()?;
    // A stream that could not be written stays refused until the server starts
    // again: that is what the page on operations tells people to do.
    scene.world.nats.restart().await
}

async fn stream_full(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 40).await;
    for dispatcher in &scene.world.dispatchers {
        dispatcher.signal(nix::sys::signal::Signal::SIGSTOP)?;
    }
    let before = scene.load.notebook.counts().borrow().accepted;
    for number in 0..24 {
        scene.load.add(PlannedTask {
            at: Duration::ZERO,
            work: Work::Bulk {
                mark: 90_000_000 + number,
                bytes: 1 << 20,
            },
            priority: Priority::Normal,
            cancel_after: None,
            twice: false,
            streamed: false,
        })?;
    }
    // 16 MB take 15 of them at most.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let refused = {
        let seen = scene.load.notebook.all();
        let bulk = seen.iter().filter(|seen| seen.what.starts_with("Bulk"));
        bulk.filter(|seen| seen.accepted.is_none()).count()
    };
    let accepted = scene.load.notebook.counts().borrow().accepted - before;
    scene.note(format!(
        "{refused} of 24 refused, {accepted} accepted meanwhile"
    ));
    scene.demand(refused > 0, "a full stream took everything");
    for dispatcher in &scene.world.dispatchers {
        dispatcher.signal(nix::sys::signal::Signal::SIGCONT)?;
    }
    Ok(())
}

async fn block_damage(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(30, 80).await;
    scene.world.nats.kill().await?;
    let folder = jetstream_folder(&scene.world)?;
    let damage = if scene.random.chance(1, 2) {
        Damage::Truncate
    } else {
        Damage::FlipBit
    };
    let told = damage::harm_a_last_block(&folder, damage, &mut scene.random)?;
    scene.note(told);
    scene.world.nats.restart().await
}

async fn upgrade(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 25).await;
    let mut programs = versions::at_hand();
    programs.remove(0);
    for (version, program) in programs {
        scene.world.nats.kind_mut().program = Some(program);
        scene.world.nats.restart().await?;
        scene.note(format!("now {version}"));
        let sizes = sizes(scene);
        let checked = scene.client().broker().ensure_streams(&sizes).await;
        let told = checked.as_ref().err().map(ToString::to_string);
        scene.demand(
            checked.is_ok(),
            format!("{version}: {}", told.unwrap_or_default()),
        );
        scene.wait(1000, 3000).await;
    }
    Ok(())
}

/// What the dispatchers were told about the streams.
fn sizes(scene: &Scene) -> Sizes {
    let config = scene.world.shape().dispatcher();
    let bytes = |name: &str| config["streams"][name].as_i64();
    let mut sizes = Sizes::default();
    sizes.requests_bytes = bytes("requests_bytes").unwrap_or(sizes.requests_bytes);
    sizes.results_bytes = bytes("results_bytes").unwrap_or(sizes.results_bytes);
    sizes.terminals_bytes = bytes("terminals_bytes").unwrap_or(sizes.terminals_bytes);
    sizes
}
