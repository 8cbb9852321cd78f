//! A collector on loopback receives one whole trace and a counter.

#![expect(clippy::unwrap_used, reason = "what tests share fails as they do")]

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

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
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::metrics::v1::{metric, number_data_point};
use opentelemetry_proto::tonic::trace::v1::Span;
use remuda_telemetry::{RemoteSpan, TaskGroup, TelemetryOptions, TraceHeaders, propagate};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

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

impl Collector {
    fn spans(&self) -> HashMap<String, Span> {
        let traces = self.traces.lock().unwrap();
        let spans = traces
            .iter()
            .flat_map(|request| &request.resource_spans)
            .flat_map(|resource| &resource.scope_spans)
            .flat_map(|scope| &scope.spans);
        spans
            .map(|span| (span.name.clone(), span.clone()))
            .collect()
    }

    fn service_names(&self) -> Vec<Value> {
        let traces = self.traces.lock().unwrap();
        traces
            .iter()
            .flat_map(|request| &request.resource_spans)
            .flat_map(|resource| &resource.resource.as_ref().unwrap().attributes)
            .filter(|attribute| attribute.key == "service.name")
            .map(|attribute| attribute.value.clone().unwrap().value.unwrap())
            .collect()
    }

    fn sum(&self, name: &str) -> Option<i64> {
        let metrics = self.metrics.lock().unwrap();
        let metric = metrics
            .iter()
            .flat_map(|request| &request.resource_metrics)
            .flat_map(|resource| &resource.scope_metrics)
            .flat_map(|scope| &scope.metrics)
            .rfind(|metric| metric.name == name)?;
        let Some(metric::Data::Sum(sum)) = &metric.data else {
            return None;
        };
        match sum.data_points.first()?.value? {
            number_data_point::Value::AsInt(value) => Some(value),
            number_data_point::Value::AsDouble(_) => None,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
}

#[tokio::test]
async fn a_collector_receives_the_span_tree_and_the_counter() {
    let collector = Collector::default();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}", incoming.local_addr().unwrap());
    let tasks = TaskGroup::new();
    tasks.spawn(
        "collector",
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .add_service(MetricsServiceServer::new(collector.clone()))
            .serve_with_incoming_shutdown(incoming, tasks.token().clone().cancelled_owned()),
    );

    let options = TelemetryOptions {
        otlp_endpoint: Some(endpoint),
        // Traces do not depend on how much is logged.
        log_filter: "error".to_owned(),
        ..TelemetryOptions::default()
    };
    let telemetry = remuda_telemetry::init("remuda-worker", &options).unwrap();
    remuda_telemetry::metrics::counter("remuda.test.tasks", "Tasks.").add(3, ());

    let from_client = TraceHeaders::incoming(
        Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        None,
    );
    let task = tracing::info_span!("task", run = "r1");
    propagate::set_parent(&task, &from_client);
    let began = SystemTime::now() - Duration::from_secs(5);
    let ended = began + Duration::from_millis(3);
    let group = tasks.clone();
    async move {
        let step = tracing::info_span!("step");
        let work = async move {
            let sent = TraceHeaders::current();
            let attributes = [("argv0", Cow::Borrowed("/bin/true"))];
            let exec = RemoteSpan {
                name: "exec",
                start: began,
                end: ended,
                attributes: &attributes,
                error: None,
            };
            propagate::record_remote_span(&sent, &exec);
            // A clock that runs backwards, and a failure.
            let reset = RemoteSpan {
                name: "reset",
                start: ended,
                end: began,
                attributes: &[],
                error: Some("busy mount"),
            };
            propagate::record_remote_span(&sent, &reset);
        };
        // A started task keeps its place in the trace.
        group.spawn("step", work.instrument(step)).await.unwrap();
    }
    .instrument(task)
    .await;
    telemetry.shutdown().await;

    let spans = collector.spans();
    let mut names: Vec<&str> = spans.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["exec", "reset", "step", "task"],
        "no export is itself traced"
    );
    for span in spans.values() {
        assert_eq!(
            hex(&span.trace_id),
            "0af7651916cd43dd8448eb211c80319c",
            "{}",
            span.name
        );
    }
    assert_eq!(hex(&spans["task"].parent_span_id), "b7ad6b7169203331");
    assert_eq!(spans["step"].parent_span_id, spans["task"].span_id);
    assert_eq!(spans["exec"].parent_span_id, spans["step"].span_id);
    assert_eq!(spans["exec"].start_time_unix_nano, nanos(began));
    assert_eq!(spans["exec"].end_time_unix_nano, nanos(ended));
    assert_eq!(spans["exec"].attributes[0].key, "argv0");
    assert_eq!(spans["reset"].parent_span_id, spans["step"].span_id);
    assert_eq!(
        spans["reset"].end_time_unix_nano,
        spans["reset"].start_time_unix_nano
    );
    assert_eq!(
        spans["reset"].status.as_ref().unwrap().message,
        "busy mount"
    );
    assert!(
        spans["task"]
            .attributes
            .iter()
            .any(|attribute| attribute.key == "run")
    );
    let worker = Value::StringValue("remuda-worker".to_owned());
    assert!(collector.service_names().iter().all(|name| *name == worker));
    assert_eq!(collector.sum("remuda.test.tasks"), Some(3));
    assert!(tasks.close_and_wait(Duration::from_secs(10)).await);
}
