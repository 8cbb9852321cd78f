//! `bench`: set up, build for release, measure.

use crate::build::{self, Profile};
use crate::workspace::Workspace;
use crate::{setup, shell};

/// Benchmarks print one JSON line for each mode, and nothing else on stdout.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    build::whole(workspace)?;
    shell::run(
        build::program(workspace, Profile::Release, "remuda")?
            .arg("bench")
            .args(args),
    )
}
