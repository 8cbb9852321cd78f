//! `remuda dispatcher` and `remuda worker`: the daemons inside this program,
//! as `remuda up` starts them.

use std::path::PathBuf;

use remuda_dispatcher::DispatcherOptions;
use remuda_telemetry::{Readiness, Telemetry, TelemetryOptions};
use remuda_worker::{READINESS, Worker, WorkerOptions};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, exit};
use crate::out;
use crate::task_file;
use crate::up::Stop;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    fn options<T: DeserializeOwned + Default>(&self) -> Result<T, Failure> {
        let file = self.config.display().to_string();
        let text = std::fs::read_to_string(&self.config)
            .map_err(|error| Failure::because(format_args!("{file} cannot be read"), &error))?;
        task_file::single(&file, &text).map_err(|error| Failure::chain(&error))
    }
}

pub(crate) async fn dispatcher(args: Args) -> Result<u8, Failure> {
    let options: DispatcherOptions = args.options()?;
    let readiness = remuda_dispatcher::readiness();
    let telemetry = telemetry("remuda-dispatcher", &options.telemetry, &readiness)?;
    let shutdown = shutdown()?;
    let ended = remuda_dispatcher::run_with(options, shutdown, readiness).await;
    telemetry.shutdown().await;
    ended.map_err(|error| Failure::chain(&error).code(error.code()))?;
    Ok(0)
}

pub(crate) async fn worker(args: Args) -> Result<u8, Failure> {
    let options: WorkerOptions = args.options()?;
    let readiness = Readiness::new(&READINESS);
    let telemetry = telemetry("remuda-worker", &options.telemetry, &readiness)?;
    let shutdown = shutdown()?;
    let built = shutdown.run_until_cancelled(Box::pin(Worker::build(options)));
    let ended = match built.await {
        Some(Ok(worker)) => {
            worker.run(readiness, shutdown).await;
            Ok(0)
        }
        Some(Err(error)) => Err(Failure::chain(&error)
            .code(error.code())
            .exit(error.exit_status())),
        None => Ok(0),
    };
    telemetry.shutdown().await;
    ended
}

fn telemetry(
    name: &str,
    options: &TelemetryOptions,
    readiness: &Readiness,
) -> Result<Telemetry, Failure> {
    let mut telemetry =
        remuda_telemetry::init(name, options).map_err(|error| Failure::chain(&error))?;
    telemetry
        .serve(readiness)
        .map_err(|error| Failure::chain(&error))?;
    Ok(telemetry)
}

/// Signals this close to the first are no second one.
const SAME_SIGNAL: std::time::Duration = std::time::Duration::from_millis(500);

/// Cancelled by the first signal; the second ends the process.
fn shutdown() -> Result<CancellationToken, Failure> {
    let token = CancellationToken::new();
    let mut stop = Stop::listen()?;
    let told = token.clone();
    let _watch = remuda_telemetry::task::spawn("signals", async move {
        stop.told().await;
        told.cancel();
        // When a parent with several threads is killed, the kernel signals its children once
        // for each thread: that is one signal still.
        let together = tokio::time::Instant::now() + SAME_SIGNAL;
        loop {
            stop.told().await;
            if tokio::time::Instant::now() >= together {
                break;
            }
        }
        out::note("told again: ending at once");
        std::process::exit(exit::INTERRUPTED.into());
    });
    Ok(token)
}
