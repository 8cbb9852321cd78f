//! Counters, gauges and histograms, exported over OTLP and on `/metrics` alike.
//!
//! Declare them after [`crate::init`], once, and keep them: made earlier they count nothing.
//! Labels come from enums only, so that no id can become one and the number of series is known
//! from the source.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;

/// From a cached answer to the longest task worth a bucket of its own.
const SECONDS: [f64; 21] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];

/// The one meter of a Remuda process, for what the functions below do not cover.
pub fn meter() -> Meter {
    opentelemetry::global::meter("remuda")
}

/// One label: an enum whose variants are all the values there are.
pub trait Label {
    const KEY: &'static str;

    fn value(&self) -> &'static str;
}

/// The labels of one measurement: `()`, one [`Label`], or a tuple of up to four.
pub trait Labels {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R;
}

fn pair<L: Label>(label: &L) -> KeyValue {
    KeyValue::new(L::KEY, label.value())
}

impl Labels for () {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R {
        measure(&[])
    }
}

impl<A: Label> Labels for A {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R {
        measure(&[pair(&self)])
    }
}

impl<A: Label, B: Label> Labels for (A, B) {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R {
        measure(&[pair(&self.0), pair(&self.1)])
    }
}

impl<A: Label, B: Label, C: Label> Labels for (A, B, C) {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R {
        measure(&[pair(&self.0), pair(&self.1), pair(&self.2)])
    }
}

impl<A: Label, B: Label, C: Label, D: Label> Labels for (A, B, C, D) {
    fn with<R>(self, measure: impl FnOnce(&[KeyValue]) -> R) -> R {
        measure(&[pair(&self.0), pair(&self.1), pair(&self.2), pair(&self.3)])
    }
}

/// Only ever grows. On `/metrics` its name ends in `_total`.
#[derive(Clone, Debug)]
pub struct Counter(opentelemetry::metrics::Counter<u64>);

impl Counter {
    pub fn add(&self, count: u64, labels: impl Labels) {
        labels.with(|labels| self.0.add(count, labels));
    }
}

/// A level that is set: the last value counts.
#[derive(Clone, Debug)]
pub struct Gauge(opentelemetry::metrics::Gauge<i64>);

impl Gauge {
    pub fn set(&self, value: i64, labels: impl Labels) {
        labels.with(|labels| self.0.record(value, labels));
    }
}

/// A level that is counted up and down, such as what is in flight.
#[derive(Clone, Debug)]
pub struct UpDownCounter(opentelemetry::metrics::UpDownCounter<i64>);

impl UpDownCounter {
    pub fn add(&self, change: i64, labels: impl Labels) {
        labels.with(|labels| self.0.add(change, labels));
    }
}

/// How long something took. On `/metrics` its name ends in `_seconds`.
#[derive(Clone, Debug)]
pub struct Histogram(opentelemetry::metrics::Histogram<f64>);

impl Histogram {
    pub fn record(&self, took: Duration, labels: impl Labels) {
        labels.with(|labels| self.0.record(took.as_secs_f64(), labels));
    }
}

/// `name` is dotted, such as `remuda.tasks.accepted`.
pub fn counter(name: &'static str, help: &'static str) -> Counter {
    Counter(meter().u64_counter(name).with_description(help).build())
}

pub fn gauge(name: &'static str, help: &'static str) -> Gauge {
    Gauge(meter().i64_gauge(name).with_description(help).build())
}

pub fn up_down_counter(name: &'static str, help: &'static str) -> UpDownCounter {
    UpDownCounter(
        meter()
            .i64_up_down_counter(name)
            .with_description(help)
            .build(),
    )
}

/// A histogram of durations, with buckets from 100 µs to 10 minutes.
pub fn histogram(name: &'static str, help: &'static str) -> Histogram {
    Histogram(
        meter()
            .f64_histogram(name)
            .with_description(help)
            .with_unit("s")
            .with_boundaries(SECONDS.to_vec())
            .build(),
    )
}
