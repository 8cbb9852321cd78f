//! `faults`: hurts a real fleet under load, and checks that every promise is
//! kept. A thin front: the harness is a program of the tests' package.

use crate::build::{self, Profile};
use crate::workspace::Workspace;
use crate::{ci, optional, setup, shell};

/// The program of the harness.
const HARNESS: &str = "remuda-faults";

/// Sets up, builds, and runs the harness with these words.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    setup::run(workspace)?;
    // What only some faults need; they say that they are skipped without it.
    // The bounded selection needs none of it.
    if !args.iter().any(|arg| arg == "--ci" || arg == "--list") {
        optional::install(workspace);
    }
    ci::build_everything(workspace)?;
    shell::run(build::program(workspace, Profile::Dev, HARNESS)?.args(args))
}
