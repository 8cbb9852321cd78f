//! W3C trace context: from a message into spans, from spans into messages, and past the places
//! that only hand it on.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

pub const TRACEPARENT: &str = "traceparent";
pub const TRACESTATE: &str = "tracestate";

/// A `traceparent` of version 00 has 55 bytes; later versions may only append.
const MAX_TRACEPARENT: usize = 128;
/// The least that W3C asks everybody to carry on, and the most that is carried here.
const MAX_TRACESTATE: usize = 512;

static EXPORTING: AtomicBool = AtomicBool::new(false);
static REMOTE_TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Called once, when spans are exported. `remote` records spans on behalf of others.
pub(crate) fn enable(remote: SdkTracer) {
    let _ = REMOTE_TRACER.set(remote);
    EXPORTING.store(true, Ordering::Relaxed);
}

/// Whether spans of this process are exported.
pub fn exporting() -> bool {
    EXPORTING.load(Ordering::Relaxed)
}

/// The trace context of one message. A plain value: a process that exports nothing still hands
/// the one it got to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceHeaders {
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

impl TraceHeaders {
    /// What came with a message. Whatever cannot be a trace context is left out, as W3C asks;
    /// it must never fail the message.
    pub fn incoming(traceparent: Option<&str>, tracestate: Option<&str>) -> Self {
        let Some(parent) = traceparent.map(str::trim) else {
            return Self::default();
        };
        let headers = Self {
            traceparent: (parent.len() <= MAX_TRACEPARENT).then(|| parent.to_owned()),
            tracestate: tracestate
                .map(str::trim)
                .filter(|state| {
                    (1..=MAX_TRACESTATE).contains(&state.len())
                        && state.bytes().all(|byte| (0x20..0x7f).contains(&byte))
                })
                .map(str::to_owned),
        };
        if headers.context().is_some() {
            headers
        } else {
            Self::default()
        }
    }

    /// The context of the current span; empty, after one branch, when nothing is exported.
    pub fn current() -> Self {
        if !exporting() {
            return Self::default();
        }
        Self::of(&tracing::Span::current())
    }

    /// The context of `span`; empty, after one branch, when nothing is exported.
    pub fn of(span: &tracing::Span) -> Self {
        if !exporting() {
            return Self::default();
        }
        let mut headers = Self::default();
        TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
        headers
    }

    /// The current span's context, or what came in where this process exports nothing: the next
    /// one along the way always gets the nearest parent that exists.
    pub fn current_or(incoming: &Self) -> Self {
        let current = Self::current();
        if current.is_empty() {
            incoming.clone()
        } else {
            current
        }
    }

    pub fn is_empty(&self) -> bool {
        self.traceparent.is_none()
    }

    /// Writes the headers that are there through `set`, whatever the carrier is.
    pub fn inject(&self, mut set: impl FnMut(&'static str, &str)) {
        if let Some(parent) = &self.traceparent {
            set(TRACEPARENT, parent);
            if let Some(state) = &self.tracestate {
                set(TRACESTATE, state);
            }
        }
    }

    fn context(&self) -> Option<Context> {
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), self);
        context.span().span_context().is_valid().then_some(context)
    }
}

impl Extractor for TraceHeaders {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => self.traceparent.as_deref(),
            TRACESTATE => self.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

impl Injector for TraceHeaders {
    fn set(&mut self, key: &str, value: String) {
        match key {
            TRACEPARENT => self.traceparent = Some(value),
            TRACESTATE if !value.is_empty() => self.tracestate = Some(value),
            _ => {}
        }
    }
}

/// Makes `span` a child of what came with a message. To be called before the span is entered or
/// used as a parent: from then on its place in the trace is fixed.
pub fn set_parent(span: &tracing::Span, headers: &TraceHeaders) {
    if !exporting() {
        return;
    }
    let Some(context) = headers.context() else {
        return;
    };
    if let Err(error) = span.set_parent(context) {
        tracing::debug!(%error, "span keeps its own parent");
    }
}

/// A span that somebody without a network of its own has finished.
#[derive(Clone, Debug)]
pub struct RemoteSpan<'a> {
    pub name: &'static str,
    pub start: SystemTime,
    /// Taken as `start` when it lies before it.
    pub end: SystemTime,
    pub attributes: &'a [(&'static str, Cow<'a, str>)],
    /// Why it failed, if it did.
    pub error: Option<&'a str>,
}

