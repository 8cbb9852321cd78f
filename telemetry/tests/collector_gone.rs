//! A collector that takes the connection and never answers must not keep the process.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use remuda_telemetry::{Chain, TelemetryError, TelemetryOptions};

#[tokio::test]
async fn shutdown_is_bounded_when_the_collector_never_answers() {
    // Bad options are refused with their name, and leave the process free to try again.
    for (options, part) in [
        (
            TelemetryOptions {
                log_filter: "info=what".to_owned(),
                ..Default::default()
            },
            "log_filter",
        ),
        (
            TelemetryOptions {
                otlp_endpoint: Some(String::new()),
                ..Default::default()
            },
            "empty",
        ),
        (
            TelemetryOptions {
                otlp_endpoint: Some("not a url".to_owned()),
                ..Default::default()
            },
            "\"not a url\"",
        ),
        (
            TelemetryOptions {
                otlp_endpoint: Some("https://127.0.0.1:1".to_owned()),
                ..Default::default()
            },
            "HTTPS",
        ),
    ] {
        let error = remuda_telemetry::init("remuda-test", &options).unwrap_err();
        let text = Chain(&error).to_string();
        assert!(text.contains(part), "{part} is not in {text}");
    }

    // Never accepted: the kernel completes the connection, nobody ever speaks.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let options = TelemetryOptions {
        otlp_endpoint: Some(endpoint),
        ..Default::default()
    };
    let telemetry = remuda_telemetry::init("remuda-test", &options).unwrap();
    let again = remuda_telemetry::init("remuda-test", &options).unwrap_err();
    assert!(
        matches!(again, TelemetryError::AlreadyStarted { .. }),
        "{again:?}"
    );

    tracing::info_span!("lost").in_scope(|| tracing::info!("in a span that goes nowhere"));
    remuda_telemetry::metrics::counter("remuda.test.lost", "Lost.").add(1, ());
    let began = Instant::now();
    telemetry.shutdown().await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "shutdown took {took:?}");
}
