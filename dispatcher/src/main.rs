//! The dispatcher's process: configuration, telemetry, signals.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use remuda_dispatcher::{DispatcherOptions, readiness, run_with};
use remuda_telemetry::Chain;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Places tasks on warm sandboxes.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// TOML or YAML. `REMUDA_NATS__URL` and the like win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let options = DispatcherOptions::load(Args::parse().config.as_deref())
        .context("the configuration cannot be used")?;
    let mut telemetry = remuda_telemetry::init("remuda-dispatcher", &options.telemetry)?;
    let readiness = readiness();
    telemetry.serve(&readiness)?;
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let stop = shutdown.clone();
    remuda_telemetry::task::spawn("signals", async move {
        for round in 0.. {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            if round > 0 {
                tracing::warn!("second signal: exiting at once");
                std::process::exit(130);
            }
            stop.cancel();
        }
    });
    let ended = run_with(options, shutdown, readiness).await;
    if let Err(error) = &ended {
        tracing::error!(code = %error.code(), "the dispatcher cannot run: {}", Chain(error));
    }
    telemetry.shutdown().await;
    Ok(if ended.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
