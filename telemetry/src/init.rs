//! Starts telemetry for one process, and ends it within a bound.

use std::io::{self, IsTerminal as _};
use std::net::SocketAddr;
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use prometheus::Registry;
use tokio::sync::oneshot;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::http::{HttpServer, Readiness};
use crate::log;
use crate::options::TelemetryOptions;
use crate::propagate;
use crate::runtime_thread::RuntimeThread;

/// How long the last spans and metrics may take to leave when the process ends.
const FLUSH_BOUND: Duration = Duration::from_secs(2);
/// How long one export may take while it runs.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
const METRICS_INTERVAL: Duration = Duration::from_secs(15);
const THREAD_END_BOUND: Duration = Duration::from_millis(500);

/// What carries an export must not be traced, or every export would cause another.
const UNTRACED: [&str; 7] = [
    "h2",
    "hyper",
    "hyper_util",
    "tonic",
    "tower",
    "opentelemetry",
    "opentelemetry_sdk",
];

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("telemetry.log_filter {filter:?} is not a log filter (try \"info\")")]
    LogFilter {
        filter: String,
        #[source]
        source: ParseError,
    },
    #[error("telemetry.otlp_endpoint {endpoint:?} cannot be used (try \"http://127.0.0.1:4317\")")]
    OtlpEndpoint {
        endpoint: String,
        #[source]
        source: ExporterBuildError,
    },
    #[error("the telemetry thread cannot be started")]
    StartThread {
        #[source]
        source: io::Error,
    },
    #[error("the metrics registry cannot be set up")]
    MetricsRegistry {
        #[source]
        source: OTelSdkError,
    },
    #[error("logging has already been set up in this process")]
    AlreadyStarted {
        #[source]
        source: TryInitError,
    },
    #[error("telemetry.http_listen {address} cannot be listened on")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[cfg(debug_assertions)]
    #[error("telemetry.history {} cannot be written", path.display())]
    History {
        path: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
    #[cfg(feature = "failpoints")]
    #[error("telemetry.failpoints: {problem}")]
    Failpoints { problem: String },
}

/// Keeps telemetry running; [`Telemetry::shutdown`] sends what is left.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    http_listen: Option<SocketAddr>,
    http: Option<HttpServer>,
    metrics: SdkMeterProvider,
    traces: Option<Traces>,
}

/// What exists only while spans are exported.
#[derive(Debug)]
struct Traces {
    provider: SdkTracerProvider,
    /// The exporters' connections live here, not on the caller's runtime: exports go on while
    /// that is busy, and the last flush cannot wait for a runtime that waits for it.
    thread: RuntimeThread,
}

/// Sets up logs, traces and metrics of the process under the name `service`. Once per process;
/// inside a runtime or outside.
pub fn init(service: &str, options: &TelemetryOptions) -> Result<Telemetry, TelemetryError> {
    let log = log::layer(options, io::stderr, io::stderr().is_terminal())?;
    prepare_for_tests(service, options)?;
    let resource = Resource::builder_empty()
        .with_service_name(service.to_owned())
        .with_attribute(opentelemetry::KeyValue::new(
            "service.version",
            env!("CARGO_PKG_VERSION"),
        ))
        .build();

    let registry = Registry::new();
    let pages = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .scope_info_enabled(false)
        .build()
        .map_err(|source| TelemetryError::MetricsRegistry { source })?;
    let mut metrics = SdkMeterProvider::builder()
        .with_resource(resource.clone())
        .with_reader(pages);
    let mut traces = None;
    if let Some(endpoint) = &options.otlp_endpoint {
        let otlp = Otlp::connect(endpoint)?;
        metrics = metrics.with_reader(otlp.metrics);
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .with_batch_exporter(otlp.spans)
            .build();
        traces = Some(Traces {
            provider,
            thread: otlp.thread,
        });
    }
    let metrics = metrics.build();

    tracing_subscriber::registry()
        .with(log)
        .with(traces.as_ref().map(|traces| {
            tracing_opentelemetry::layer()
                .with_tracer(traces.provider.tracer("remuda"))
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_filter(
                    Targets::new()
                        .with_default(LevelFilter::INFO)
                        .with_targets(UNTRACED.map(|target| (target, LevelFilter::OFF))),
                )
        }))
        .try_init()
        .map_err(|source| TelemetryError::AlreadyStarted { source })?;

    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    opentelemetry::global::set_meter_provider(metrics.clone());
    if let Some(traces) = &traces {
        propagate::enable(traces.provider.tracer("remuda-remote"));
    }
    Ok(Telemetry {
        registry,
        http_listen: options.http_listen,
        http: None,
        metrics,
        traces,
    })
}

