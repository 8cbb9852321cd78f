//! Measures a sidecar binary over a socketpair: the time of one `/bin/true`
//! at a time, beside a bare spawn, and the throughput of stdout.
//!
//! `cargo run -p remuda-sidecar --example latency -- path/to/remuda-sidecar`

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measuring program"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{Sidecar, command};

const RUNS: usize = 2000;
const MEGABYTES: u64 = 256;

fn percentiles(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e3;
    println!(
        "{name}: p50 {:.3} ms, p90 {:.3} ms, p99 {:.3} ms",
        at(50),
        at(90),
        at(99)
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let binary = std::env::args().nth(1).expect("the sidecar binary's path");
    let sidecar = Sidecar::start_binary(&binary, &[], Stdio::null());
    let (mut bare, mut executed) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let started = Instant::now();
        std::process::Command::new("/bin/true").status().unwrap();
        bare.push(started.elapsed());
        let started = Instant::now();
        let outcome = sidecar.execute(command(&["/bin/true"])).await;
        executed.push(started.elapsed());
        assert_eq!(outcome.exited.code, 0);
    }
    percentiles("bare spawn", bare);
    percentiles("execute", executed);

    let mut client = sidecar.client.clone();
    let mut health = Vec::new();
    for _ in 0..RUNS {
        let started = Instant::now();
        client
            .health(remuda_proto::v1::HealthRequest {})
            .await
            .unwrap();
        health.push(started.elapsed());
    }
    percentiles("health", health);

    let mut request = command(&["head", "-c", &(MEGABYTES << 20).to_string(), "/dev/zero"]);
    request.output_limit = u64::MAX;
    let started = Instant::now();
    let outcome = sidecar.execute(request).await;
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(outcome.stdout.len() as u64, MEGABYTES << 20);
    println!("stdout: {:.0} MB/s", MEGABYTES as f64 / seconds);
}
