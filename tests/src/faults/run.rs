//! One run: one fault, one seed.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use broker_schema::Outcome;
use tokio::time::Instant;

use super::catalogue::Fault;
use super::judge::{self, WITHIN};
use super::load::{Load, Seen};
use super::plan::Plan;
use super::random::Random;
use super::report::{Figures, Report, Verdict};
use super::scene::{Scene, Violation};
use super::shape::{Pace, Shape};
use super::world::World;
use crate::check::{self, Promises};
use crate::history::{Ends, now};

/// How long a fault may take beside its load: a strike that hangs is broken.
const STRIKE: Duration = Duration::from_secs(300);
/// How long is waited for terminals that are late, to say how late they are.
const LATE: Duration = Duration::from_secs(30);

/// How long a terminal may be on its way to its reader.
const IN_FLIGHT: Duration = Duration::from_secs(8);

/// What a run is told beside its fault and seed.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) full: bool,
    pub(crate) pace: Pace,
    pub(crate) keep: bool,
    pub(crate) mutation: Option<String>,
}

/// Does it in a folder of its own, which is gone afterwards unless something
/// is wrong.
pub(crate) async fn run(fault: Fault, seed: u64, terms: Terms, folder: &Path) -> Report {
    let began = Instant::now();
    let verdict = match Box::pin(attempt(&fault, seed, terms.clone(), folder)).await {
        Ok(figures) => Verdict::Ran(figures),
        Err(error) => Verdict::Broken(format!("{error:#}")),
    };
    let good = matches!(&verdict, Verdict::Ran(figures) if figures.violations.is_empty());
    if good && !terms.keep {
        let _ = std::fs::remove_dir_all(folder);
    }
    Report {
        fault: fault.number,
        seed,
        took: began.elapsed(),
        folder: folder.to_path_buf(),
        verdict,
    }
}

async fn attempt(fault: &Fault, seed: u64, terms: Terms, folder: &Path) -> anyhow::Result<Figures> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut shape = Shape {
        pace: terms.pace,
        mutation: terms.mutation,
        ..Shape::default()
    };
    (fault.shape)(&mut shape, terms.full);
    let size = shape.load;
    let mut world = World::make(shape, folder).await?;
    if let Err(error) = world.up().await {
        world.keep_logs()?;
        return Err(error.context("the fleet does not start"));
    }
    let random = Random::new(seed).fork(fault.name);
    let run = format!("{}-{seed}", fault.name);
    let load = Load::start(&world, &run, Plan::new(seed, size)).await?;
    let mut scene = Scene {
        world,
        load,
        random,
        forgiven: fault.forgiven,
        full: terms.full,
        notes: Vec::new(),
        violations: Vec::new(),
    };
    let struck = tokio::time::timeout(size.over * 2 + STRIKE, (fault.strike)(&mut scene)).await;
    let struck = struck
        .context("the fault did not end")
        .and_then(|struck| struck);
    if let Err(error) = struck {
        scene.world.keep_logs()?;
        return Err(error);
    }
    let figures = settle(fault, scene, size.over).await;
    figures.context("cannot look at what came of it")
}

/// Waits for the end of everything, and judges it.
async fn settle(fault: &Fault, mut scene: Scene, over: Duration) -> anyhow::Result<Figures> {
    let (fault_end, faults_ended) = (Instant::now(), now());
    // What was not submitted yet has its time from then on.
    let rest = (scene.load.began + over).saturating_duration_since(fault_end);
    let until = fault_end + rest + WITHIN + LATE;
    while !scene.load.finish(Duration::from_millis(200)).await && Instant::now() < until {
        if scene.world.shape().supervised {
            scene.world.revive()?;
        }
    }
    let seen = scene.load.notebook.all();
    // Not by the client's way, which may be the slow one.
    let reader = scene.world.client("reader").await?;
    let ends = Ends::read(reader.broker()).await;
    drop(reader);
    let left = scene.world.stop().await?;
    scene.world.keep_logs()?;
    let mut ends = ends?;
    ends.leftovers = left;
    let promises = Promises {
        within: WITHIN,
        faults_ended,
        storage_lost: if fault.forgiven.storage {
            // What was on its way to a client then was read after it.
            vec![(faults_ended + IN_FLIGHT.as_nanos() as u64).min(ends.at)]
        } else {
            Vec::new()
        },
    };
    let log = scene.world.log().clone();
    let mut violations = std::mem::take(&mut scene.violations);
    violations.extend(judge::judge(&seen, &ends, scene.forgiven, fault_end));
    let checking = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        Ok(check::check(&log.read()?, &ends, &promises))
    });
    let checked = checking.await.context("the checker panicked")??;
    violations.extend(
        checked
            .into_iter()
            .map(|found| Violation::new(&found.invariant.to_string(), found.to_string())),
    );
    let figures = Figures {
        recovery: recovery(&seen, fault_end),
        notes: std::mem::take(&mut scene.notes),
        ..count(&seen, violations)
    };
    let folder = scene.world.folder().to_path_buf();
    drop(scene);
    let text = serde_json::to_string_pretty(&figures).context("cannot write the figures")?;
    std::fs::write(folder.join("report.json"), text).context("cannot write the report")?;
    Ok(figures)
}

/// From the last fault's end to the last terminal of what was there then.
fn recovery(seen: &[Seen], fault_end: Instant) -> Duration {
    let before = |seen: &&Seen| seen.accepted.is_some_and(|accepted| accepted <= fault_end);
    let last = seen
        .iter()
        .filter(before)
        .filter_map(|seen| seen.ended)
        .max();
    last.map_or(Duration::ZERO, |last| {
        last.saturating_duration_since(fault_end)
    })
}

fn count(seen: &[Seen], violations: Vec<Violation>) -> Figures {
    let ended = |wanted: Outcome| {
        let ended = seen.iter().filter_map(|seen| seen.terminal.as_ref());
        ended.filter(|terminal| terminal.outcome == wanted).count()
    };
    let again = |seen: &&Seen| {
        let attempt = seen
            .terminal
            .as_ref()
            .map_or(0, |terminal| terminal.attempt);
        attempt > 1 + u32::from(seen.retries)
    };
    Figures {
        tasks: seen.len(),
        accepted: seen.iter().filter(|seen| seen.accepted.is_some()).count(),
        again: seen.iter().filter(again).count(),
        cancelled: ended(Outcome::Cancelled),
        lost: ended(Outcome::SandboxLost),
        dead: ended(Outcome::DeadLettered),
        violations,
        ..Figures::default()
    }
}
