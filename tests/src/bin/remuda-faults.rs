//! The fault harness as a program: `cargo xtask faults` builds and starts it.

use std::process::ExitCode;

use clap::Parser as _;
use remuda_tests::faults::{self, Options};

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let kept = Box::pin(faults::main(Options::parse())).await?;
    Ok(if kept {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
