//! `/metrics`, `/healthz` and `/readyz` on a thread of their own, so that a busy data path
//! cannot make the process look dead.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{Registry, TextEncoder};

use crate::runtime_thread::RuntimeThread;

/// What must be up before the process takes work. Everything starts as not ready. Clones are
/// the same handle.
#[derive(Clone, Debug)]
pub struct Readiness {
    parts: Arc<[(&'static str, AtomicBool)]>,
}

impl Readiness {
    pub fn new(names: &[&'static str]) -> Self {
        Self {
            parts: names
                .iter()
                .map(|name| (*name, AtomicBool::new(false)))
                .collect(),
        }
    }

    pub fn set(&self, name: &str, ready: bool) {
        let Some((_, state)) = self.parts.iter().find(|(part, _)| *part == name) else {
            tracing::error!(part = name, "readiness of an undeclared part was set");
            return;
        };
        if state.swap(ready, Ordering::Relaxed) != ready {
            tracing::info!(part = name, ready, "readiness changed");
        }
    }

    pub fn is_ready(&self) -> bool {
        self.parts
            .iter()
            .all(|(_, ready)| ready.load(Ordering::Relaxed))
    }

    /// The parts that are not ready, in the order in which they were declared.
    pub fn missing(&self) -> Vec<&'static str> {
        self.parts
            .iter()
            .filter(|(_, ready)| !ready.load(Ordering::Relaxed))
            .map(|(name, _)| *name)
            .collect()
    }
}

/// The running server; it ends when it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct HttpServer {
    address: SocketAddr,
    thread: RuntimeThread,
}

impl HttpServer {
    pub(crate) fn start(
        listen: SocketAddr,
        registry: Registry,
        readiness: Readiness,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let thread = RuntimeThread::start("telemetry-http")?;
        let listener = {
            let _inside = thread.handle().enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let router = Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(readyz).with_state(readiness))
            .route("/metrics", get(metrics).with_state(registry));
        thread.handle().spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "health and metrics server ended");
            }
        });
        Ok(Self { address, thread })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) async fn stop(self, bound: Duration) {
        self.thread.stop(bound).await;
    }
}

async fn readyz(State(readiness): State<Readiness>) -> Response {
    let missing = readiness.missing();
    if missing.is_empty() {
        "ready\n".into_response()
    } else {
        let body = format!("not ready: {}\n", missing.join(", "));
        (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    }
}

async fn metrics(State(registry): State<Registry>) -> Response {
    match TextEncoder::new().encode_to_string(&registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            let body = format!("metrics cannot be written: {error}\n");
            (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness;

    #[test]
    fn ready_only_when_every_part_is() {
        let readiness = Readiness::new(&["nats", "redis"]);
        assert_eq!(readiness.missing(), ["nats", "redis"]);
        let clone = readiness.clone();
        clone.set("nats", true);
        assert_eq!(readiness.missing(), ["redis"]);
        assert!(!readiness.is_ready());
        clone.set("redis", true);
        assert!(readiness.is_ready());
        clone.set("nats", false);
        assert_eq!(readiness.missing(), ["nats"]);
    }

    #[test]
    fn an_undeclared_part_changes_nothing() {
        let readiness = Readiness::new(&["nats"]);
        readiness.set("nast", true);
        assert_eq!(readiness.missing(), ["nats"]);
    }
}