/// Exports a finished span as a child of `parent` (what the remote side had been sent).
/// Does nothing, after one branch, when nothing is exported.
pub fn record_remote_span(parent: &TraceHeaders, span: &RemoteSpan<'_>) {
    if !exporting() {
        return;
    }
    let (Some(tracer), Some(context)) = (REMOTE_TRACER.get(), parent.context()) else {
        return;
    };
    let attributes = span
        .attributes
        .iter()
        .map(|(key, value)| KeyValue::new(*key, value.clone().into_owned()));
    let builder = SpanBuilder::from_name(span.name)
        .with_kind(SpanKind::Server)
        .with_start_time(span.start)
        .with_attributes(attributes);
    let mut recorded = tracer.build_with_context(builder, &context);
    if let Some(error) = span.error {
        recorded.set_status(Status::error(error.to_owned()));
    }
    recorded.end_with_timestamp(span.end.max(span.start));
}

#[cfg(test)]
mod tests {
    use super::{TRACEPARENT, TRACESTATE, TraceHeaders, enable, set_parent};
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_span_carries_on_the_trace_that_came_in() {
        let provider = SdkTracerProvider::builder().build();
        enable(provider.tracer("remote"));
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        let _subscriber = tracing::subscriber::set_default(subscriber);

        let incoming = TraceHeaders::incoming(Some(PARENT), Some("vendor=value"));
        let span = tracing::info_span!("task");
        set_parent(&span, &incoming);
        let _entered = span.entered();
        let outgoing = TraceHeaders::current();
        let parent = outgoing.traceparent.as_deref().unwrap();
        let fields: Vec<&str> = parent.split('-').collect();
        assert_eq!((fields[0], fields[1], fields[3]), ("00", TRACE, "01"));
        assert_ne!(
            fields[2], "b7ad6b7169203331",
            "the outgoing parent is the span itself"
        );
        assert_eq!(outgoing.tracestate.as_deref(), Some("vendor=value"));
        assert_eq!(TraceHeaders::current_or(&incoming), outgoing);

        // What goes out comes in again elsewhere as it was.
        let mut carried = Vec::new();
        outgoing.inject(|key, value| carried.push((key, value.to_owned())));
        assert_eq!(
            carried.iter().map(|(key, _)| *key).collect::<Vec<_>>(),
            [TRACEPARENT, TRACESTATE]
        );
        let again = TraceHeaders::incoming(Some(&carried[0].1), Some(&carried[1].1));
        assert_eq!(again, outgoing);
    }

    #[test]
    fn what_is_no_trace_context_is_left_out() {
        let long = format!("{PARENT}-{}", "0".repeat(200));
        let bad = [
            None,
            Some(""),
            Some("garbage"),
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"),
            Some("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
            Some("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"),
            Some("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            Some(long.as_str()),
        ];
        for parent in bad {
            let headers = TraceHeaders::incoming(parent, Some("vendor=value"));
            assert_eq!(headers, TraceHeaders::default(), "{parent:?}");
            headers.inject(|key, _| panic!("{key} was written for {parent:?}"));
        }
    }

    #[test]
    fn a_bad_tracestate_does_not_cost_the_parent() {
        let long = "v".repeat(513);
        for state in [Some(""), Some("a=b\r\nEvil: yes"), Some(long.as_str())] {
            let headers = TraceHeaders::incoming(Some(PARENT), state);
            assert_eq!(headers.traceparent.as_deref(), Some(PARENT));
            assert_eq!(headers.tracestate, None, "{state:?}");
        }
    }
}
