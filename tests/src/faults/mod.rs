//! The fault harness: a real fleet under a load that follows from a seed, one
//! fault of a plan of 35 at moments that follow from the seed too, and every
//! promise checked afterwards.
//!
//! `plan` says what is submitted, `shape` what is built, `catalogue` what is
//! done to it, `judge` and [`crate::check`] what must have come of it.

mod catalogue;
mod clock;
mod daemon;
mod damage;
mod judge;
mod load;
mod namespace;
mod options;
mod plan;
mod points;
mod pressure;
mod random;
mod report;
mod run;
mod sandboxes;
mod scene;
mod session;
mod shape;
mod versions;
mod volume;
mod world;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use catalogue::Fault;
use report::{Missing, Report, Table, Verdict};
use run::Terms;

use crate::binaries;

pub use options::Options;

/// Runs what the options choose; whether every promise was kept.
#[expect(clippy::print_stdout, reason = "what it prints is what it is for")]
pub async fn main(options: Options) -> anyhow::Result<bool> {
    let faults = catalogue::select(&options.only, options.ci).map_err(anyhow::Error::msg)?;
    if options.list {
        print!("{}", list(&faults));
        return Ok(true);
    }
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let root = options
        .folder
        .clone()
        .unwrap_or_else(|| binaries::workspace().join(".remuda/faults"));
    sweep(&root);
    let folder = root.join(std::process::id().to_string());
    // Dropping the runs, as an interruption does, ends and removes what they made.
    let table = tokio::select! {
        table = all(&options, faults, &folder) => table,
        _ = terminate.recv() => anyhow::bail!("terminated"),
        _ = interrupt.recv() => anyhow::bail!("interrupted"),
    };
    let _ = std::fs::remove_dir(&folder);
    println!("{}", table.text());
    Ok(table.good())
}

/// All runs, some at a time, a line for each that ends.
#[expect(clippy::print_stderr, reason = "progress is for people")]
async fn all(options: &Options, faults: Vec<Fault>, folder: &Path) -> Table {
    let began = Instant::now();
    let over = |options: &Options| options.time().is_some_and(|time| began.elapsed() >= time);
    let mut table = Table {
        faults: Vec::new(),
        reports: Vec::new(),
        full: options.full,
    };
    let mut able = Vec::new();
    for fault in faults {
        if let Some(why) = fault.lacking() {
            eprintln!("{:>2} {}: skipped: {why}", fault.number, fault.name);
            table.faults.push((fault, Some(Missing::Skipped(why))));
        } else {
            able.push(fault);
            table.faults.push((fault, Some(Missing::NoTime)));
        }
    }
    let terms = Terms {
        full: options.full,
        pace: options.pace(),
        keep: options.keep,
        mutation: options.mutate.clone(),
    };
    let mut waiting = options
        .seeds()
        .flat_map(|seed| {
            able.iter()
                .map(move |fault| (*fault, seed))
                .collect::<Vec<_>>()
        })
        .peekable();
    let mut running = JoinSet::new();
    loop {
        while running.len() < options.jobs.max(1) && !over(options) {
            let Some((fault, seed)) = waiting.next() else {
                break;
            };
            let folder = folder.join(format!("{}-{seed}", fault.name));
            let terms = terms.clone();
            running.spawn(async move { Box::pin(guarded(fault, seed, terms, folder)).await });
        }
        let Some(ended) = running.join_next().await else {
            break;
        };
        if let Ok((fault, report)) = ended {
            eprintln!("{}", report.line(&fault));
            table.reports.push(report);
        }
    }
    for (fault, missing) in &mut table.faults {
        if table
            .reports
            .iter()
            .any(|report| report.fault == fault.number)
        {
            *missing = None;
        }
    }
    table
}

/// A run that panics is broken, and says so.
async fn guarded(fault: Fault, seed: u64, terms: Terms, folder: PathBuf) -> (Fault, Report) {
    let began = Instant::now();
    let inner = folder.clone();
    let mut one = JoinSet::new();
    one.spawn(async move { Box::pin(run::run(fault, seed, terms, &inner)).await });
    let report = match one.join_next().await {
        Some(Ok(report)) => report,
        ended => Report {
            fault: fault.number,
            seed,
            took: began.elapsed(),
            folder,
            verdict: Verdict::Broken(match ended {
                Some(Err(error)) => error.to_string(),
                _ => "it did not run".to_owned(),
            }),
        },
    };
    (fault, report)
}

/// What there is, and what is missing for it.
fn list(faults: &[Fault]) -> String {
    let lines = faults.iter().map(|fault| {
        let length = match fault.lengths.full {
            Some(full) => format!("{}; --full {full}", fault.lengths.short),
            None => fault.lengths.short.to_owned(),
        };
        let ci = if fault.ci { ", in CI" } else { "" };
        let lacking = fault
            .lacking()
            .map_or_else(String::new, |why| format!("\n     skipped here: {why}"));
        format!(
            "{:>2} {}: {}\n     checked beside I1 to I9: {}\n     {length}{ci}{lacking}\n",
            fault.number, fault.name, fault.what, fault.checks
        )
    });
    lines.collect()
}

/// Removes what runs left that were killed.
fn sweep(root: &Path) {
    namespace::sweep();
    pressure::sweep();
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let dead = name.parse::<u32>().is_ok() && !Path::new("/proc").join(&name).exists();
        if dead {
            volume::sweep(&entry.path());
        }
    }
}
