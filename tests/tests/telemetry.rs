//! One task is one trace, from whoever asked to the command in the sandbox; and
//! each daemon tells how it does.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use remuda_telemetry::task;
use remuda_tests::fleet::{Fleet, default_config};
use remuda_tests::wait::eventually;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps everything that it is sent.
#[derive(Clone, Default)]
struct Collector {
    traces: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    metrics: Arc<Mutex<Vec<ExportMetricsServiceRequest>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.traces.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.metrics.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A span and the service that it is of.
#[derive(Debug, Clone)]
struct Seen {
    service: String,
    span: Span,
}

impl Seen {
    fn attribute(&self, key: &str) -> Option<String> {
        let attributes = self.span.attributes.iter();
        let found = attributes.clone().find(|attribute| attribute.key == key)?;
        match found.value.as_ref()?.value.as_ref()? {
            Any::StringValue(text) => Some(text.clone()),
            other => Some(format!("{other:?}")),
        }
    }
}

impl Collector {
    fn start() -> (Self, String) {
        let collector = Self::default();
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let endpoint = format!("http://{}", incoming.local_addr().unwrap());
        let _serving = task::spawn(
            "collector",
            tonic::transport::Server::builder()
                .add_service(TraceServiceServer::new(collector.clone()))
                .add_service(MetricsServiceServer::new(collector.clone()))
                .serve_with_incoming(incoming),
        );
        (collector, endpoint)
    }

    /// The spans of the traces that a task's id is in.
    fn traces_of(&self, task: &str) -> BTreeMap<Vec<u8>, Vec<Seen>> {
        let mut traces: BTreeMap<Vec<u8>, Vec<Seen>> = BTreeMap::new();
        for resource in self
            .traces
            .lock()
            .unwrap()
            .iter()
            .flat_map(|request| &request.resource_spans)
        {
            let attributes = &resource.resource.as_ref().unwrap().attributes;
            let service = attributes
                .iter()
                .find(|attribute| attribute.key == "service.name");
            let Some(Any::StringValue(service)) =
                service.and_then(|attribute| attribute.value.clone()?.value)
            else {
                panic!("spans of no service");
            };
            for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
                let service = service.clone();
                let span = span.clone();
                let trace = traces.entry(span.trace_id.clone()).or_default();
                trace.push(Seen { service, span });
            }
        }
        traces.retain(|_, spans| {
            spans
                .iter()
                .any(|span| span.attribute("task").as_deref() == Some(task))
        });
        traces
    }

    fn metric_names(&self) -> BTreeSet<String> {
        let metrics = self.metrics.lock().unwrap();
        metrics
            .iter()
            .flat_map(|request| &request.resource_metrics)
            .flat_map(|resource| &resource.scope_metrics)
            .flat_map(|scope| &scope.metrics)
            .map(|metric| metric.name.clone())
            .collect()
    }
}

#[tokio::test]
async fn one_task_is_one_trace_from_the_client_to_the_command() {
    let (collector, endpoint) = Collector::start();
    let mut config = default_config();
    let telemetry = json!({"otlp_endpoint": endpoint});
    config["dispatcher"]["telemetry"] = telemetry.clone();
    config["worker"]["telemetry"] = telemetry;
    let fleet = Fleet::start_with(config).await.unwrap();
    let args = ["--otlp", &endpoint, "run", "--run", "traced", "--"];
    let command = ["sh", "-c", "echo traced; exit 5"];
    let finished = fleet.remuda(args.iter().chain(&command)).await.unwrap();
    assert_eq!((finished.code(), &*finished.text()), (5, "traced\n"));
    let results = fleet.remuda(["results", "traced"]).await.unwrap();
    let terminal: serde_json::Value = serde_json::from_slice(&results.stdout).unwrap();
    let task = terminal["task"].as_str().unwrap();
    // Ending, each part sends what it has.
    assert!(fleet.stop().await.unwrap().success());

    let traces = collector.traces_of(task);
    assert_eq!(
        traces.len(),
        1,
        "{:?}",
        traces.values().map(Vec::len).collect::<Vec<_>>()
    );
    let spans = traces.into_values().next().unwrap();
    let names: Vec<&str> = spans.iter().map(|seen| &*seen.span.name).collect();
    let one = |name: &str| -> &Seen {
        let named: Vec<&Seen> = spans.iter().filter(|seen| seen.span.name == name).collect();
        assert_eq!(named.len(), 1, "{name} in {names:?}");
        named[0]
    };
    // Who, and beneath whom.
    let tree = [
        ("submit", "remuda", "stream"),
        ("dispatch", "remuda-dispatcher", "submit"),
        ("execute", "remuda-worker", "dispatch"),
        // The sidecar has no network: its worker sends its spans.
        ("run command", "remuda-worker", "execute"),
        ("terminal", "remuda", "submit"),
    ];
    for (name, service, parent) in tree {
        let (seen, above) = (one(name), one(parent));
        assert_eq!(seen.service, service, "{name}");
        assert_eq!(seen.span.parent_span_id, above.span.span_id, "{name}");
        assert!(
            seen.span.start_time_unix_nano >= above.span.start_time_unix_nano,
            "{name} began before {parent}"
        );
    }
    let roots: Vec<&Seen> = spans
        .iter()
        .filter(|seen| seen.span.parent_span_id.is_empty())
        .collect();
    assert_eq!(roots.len(), 1, "{roots:#?}");
    assert_eq!(roots[0].service, "remuda");
    // Every span is beneath the root: none has a parent that nobody sent.
    let ids: BTreeSet<&[u8]> = spans.iter().map(|seen| &seen.span.span_id[..]).collect();
    for seen in &spans {
        let parent = &seen.span.parent_span_id[..];
        assert!(parent.is_empty() || ids.contains(parent), "{seen:#?}");
    }
    let execute = one("execute");
    assert_eq!(execute.attribute("task").as_deref(), Some(task));
    for (key, expected) in [
        ("run", terminal["run"].as_str()),
        ("tenant", terminal["tenant"].as_str()),
        ("sandbox", terminal["sandbox"]["sandbox"].as_str()),
        ("worker", terminal["sandbox"]["worker"].as_str()),
    ] {
        assert_eq!(execute.attribute(key).as_deref(), expected, "{key}");
    }
    assert_eq!(
        one("run command").attribute("exit_code").as_deref(),
        Some("5")
    );

    let metrics = collector.metric_names();
    for part in ["dispatcher", "worker"] {
        let begins = format!("remuda.{part}.");
        assert!(
            metrics.iter().any(|name| name.starts_with(&begins)),
            "{part}: {metrics:?}"
        );
    }
}

