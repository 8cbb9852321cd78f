//! Faults of dispatchers, workers and sandboxes.

use std::time::Duration;

use broker_schema::{Outcome, Priority};
use futures::FutureExt as _;
use nix::sys::signal::Signal;
use remuda_telemetry::failpoint::{dispatcher, sidecar};
use serde_json::json;

use super::super::plan::{PlannedTask, Size, Work};
use super::super::points;
use super::super::sandboxes;
use super::super::scene::Scene;
use super::super::shape::{MAX_ATTEMPTS, Shape};
use super::super::world::World;
use super::{Fault, Lengths, NOTHING, REPEATED_DEATHS, SESSIONS};

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 14,
        name: "worker-kill",
        what: "SIGKILL to a worker at a moment and at points of the seed's choice, started again",
        checks: "its tasks run elsewhere, nothing of its sandboxes is left",
        needs: &[],
        shape: |shape, _| dying(shape),
        strike: |scene| worker_kill(scene).boxed(),
        lengths: Lengths::one("1 kill, 3 points of 13"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 15,
        name: "worker-freeze",
        what: "SIGSTOP to a worker for longer than its leases hold, then SIGCONT",
        checks: "what it says afterwards changes nothing",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| worker_freeze(scene).boxed(),
        lengths: Lengths::one("a lease's life and 3 s"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 16,
        name: "dispatcher-kill",
        what: "SIGKILL to dispatchers, also between the ack of RUN and the ack of REQ, started again",
        checks: "one terminal however often a placement was published",
        needs: &[],
        shape: |shape, _| dying(shape),
        strike: |scene| dispatcher_kill(scene).boxed(),
        lengths: Lengths::one("2 kills, 3 points of 8"),
        forgiven: NOTHING,
        ci: true,
    },
    Fault {
        number: 17,
        name: "dispatcher-freeze",
        what: "SIGSTOP to one dispatcher of two until the other has taken over, then SIGCONT; both ways",
        checks: "one terminal, tasks go on meanwhile",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| dispatcher_freeze(scene).boxed(),
        lengths: Lengths::one("8 s each"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 18,
        name: "sidecar-death",
        what: "SIGKILL to some sidecars, SIGSTOP to others, and a worker whose sidecars talk garbage",
        checks: "their sandboxes are destroyed, other sandboxes go on",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| sidecar_death(scene).boxed(),
        lengths: Lengths::one("4 sidecars, 4 s of garbage"),
        forgiven: REPEATED_DEATHS,
        ci: false,
    },
    Fault {
        number: 29,
        name: "poison",
        what: "a task whose worker is killed whenever it runs",
        checks: "dead letter at the most attempts, not one more",
        needs: &[],
        shape: |shape, _| {
            shape.load = Size {
                tasks: 20,
                sessions: 0,
                ..Size::default()
            };
        },
        strike: |scene| poison(scene).boxed(),
        lengths: Lengths::one("1 task"),
        forgiven: REPEATED_DEATHS,
        ci: false,
    },
];

/// Daemons that can die at points, and are started again.
fn dying(shape: &mut Shape) {
    shape.points = true;
    shape.supervised = true;
}

async fn worker_kill(scene: &mut Scene) -> anyhow::Result<()> {
    let worker = scene.a_worker();
    scene.moment(5, 20).await;
    scene.world.workers[worker].kill().await?;
    scene.wait(0, 1500).await;
    scene.world.workers[worker].start()?;
    die_at(scene, points::of_workers(), 3).await
}

/// Daemons die at so many points of the seed's choice, and are started again.
async fn die_at(
    scene: &mut Scene,
    mut points: Vec<&'static str>,
    times: usize,
) -> anyhow::Result<()> {
    let mut told = Vec::new();
    for _ in 0..times.min(points.len()) {
        let point = points.remove(scene.random.index(points.len()));
        scene.world.points.arm(point)?;
        let fired = scene
            .world
            .points
            .fired(point, Duration::from_secs(4))
            .await;
        told.push(format!(
            "{point}{}",
            if fired { "" } else { " (not passed)" }
        ));
        scene.wait(0, 1000).await;
        scene.world.revive()?;
    }
    scene.note(told.join(", "));
    Ok(())
}

async fn worker_freeze(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(10, 50).await;
    let worker = scene.a_worker();
    scene.world.workers[worker].signal(Signal::SIGSTOP)?;
    tokio::time::sleep(scene.past_ttl()).await;
    scene.world.workers[worker].signal(Signal::SIGCONT)
}

async fn dispatcher_kill(scene: &mut Scene) -> anyhow::Result<()> {
    for (first, last) in [(5, 15), (25, 35)] {
        scene.moment(first, last).await;
        let dispatcher = scene.a_dispatcher();
        scene.world.dispatchers[dispatcher].kill().await?;
        scene.wait(0, 1000).await;
        scene.world.dispatchers[dispatcher].start()?;
    }
    // What the plan asks for, then others.
    die_at(scene, vec![dispatcher::PLACED], 1).await?;
    let mut others = points::of_dispatchers();
    others.retain(|point| *point != dispatcher::PLACED);
    die_at(scene, others, 2).await
}

async fn dispatcher_freeze(scene: &mut Scene) -> anyhow::Result<()> {
    scene.moment(5, 25).await;
    let first = scene.a_dispatcher();
    for turn in 0..scene.world.dispatchers.len() {
        let dispatcher = (first + turn) % scene.world.dispatchers.len();
        scene.world.dispatchers[dispatcher].signal(Signal::SIGSTOP)?;
        let ended = scene.load.notebook.counts().borrow().ended;
        tokio::time::sleep(Duration::from_secs(8)).await;
        let meanwhile = scene.load.notebook.counts().borrow().ended - ended;
        scene.note(format!("{meanwhile} ended meanwhile"));
        scene.world.dispatchers[dispatcher].signal(Signal::SIGCONT)?;
    }
    Ok(())
}

async fn sidecar_death(scene: &mut Scene) -> anyhow::Result<()> {
    let mut hung = Vec::new();
    for (round, (first, last)) in [(10, 20), (30, 40), (50, 60), (70, 80)]
        .into_iter()
        .enumerate()
    {
        scene.moment(first, last).await;
        let worker = scene.a_worker();
        let pid = scene.world.workers[worker].pid()?;
        let sidecars = sandboxes::sidecars(pid)?;
        let Some(seen) = sidecars.get(scene.random.index(sidecars.len())) else {
            continue;
        };
        if round % 2 == 0 {
            sandboxes::signal(seen, Signal::SIGKILL);
        } else if sandboxes::signal(seen, Signal::SIGSTOP) {
            hung.push(*seen);
        }
    }
    let worker = scene.a_worker();
    let garbage = json!({"telemetry": {"failpoints": format!("{}=30%return", sidecar::GARBAGE)}});
    for (points, last) in [
        (garbage, false),
        (json!({"telemetry": {"failpoints": ""}}), true),
    ] {
        World::reconfigure(&scene.world.workers[worker], points)?;
        scene.world.workers[worker]
            .stop(Duration::from_secs(30))
            .await?;
        scene.world.workers[worker].start()?;
        if !last {
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
    }
    // What hangs is found out by those who want something of it. An idle one
    // that nobody wants may hang for as long as it likes.
    scene.wait(6000, 8000).await;
    let still = hung.iter().filter(|seen| seen.runs()).count();
    scene.note(format!(
        "{still} of {} hung ones are still there",
        hung.len()
    ));
    for seen in &hung {
        sandboxes::signal(seen, Signal::SIGCONT);
    }
    Ok(())
}

async fn poison(scene: &mut Scene) -> anyhow::Result<()> {
    const MARK: u64 = 77_000_000;
    scene.moment(5, 20).await;
    scene.load.add(PlannedTask {
        at: Duration::ZERO,
        work: Work::Marked {
            mark: MARK,
            time: Duration::from_secs(20),
        },
        priority: Priority::High,
        cancel_after: None,
        twice: false,
        streamed: false,
    })?;
    let marker = Work::marker(MARK);
    let ended = |scene: &Scene| {
        let seen = scene.load.notebook.all().into_iter();
        seen.filter(|seen| seen.what.starts_with("Marked"))
            .find_map(|seen| seen.terminal)
    };
    let mut kills = 0;
    let until = tokio::time::Instant::now() + Duration::from_secs(150);
    let terminal = loop {
        if let Some(terminal) = ended(scene) {
            break Some(terminal);
        }
        if tokio::time::Instant::now() > until {
            break None;
        }
        for index in 0..scene.world.workers.len() {
            let worker = &mut scene.world.workers[index];
            if worker.runs() && sandboxes::runs(worker.pid()?, &marker)? {
                worker.kill().await?;
                worker.start()?;
                kills += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    scene.note(format!("{kills} workers killed"));
    match terminal {
        Some(terminal) => {
            let good = terminal.outcome == Outcome::DeadLettered
                && terminal.attempt == MAX_ATTEMPTS
                && !terminal.valid();
            scene.demand(
                good,
                format!(
                    "the poison ended as {} after attempt {}, by {}",
                    terminal.outcome,
                    terminal.attempt,
                    terminal.attribution.as_str()
                ),
            );
            scene.demand(
                kills == MAX_ATTEMPTS,
                format!("it ran {kills} times, {MAX_ATTEMPTS} are the most"),
            );
        }
        None => scene.demand(false, "the poison has no terminal"),
    }
    Ok(())
}
