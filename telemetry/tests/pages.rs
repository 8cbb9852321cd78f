//! The three pages of a daemon that exports nothing, read over a plain connection.

#![expect(clippy::unwrap_used, reason = "what tests share fails as they do")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use remuda_telemetry::metrics::{self, Label};
use remuda_telemetry::{Readiness, TelemetryOptions, TraceHeaders};

#[derive(Clone, Copy)]
enum Outcome {
    Succeeded,
    Failed,
}

impl Label for Outcome {
    const KEY: &'static str = "outcome";

    fn value(&self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Copy)]
enum Phase {
    Run,
}

impl Label for Phase {
    const KEY: &'static str = "phase";

    fn value(&self) -> &'static str {
        match self {
            Self::Run => "run",
        }
    }
}

fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

// A current-thread runtime that this test never lets run while it reads: the pages must not
// need it.
#[tokio::test]
async fn pages_answer_while_the_callers_runtime_is_busy() {
    let options = TelemetryOptions {
        http_listen: Some("127.0.0.1:0".parse().unwrap()),
        ..TelemetryOptions::default()
    };
    let mut telemetry = remuda_telemetry::init("remuda-test", &options).unwrap();
    let readiness = Readiness::new(&["nats", "redis"]);
    let address = telemetry.serve(&readiness).unwrap().unwrap();
    assert_ne!(address.port(), 0);

    assert_eq!(
        get(address, "/healthz"),
        ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned())
    );
    let (status, body) = get(address, "/readyz");
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, "not ready: nats, redis\n");
    readiness.set("nats", true);
    assert_eq!(get(address, "/readyz").1, "not ready: redis\n");
    readiness.set("redis", true);
    assert_eq!(
        get(address, "/readyz"),
        ("HTTP/1.1 200 OK".to_owned(), "ready\n".to_owned())
    );
    assert_eq!(get(address, "/nothing").0, "HTTP/1.1 404 Not Found");

    let tasks = metrics::counter("remuda.test.tasks", "Tasks that ended.");
    tasks.add(2, Outcome::Succeeded);
    tasks.add(1, Outcome::Failed);
    metrics::gauge("remuda.test.warm", "Warm sandboxes.").set(3, ());
    let busy = metrics::up_down_counter("remuda.test.busy", "Busy slots.");
    busy.add(5, ());
    busy.add(-1, ());
    metrics::histogram("remuda.test.step.duration", "How long steps took.")
        .record(Duration::from_micros(200), (Phase::Run, Outcome::Succeeded));
    let (status, body) = get(address, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    for line in [
        "remuda_test_tasks_total{outcome=\"succeeded\"} 2\n",
        "remuda_test_tasks_total{outcome=\"failed\"} 1\n",
        "remuda_test_warm 3\n",
        "remuda_test_busy 4\n",
        "remuda_test_step_duration_seconds_bucket{outcome=\"succeeded\",phase=\"run\",le=\"0.0001\"} 0\n",
        "remuda_test_step_duration_seconds_bucket{outcome=\"succeeded\",phase=\"run\",le=\"0.00025\"} 1\n",
        "remuda_test_step_duration_seconds_bucket{outcome=\"succeeded\",phase=\"run\",le=\"600\"} 1\n",
        "remuda_test_step_duration_seconds_count{outcome=\"succeeded\",phase=\"run\"} 1\n",
        "service_name=\"remuda-test\"",
    ] {
        assert!(body.contains(line), "{line} is not in\n{body}");
    }

    // Nothing is exported, yet what came in is handed on.
    let incoming = TraceHeaders::incoming(
        Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        None,
    );
    let span = tracing::info_span!("task");
    remuda_telemetry::propagate::set_parent(&span, &incoming);
    let _entered = span.entered();
    assert!(TraceHeaders::current().is_empty());
    assert_eq!(TraceHeaders::current_or(&incoming), incoming);
    assert!(!incoming.is_empty());

    telemetry.shutdown().await;
    assert!(
        TcpStream::connect(address).is_err(),
        "the pages end with the guard"
    );
}
