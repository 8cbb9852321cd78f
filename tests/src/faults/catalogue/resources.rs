//! Faults of the machine: clocks, memory, descriptors, disks. And of what is
//! told of them.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use async_nats::jetstream::consumer;
use broker_schema::stream::PLACEMENT_ACK_WAIT;
use futures::{FutureExt as _, StreamExt as _};

use super::super::clock::Clock;
use super::super::pressure::MemoryGroup;
use super::super::scene::Scene;
use super::{Fault, Lengths, Need, REPEATED_DEATHS, SESSIONS, UNDELIVERED};

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 26,
        name: "clock-step",
        what: "the wall clocks of Redis and of a worker set an hour forward and back",
        checks: "no epoch twice; deadlines of the worker are its own",
        needs: &[Need::Clock],
        shape: |_, _| {},
        strike: |scene| clock_step(scene).boxed(),
        lengths: Lengths::one("+1 h, then -1 h"),
        forgiven: SESSIONS,
        ci: false,
    },
    Fault {
        number: 27,
        name: "memory-pressure",
        what: "a worker in a control group whose memory something else eats up",
        checks: "the worker and its sidecars survive",
        needs: &[Need::MemoryGroup],
        shape: |_, _| {},
        strike: |scene| memory_pressure(scene).boxed(),
        lengths: Lengths::one("6 s in 160 MB"),
        forgiven: SESSIONS,
        ci: false,
    },
    Fault {
        number: 28,
        name: "few-descriptors",
        what: "a worker that may have 64 open files",
        checks: "it refuses, or does what it can; the other one goes on",
        needs: &[Need::Prlimit],
        shape: |_, _| {},
        strike: |scene| few_descriptors(scene).boxed(),
        lengths: Lengths::one("12 s"),
        forgiven: REPEATED_DEATHS,
        ci: false,
    },
    Fault {
        number: 33,
        name: "lost-advisory",
        what: "placements that are delivered as often as they may be, to nobody; the advisories lost",
        checks: "the sweep finds them",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| lost_advisory(scene).boxed(),
        lengths: Lengths::one("4 s of placements"),
        forgiven: UNDELIVERED,
        ci: false,
    },
    Fault {
        number: 34,
        name: "sandbox-disk-full",
        what: "the disk of a worker's sandboxes is filled up, and room is made again",
        checks: "what cannot be made clean is not offered",
        needs: &[Need::Mounts],
        shape: |shape, _| shape.worker_state = Some(64 << 20),
        strike: |scene| sandbox_disk_full(scene).boxed(),
        lengths: Lengths::one("4 to 6 s"),
        forgiven: REPEATED_DEATHS,
        ci: false,
    },
];

async fn clock_step(scene: &mut Scene) -> anyhow::Result<()> {
    const HOUR: i64 = 3600;
    // Processes that read their offset from a file take the places of the
    // first ones.
    let clock = Clock::new(scene.world.folder())?;
    scene.world.workers[0]
        .recipe_mut()
        .envs
        .extend(clock.envs());
    scene.world.workers[0].kill().await?;
    scene.world.workers[0].start()?;
    scene.world.redis.kind_mut().envs = clock.envs();
    scene.world.redis.restart().await?;
    scene.moment(20, 35).await;
    for offset in [HOUR, -HOUR, 0] {
        clock.set(offset)?;
        scene.wait(2000, 3500).await;
        let told = scene.world.redis.command(&["INFO", "server"]).await?;
        let line = |line: &str| {
            line.strip_prefix("server_time_usec:")?
                .trim()
                .parse::<i64>()
                .ok()
        };
        let told = told.lines().find_map(line).context("no time")? / 1_000_000;
        let true_time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let ahead = told - true_time.as_secs() as i64;
        scene.demand(
            (ahead - offset).abs() < 60,
            format!("the clock of Redis is {ahead} s ahead, expected {offset}"),
        );
    }
    Ok(())
}

async fn memory_pressure(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 30).await;
    let group = MemoryGroup::create()?;
    group.limit(160 << 20)?;
    // Started in it, so that all that it has counts.
    let worker = scene.a_worker();
    let pressed = &mut scene.world.workers[worker];
    let wrap = pressed.recipe_mut().wrap.clone();
    pressed.kill().await?;
    pressed.recipe_mut().wrap = [&wrap[..], &group.wrap()].concat();
    pressed.start()?;
    let pid = pressed.pid()?;
    scene.wait(2000, 3000).await;
    let own = group.used()? >> 20;
    // Eats until the kernel ends it, again and again.
    let script =
        "import time\nkept=[]\nwhile True:\n kept.append(bytearray(4<<20)); time.sleep(0.01)\n";
    let until = tokio::time::Instant::now() + Duration::from_secs(6);
    let mut eaters = 0;
    while tokio::time::Instant::now() < until {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", script]);
        let eater = crate::process::Process::spawn(command)?;
        group.add(eater.pid())?;
        let _ = tokio::time::timeout_at(until, eater.exited()).await;
        eaters += 1;
    }
    scene.note(format!("{eaters} eaters beside {own} MB"));
    let alive = scene.world.workers[worker].runs() && scene.world.workers[worker].pid()? == pid;
    scene.demand(alive, "the worker did not survive");
    let pressed = &mut scene.world.workers[worker];
    pressed.recipe_mut().wrap = wrap;
    drop(group);
    if !alive {
        scene.world.revive()?;
    }
    Ok(())
}

