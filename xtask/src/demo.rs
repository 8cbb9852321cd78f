//! `demo` and `bench`: set up, build for release, run.

use anyhow::ensure;

use crate::build::{self, Profile};
use crate::shell::{self, in_workspace, is_executable};
use crate::workspace::Workspace;
use crate::{python, setup};

/// Grades the HumanEval problems in sandboxes; see `tests/src/bin/demo.rs`.
pub(crate) fn run(workspace: &Workspace, quick: bool, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    let problems = python::fetch_problems(workspace)?;
    build::run(workspace, Profile::Release)?;
    let mut command = release_program(workspace, "demo")?;
    command.arg("--problems").arg(problems);
    if quick {
        command.arg("--quick");
    }
    shell::run(command.args(args))
}

/// Benchmarks print one JSON line for each mode, and nothing else on stdout.
pub(crate) fn bench(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    build::run(workspace, Profile::Release)?;
    shell::run(
        release_program(workspace, "remuda")?
            .arg("bench")
            .args(args),
    )
}

fn release_program(workspace: &Workspace, name: &str) -> anyhow::Result<std::process::Command> {
    let program = workspace.target().join("release").join(name);
    ensure!(
        is_executable(&program),
        "the build left no program {}",
        program.display()
    );
    in_workspace(workspace, program)
}
