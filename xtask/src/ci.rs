//! `ci`, `lint`, `docs` and `test`: what must hold before a change lands.

use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;

use crate::build::{self, Profile};
use crate::shell::{self, cargo, seconds, which};
use crate::workspace::Workspace;
use crate::{demo, faults, generate, setup};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stage {
    Setup,
    Fmt,
    Generate,
    Clippy,
    Docs,
    Deny,
    Demo,
    Faults,
    Test,
}

impl Stage {
    /// Cheap ones first; tests last, so that their closing lines end the log.
    const ALL: [Self; 9] = [
        Self::Setup,
        Self::Fmt,
        Self::Generate,
        Self::Clippy,
        Self::Docs,
        Self::Deny,
        Self::Demo,
        Self::Faults,
        Self::Test,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Fmt => "formatting",
            Self::Generate => "generated files",
            Self::Clippy => "clippy",
            Self::Docs => "documentation",
            Self::Deny => "licences, bans, advisories",
            Self::Demo => "bounded demo",
            Self::Faults => "bounded faults",
            Self::Test => "tests",
        }
    }

    fn run(self, workspace: &Workspace) -> anyhow::Result<()> {
        match self {
            Self::Setup => setup::run(workspace),
            Self::Fmt => fmt(workspace),
            Self::Generate => generate::run(workspace, true),
            Self::Clippy => clippy(workspace),
            Self::Docs => docs(workspace),
            Self::Deny => deny(workspace),
            Self::Demo => demo::run(workspace, true, &[]),
            Self::Faults => faults::run(workspace, &["--ci".to_owned()]),
            Self::Test => test(workspace, &[]),
        }
    }
}

/// Runs every stage that is not skipped; stops at the first that fails.
pub(crate) fn run(workspace: &Workspace, skip: &[Stage]) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut took = Vec::new();
    for stage in Stage::ALL {
        if skip.contains(&stage) {
            continue;
        }
        eprintln!("\n=== {}", stage.name());
        let stage_started = Instant::now();
        let outcome = stage.run(workspace);
        let elapsed = stage_started.elapsed();
        let word = if outcome.is_ok() { "passed" } else { "FAILED" };
        eprintln!("=== {} {word} in {}", stage.name(), seconds(elapsed));
        took.push(format!("{} {}", stage.name(), seconds(elapsed)));
        outcome.map_err(|error| error.context(format!("stage `{}`", stage.name())))?;
    }
    eprintln!(
        "\n=== all passed in {}: {}",
        seconds(started.elapsed()),
        took.join(", ")
    );
    Ok(())
}

pub(crate) fn lint(workspace: &Workspace) -> anyhow::Result<()> {
    fmt(workspace)?;
    clippy(workspace)
}

fn fmt(workspace: &Workspace) -> anyhow::Result<()> {
    shell::run(cargo(workspace)?.args(["fmt", "--all", "--check"]))
}

fn clippy(workspace: &Workspace) -> anyhow::Result<()> {
    shell::run(
        cargo(workspace)?
            .args(["clippy", "--workspace", "--all-targets", "--locked"])
            .args(["--features", &build::TEST_FEATURES.join(",")])
            .args(["--features", "remuda-sidecar/failpoints"])
            .args(["--", "--deny", "warnings"]),
    )
}

pub(crate) fn docs(workspace: &Workspace) -> anyhow::Result<()> {
    shell::run(
        cargo(workspace)?
            .env("RUSTDOCFLAGS", "--deny warnings")
            .args(["doc", "--workspace", "--no-deps", "--locked"]),
    )
}

/// Only where cargo-deny is installed: building it takes longer than the rest.
fn deny(workspace: &Workspace) -> anyhow::Result<()> {
    let path = workspace.path_variable()?;
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    if which("cargo-deny", &folders).is_none() {
        eprintln!("skipped: no cargo-deny here; `cargo install --locked cargo-deny` gets it");
        return Ok(());
    }
    shell::run(cargo(workspace)?.args(["deny", "--locked", "check"]))
}

/// Builds every target of the workspace in one go, which gives the daemons and
/// their tests the same features; returns where the static sidecar is.
pub(crate) fn build_everything(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let sidecar = build::static_sidecar(workspace)?;
    build::faulty_sidecar(workspace)?;
    let features = build::TEST_FEATURES.join(",");
    shell::run(
        cargo(workspace)?
            .args(["build", "--workspace", "--all-targets", "--locked"])
            .args(["--features", &features]),
    )?;
    build::place_sidecar(workspace, &sidecar, Profile::Dev)?;
    Ok(sidecar)
}

/// Builds everything, then runs the tests.
pub(crate) fn test(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    let sidecar = build_everything(workspace)?;
    let outcome = shell::run(
        cargo(workspace)?
            .env("REMUDA_SIDECAR", &sidecar)
            .args(["test", "--workspace", "--locked", "--no-fail-fast"])
            .args(["--features", &build::TEST_FEATURES.join(",")])
            .args(args),
    );
    // The tests of the sidecar's package leave their own, dynamic build there.
    build::place_sidecar(workspace, &sidecar, Profile::Dev)?;
    outcome
}