async fn few_descriptors(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(5, 20).await;
    let worker = scene.a_worker();
    let poor = &mut scene.world.workers[worker];
    let wrap = poor.recipe_mut().wrap.clone();
    poor.kill().await?;
    poor.recipe_mut().wrap = [
        &wrap[..],
        &["prlimit".into(), "--nofile=64:64".into(), "--".into()],
    ]
    .concat();
    poor.start()?;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let poor = &mut scene.world.workers[worker];
    let ended = poor.process()?.try_exit()?;
    let said = poor.process()?.stderr_tail();
    let told = match ended {
        Some(status) => format!("it ended with {status}"),
        None => "it runs".to_owned(),
    };
    // One that ends says why, and does not crash.
    let clean =
        ended.is_none_or(|status| status.code().is_some_and(|code| (1..=2).contains(&code)));
    let panicked = poor.process()?.stderr()?.contains("panicked");
    poor.kill().await?;
    poor.recipe_mut().wrap = wrap;
    poor.start()?;
    scene.note(told.clone());
    scene.demand(clean && !panicked, format!("{told}; {said}"));
    Ok(())
}

async fn lost_advisory(scene: &mut Scene) -> anyhow::Result<()> {
    let broker = scene.client().broker().clone();
    let placements = broker
        .jetstream()
        .get_stream(&broker.streams().placements)
        .await?;
    let advisories = broker
        .jetstream()
        .get_stream(&broker.streams().advisories)
        .await?;
    scene.moment(10, 25).await;
    // What is delivered to the first worker is so once and never again; and
    // some of it is delivered to somebody who throws it away.
    let mut names = placements.consumer_names();
    let mut stolen = Vec::new();
    while let Some(name) = names.next().await {
        let name = name?;
        if !name.starts_with("worker-worker-0") {
            continue;
        }
        let once = consumer::Config {
            max_deliver: 1,
            ..placements.consumer_info(&name).await?.config
        };
        placements.update_consumer(once).await?;
        stolen = steal(&scene.world.nats.url(), placements.cached_info(), &name).await?;
    }
    scene.note(format!("{} placements thrown away", stolen.len()));
    scene.demand(!stolen.is_empty(), "no placement could be thrown away");
    // Until the server has given up on them; what it tells of that is forgotten.
    let until = tokio::time::Instant::now() + PLACEMENT_ACK_WAIT + Duration::from_secs(2);
    let mut forgotten = 0;
    while tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let purged = advisories.purge().await;
        forgotten += purged.context("cannot empty the advisories")?.purged;
    }
    scene.note(format!("{forgotten} advisories forgotten"));
    Ok(())
}

/// Pulls beside a consumer's owner for a while; the subjects of what came.
async fn steal(
    url: &str,
    stream: &async_nats::jetstream::stream::Info,
    consumer: &str,
) -> anyhow::Result<Vec<String>> {
    const PULLS: usize = 64;
    let nats = async_nats::connect(url).await?;
    let subject = format!(
        "$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}",
        stream.config.name
    );
    let inbox = nats.new_inbox();
    let mut answers = nats.subscribe(inbox.clone()).await?;
    for _ in 0..PULLS {
        let pull = serde_json::json!({"batch": 1, "expires": 3_000_000_000_u64});
        nats.publish_with_reply(subject.clone(), inbox.clone(), pull.to_string().into())
            .await?;
    }
    let mut stolen = Vec::new();
    let over = tokio::time::sleep(Duration::from_secs(4));
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = &mut over => return Ok(stolen),
            answer = answers.next() => match answer {
                Some(message) if message.status.is_none() => {
                    stolen.push(message.subject.to_string());
                }
                Some(_) => {}
                None => return Ok(stolen),
            },
        }
    }
}

async fn sandbox_disk_full(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 30).await;
    let volume = scene.world.worker_volume.as_ref().context("no volume")?;
    let taken = volume.fill()?;
    scene.note(format!("{} MB taken", taken >> 20));
    scene.wait(4000, 6000).await;
    let volume = scene.world.worker_volume.as_ref().context("no volume")?;
    volume.empty()
}
