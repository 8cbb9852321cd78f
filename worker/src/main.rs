//! The worker daemon. This file only wires.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use remuda_telemetry::{Chain, Readiness, task};
use remuda_worker::backend::local;
use remuda_worker::{READINESS, Worker, WorkerError, WorkerOptions, signals};
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
#[command(name = "remuda-worker", version, about)]
struct Args {
    /// A configuration file (TOML or YAML). `REMUDA_WORKER__SLOTS=8` and the like win over it.
    #[arg(long, env = "REMUDA_WORKER_CONFIG")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    // Before any thread exists: the forker must stay a process with one.
    if local::is_forker_invocation() {
        return local::forker_main();
    }
    let args = Args::parse();
    let started = WorkerOptions::load(args.config.as_deref())
        .map_err(anyhow::Error::from)
        .and_then(|options| Ok((options, tokio::runtime::Runtime::new()?)));
    let outcome = started.and_then(|(options, runtime)| {
        let outcome = runtime.block_on(serve(options));
        // A call that blocks for good must not keep the process.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let known = error.downcast_ref::<WorkerError>();
            let code = known.map(|error| format!(" [{}]", error.code()));
            let status = known.map_or(1, WorkerError::exit_status);
            #[expect(clippy::print_stderr, reason = "there may be no log to write to")]
            {
                eprintln!(
                    "remuda-worker: {}{}",
                    Chain(error.as_ref()),
                    code.unwrap_or_default()
                );
            }
            ExitCode::from(status)
        }
    }
}

async fn serve(options: WorkerOptions) -> anyhow::Result<()> {
    let mut telemetry = remuda_telemetry::init("remuda-worker", &options.telemetry)?;
    let readiness = Readiness::new(&READINESS);
    telemetry.serve(&readiness)?;
    let shutdown = CancellationToken::new();
    task::spawn("signals", signals::watch(shutdown.clone())?);
    let outcome = match shutdown.run_until_cancelled(Worker::build(options)).await {
        Some(Ok(worker)) => {
            worker.run(readiness, shutdown).await;
            Ok(())
        }
        Some(Err(error)) => Err(error.into()),
        None => Ok(()),
    };
    telemetry.shutdown().await;
    outcome
}