/// A history and points of failure, in the builds that have them.
#[cfg_attr(
    not(debug_assertions),
    expect(
        clippy::unnecessary_wraps,
        reason = "nothing is left of it in a release build"
    )
)]
fn prepare_for_tests(service: &str, options: &TelemetryOptions) -> Result<(), TelemetryError> {
    #[cfg(feature = "failpoints")]
    crate::failpoint::set_up(options.failpoints.as_deref())
        .map_err(|problem| TelemetryError::Failpoints { problem })?;
    #[cfg(debug_assertions)]
    if let Some(path) = &options.history {
        crate::history::History::to_file(path, service)
            .map_err(|source| TelemetryError::History {
                path: path.clone(),
                source,
            })?
            .install();
    }
    #[cfg(not(debug_assertions))]
    let _ = (service, options);
    Ok(())
}

impl Telemetry {
    /// Serves `/metrics`, `/healthz` and `/readyz` where the options say so; the address is the
    /// one that was bound. None when they name no address.
    pub fn serve(&mut self, readiness: &Readiness) -> Result<Option<SocketAddr>, TelemetryError> {
        let Some(address) = self.http_listen else {
            return Ok(None);
        };
        let server = HttpServer::start(address, self.registry.clone(), readiness.clone())
            .map_err(|source| TelemetryError::Listen { address, source })?;
        let bound = server.address();
        self.http = Some(server);
        Ok(Some(bound))
    }

    /// Sends what is left and ends the threads, within a bound whatever the collector does.
    pub async fn shutdown(self) {
        let metrics = self.metrics;
        let metrics = flush("metrics", move || {
            metrics.shutdown_with_timeout(FLUSH_BOUND)
        });
        if let Some(traces) = self.traces {
            let provider = traces.provider;
            let spans = flush("spans", move || provider.shutdown_with_timeout(FLUSH_BOUND));
            tokio::join!(metrics, spans);
            traces.thread.stop(THREAD_END_BOUND).await;
        } else {
            metrics.await;
        }
        if let Some(http) = self.http {
            http.stop(THREAD_END_BOUND).await;
        }
    }
}

/// Runs one blocking shutdown on a thread of its own and waits at most the bound. Not on the
/// runtime's blocking pool, for whose threads a runtime waits when it ends.
async fn flush(what: &'static str, shutdown: impl FnOnce() -> OTelSdkResult + Send + 'static) {
    let (sender, done) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name(format!("flush-{what}"))
        .spawn(move || {
            // After the bound nobody listens any more.
            let _ = sender.send(shutdown());
        });
    if let Err(error) = thread {
        tracing::warn!(%error, what, "telemetry is not flushed");
        return;
    }
    match tokio::time::timeout(FLUSH_BOUND, done).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => tracing::warn!(%error, what, "telemetry was not flushed"),
        Ok(Err(_)) => tracing::warn!(what, "telemetry was not flushed: its thread ended early"),
        Err(_) => tracing::warn!(what, "telemetry was not flushed in time"),
    }
}

/// The two exporters of one endpoint and the thread that their connections live on.
struct Otlp {
    spans: SpanExporter,
    metrics: PeriodicReader<MetricExporter>,
    thread: RuntimeThread,
}

impl Otlp {
    /// Does not wait for the collector: one that comes later is found later.
    fn connect(endpoint: &str) -> Result<Self, TelemetryError> {
        let wrong = |source| TelemetryError::OtlpEndpoint {
            endpoint: endpoint.to_owned(),
            source,
        };
        if endpoint.trim().is_empty() {
            // An empty one would silently become the exporter's default.
            let reason = "endpoint: it is empty; leave it out to export nothing".to_owned();
            return Err(wrong(ExporterBuildError::InvalidConfiguration(reason)));
        }
        let thread = RuntimeThread::start("telemetry-otlp")
            .map_err(|source| TelemetryError::StartThread { source })?;
        let inside = thread.handle().enter();
        let spans = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(wrong)?;
        let metrics = MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(wrong)?;
        let metrics = PeriodicReader::builder(metrics)
            .with_interval(METRICS_INTERVAL)
            .build();
        drop(inside);
        Ok(Self {
            spans,
            metrics,
            thread,
        })
    }
}
