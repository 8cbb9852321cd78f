//! The project's tasks: `cargo xtask setup|build|demo|test|faults|bench|generate|ci`.
//! This file reads the command line; each task stands in its own module. What
//! they say goes to stderr: stdout belongs to the programs that they run.

mod apt;
mod bench;
mod build;
mod ci;
mod demo;
mod faults;
mod generate;
mod optional;
mod python;
mod setup;
mod shell;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::build::Profile;
use crate::workspace::Workspace;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The tasks of the Remuda project")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the build, the demo and the tests need, and nothing that is there already
    Setup {
        /// Only report; exit 1 when something is missing
        #[arg(long)]
        check: bool,
    },
    /// Build the static sidecar and the programs
    Build {
        #[arg(long)]
        release: bool,
    },
    /// Grade a known problem set in sandboxes
    Demo {
        /// Fewer samples: minutes become seconds
        #[arg(long)]
        quick: bool,
        /// Passed on to the demo
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Run all tests against real servers
    Test {
        /// Passed on to `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Hurt a real fleet under load, and check every promise
    Faults {
        /// Passed on to the harness; `--list` says what there is, `--help` the rest
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the benchmarks; one JSON line for each mode
    Bench {
        /// Passed on to `remuda bench`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Write the files that are generated from the code
    Generate {
        /// Write nothing; exit 1 when a file differs
        #[arg(long)]
        check: bool,
    },
    /// Check formatting and lints
    Lint,
    /// Build the API documentation, warnings denied
    Docs,
    /// Everything that must hold before a change lands
    Ci {
        /// Stages to leave out
        #[arg(long, value_enum)]
        skip: Vec<ci::Stage>,
    },
    /// Remove the build and what setup put into `.remuda`
    Clean,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { check: true } => setup::check(&workspace),
        Task::Setup { check: false } => setup::run(&workspace),
        Task::Build { release } => build::run(&workspace, Profile::from_release(release)),
        Task::Demo { quick, args } => demo::run(&workspace, quick, &args),
        Task::Test { args } => ci::test(&workspace, &args),
        Task::Faults { args } => faults::run(&workspace, &args),
        Task::Bench { args } => bench::run(&workspace, &args),
        Task::Generate { check } => generate::run(&workspace, check),
        Task::Lint => ci::lint(&workspace),
        Task::Docs => ci::docs(&workspace),
        Task::Ci { skip } => ci::run(&workspace, &skip),
        Task::Clean => build::clean(&workspace),
    }
}
