//! The `remuda` command.

mod batch;
mod commands;
mod connect;
mod ending;
mod failure;
mod fleet;
mod globals;
mod live;
mod out;
mod programs;
mod quantile;
mod table;
mod task_file;
mod telemetry;
mod up;

use std::process::ExitCode;

use clap::Parser as _;

use crate::failure::Failure;
use crate::globals::Cli;

fn main() -> ExitCode {
    // This program is the worker's forker as well, which must not be more than
    // one thread.
    if remuda_worker::backend::local::is_forker_invocation() {
        return remuda_worker::backend::local::forker_main();
    }
    let cli = Cli::parse();
    match cli.command.before_threads().map_or_else(|| run(cli), Err) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            if !failure.is_quiet() {
                out::note(&failure);
            }
            ExitCode::from(failure.status())
        }
    }
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("the runtime cannot be started", &error))?;
    let ended = runtime.block_on(commands::run(cli));
    // A call that blocks for good must not keep the process.
    runtime.shutdown_background();
    ended
}
