//! The in-sandbox process: serves `remuda.sidecar.v1` on one inherited socket
//! and ends with it. This file only wires.

mod args;
mod command;
mod epoch;
mod error;
mod execute;
mod files;
mod harden;
mod history;
mod output;
mod path;
mod reaper;
mod seccomp;
mod serve;
mod service;
mod sweep;
#[expect(unsafe_code, reason = "system calls that have no safe wrapper")]
mod sys;
mod tree;
mod user;

use std::process::ExitCode;

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` breaks promises on purpose: debug builds alone have it");

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let settings = args::parse(std::env::args_os().skip(1))?;
    let mut inherited = harden::take_descriptors(&settings)?;
    history::begin(&settings.watch, inherited.history.take())?;
    harden::restrict(&settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(serve::serve(settings, inherited));
    // Dead or alive, the connection is gone: nothing may outlive it.
    tree::kill_below_self();
    Ok(outcome?)
}

/// The whole chain on one line of stderr, the only log there is in here.
fn report(error: &dyn std::error::Error) {
    let mut line = format!("remuda-sidecar: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    eprintln!("{line}");
}
