//! The fault harness as a program: `cargo xtask faults` builds and starts it.

use std::process::ExitCode;

use clap::Parser as _;
use remuda_tests::faults::{self, Options};

// More than cores: judging takes its time, and must not keep clients waiting.
#[tokio::main(worker_threads = 8)]
async fn main() -> anyhow::Result<ExitCode> {
    let kept = Box::pin(faults::main(Options::parse())).await?;
    Ok(if kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
