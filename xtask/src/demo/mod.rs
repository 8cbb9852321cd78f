//! `demo`: the main job. Starts a fleet, grades the HumanEval problems, every
//! sample in a sandbox of its own, and checks every count.
#![expect(
    clippy::print_stdout,
    reason = "what the demo prints is what it is for"
)]

mod fleet;
mod tasks;
mod verdict;

use std::fs;
use std::process::Command;

use anyhow::{Context, bail};

use crate::build::{self, Profile};
use crate::shell;
use crate::workspace::Workspace;
use crate::{python, setup};

use fleet::Fleet;
use verdict::Verdict;

/// Samples of each problem, half of them right and half of them wrong.
const SAMPLES: usize = 8;
const QUICK_SAMPLES: usize = 2;
/// How many problems the quick demo grades.
const QUICK_PROBLEMS: usize = 40;

/// Grades the problems; fails when any count is not what it must be.
pub(crate) fn run(workspace: &Workspace, quick: bool, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    let problems = python::fetch_problems(workspace)?;
    build::whole(workspace)?;

    let folder = workspace.private().join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let (limit, samples) = if quick {
        (QUICK_PROBLEMS, QUICK_SAMPLES)
    } else {
        (usize::MAX, SAMPLES)
    };
    let batch = tasks::read(&problems, limit, samples)?;
    let (input, output) = (folder.join("tasks.jsonl"), folder.join("results.jsonl"));
    fs::write(&input, batch.lines())
        .with_context(|| format!("cannot write {}", input.display()))?;

    let fleet = Fleet::start(workspace, &folder)?;
    let graded = shell::run(
        remuda(workspace)?
            .args(["batch", "--run", &run_name(), "--nats", fleet.nats()])
            .arg("--out")
            .arg(&output)
            .args(args)
            .arg(&input),
    );
    let stopped = fleet.stop();
    graded?;
    stopped?;

    let results =
        fs::read_to_string(&output).with_context(|| format!("cannot read {}", output.display()))?;
    let verdict = Verdict::read(&results)?;
    println!("{}", verdict.line());
    let problems = verdict.problems(&batch);
    if !problems.is_empty() {
        bail!("the demo's counts are wrong:\n  {}", problems.join("\n  "));
    }
    Ok(())
}

fn remuda(workspace: &Workspace) -> anyhow::Result<Command> {
    build::program(workspace, Profile::Release, "remuda")
}

/// A name that no earlier demo on the same data folder has used.
fn run_name() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    format!("demo-{seconds}")
}
