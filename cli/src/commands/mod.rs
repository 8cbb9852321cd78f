//! The commands, one file each.

mod batch;
mod bench;
mod cancel;
mod daemon;
mod dlq;
mod doctor;
mod pool;
mod ps;
mod results;
mod run;
mod session;
mod supervise;
mod task;
mod up;

use crate::failure::Failure;
use crate::globals::{Cli, Globals};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Up(up::Args),
    Run(run::Args),
    /// Runs tasks that a file describes
    #[command(subcommand)]
    Task(task::Command),
    Batch(batch::Args),
    Results(results::Args),
    Cancel(cancel::Args),
    /// Keeps a sandbox across commands
    #[command(subcommand, after_help = session::EXAMPLE)]
    Session(session::Command),
    /// Shows workers, pools and leases
    Ps(ps::Args),
    /// Shows pools
    #[command(subcommand)]
    Pool(pool::Command),
    /// Shows what nobody could act on, and sends it on its way again
    #[command(subcommand, after_help = dlq::EXAMPLES)]
    Dlq(dlq::Command),
    /// Checks this machine and the running fleet, and says how to mend them
    Doctor(doctor::Args),
    #[command(hide = true)]
    Dispatcher(daemon::Args),
    #[command(hide = true)]
    Worker(daemon::Args),
    Bench(bench::Args),
    #[command(hide = true)]
    Supervise(supervise::Args),
}

impl Command {
    /// Work that must come before any thread is started.
    pub(crate) fn before_threads(&self) -> Option<Failure> {
        match self {
            Self::Supervise(args) => match supervise::run(args) {
                Ok(never) => match never {},
                Err(failure) => Some(failure),
            },
            _ => None,
        }
    }
}

/// Runs a command; the status is what the process exits with.
pub(crate) async fn run(cli: Cli) -> Result<u8, Failure> {
    match cli.command {
        // The daemons have telemetry of their own.
        Command::Dispatcher(args) => Box::pin(daemon::dispatcher(args)).await,
        Command::Worker(args) => Box::pin(daemon::worker(args)).await,
        command => {
            let telemetry = crate::telemetry::start(&cli.globals)?;
            let result = front(command, &cli.globals).await;
            telemetry.shutdown().await;
            result
        }
    }
}

async fn front(command: Command, globals: &Globals) -> Result<u8, Failure> {
    match command {
        Command::Up(args) => up::run(args, globals).await,
        Command::Run(args) => Box::pin(run::run(args, globals)).await,
        Command::Task(command) => Box::pin(task::run(command, globals)).await,
        Command::Batch(args) => Box::pin(batch::run(args, globals)).await,
        Command::Results(args) => results::run(args, globals).await,
        Command::Cancel(args) => cancel::run(args, globals).await,
        Command::Session(command) => Box::pin(session::run(command, globals)).await,
        Command::Ps(args) => ps::run(&args, globals).await,
        Command::Pool(command) => pool::run(&command, globals).await,
        Command::Dlq(command) => Box::pin(dlq::run(command, globals)).await,
        Command::Doctor(args) => doctor::run(args, globals).await,
        Command::Bench(args) => Box::pin(bench::run(args, globals)).await,
        Command::Dispatcher(_) | Command::Worker(_) | Command::Supervise(_) => {
            unreachable!("handled before")
        }
    }
}