/// A page of a daemon: status and body.
async fn get(url: &str) -> anyhow::Result<(u16, String)> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| anyhow::anyhow!("{url} is no address"))?;
    let mut socket = tokio::net::TcpStream::connect(host).await?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    let status = answer.split(' ').nth(1).unwrap_or_default().parse()?;
    let body = answer.split_once("\r\n\r\n").unwrap_or_default().1;
    Ok((status, body.to_owned()))
}

fn has_uuid(text: &str) -> bool {
    let is_uuid = |word: &[u8]| {
        word.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
    };
    text.as_bytes().windows(36).any(is_uuid)
}

#[tokio::test]
async fn each_daemon_has_its_pages_and_no_ids_in_them() {
    let fleet = Fleet::start().await.unwrap();
    for n in 0..3 {
        let run = format!("counted-{n}");
        let finished = fleet.remuda(["run", "--run", &run, "--", "true"]).await;
        assert_eq!(finished.unwrap().code(), 0);
    }
    assert!(has_uuid("x=\"01a2023b-6e3e-700a-9898-4b50ba588e76\""));
    for part in ["dispatcher", "worker"] {
        let url = fleet.record()["metrics"][part].as_str().unwrap();
        let base = url.strip_suffix("/metrics").unwrap();
        let healthz = get(&format!("{base}/healthz")).await.unwrap();
        assert_eq!(healthz, (200, "ok\n".to_owned()), "{part}");
        let readyz = get(&format!("{base}/readyz")).await.unwrap();
        assert_eq!(readyz, (200, "ready\n".to_owned()), "{part}");
        let (status, page) = get(url).await.unwrap();
        assert_eq!(status, 200, "{part}");
        let samples: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with(&format!("remuda_{part}_")))
            .collect();
        assert!(samples.len() >= 3, "{page}");
        for sample in page.lines().filter(|line| !line.starts_with('#')) {
            assert!(!has_uuid(sample), "{sample}");
            for name in ["counted-", "worker-"] {
                let labels = sample.split_once('{').unwrap_or_default().1;
                assert!(!labels.contains(name), "{sample}");
            }
        }
        // Three tasks were counted, under whatever label.
        let three = samples
            .iter()
            .any(|sample| !sample.contains("_bucket") && sample.ends_with(" 3"));
        assert!(three, "{page}");
    }
}

/// Alive is not ready.
#[tokio::test]
async fn a_daemon_without_its_server_is_healthy_and_not_ready() {
    let fleet = Fleet::start().await.unwrap();
    let redis = fleet.pid("redis").unwrap();
    kill(redis, Signal::SIGSTOP).unwrap();
    let url = fleet.record()["metrics"]["dispatcher"].as_str().unwrap();
    let base = url.strip_suffix("/metrics").unwrap();
    let page = async |path: &str| get(&format!("{base}/{path}")).await;
    eventually("unready dispatcher", PATIENCE, async || {
        match page("readyz").await {
            Ok((503, body)) if body == "not ready: redis\n" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    assert_eq!(page("healthz").await.unwrap().0, 200);
    kill(redis, Signal::SIGCONT).unwrap();
    eventually("ready dispatcher", PATIENCE, async || {
        match page("readyz").await {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    assert_eq!(fleet.run(["echo", "on"]).await.unwrap().text(), "on\n");
}
