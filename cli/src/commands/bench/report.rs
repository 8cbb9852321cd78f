//! One JSON line per mode, in the shape that peers' benchmarks print.

use serde::Serialize;
use std::collections::BTreeMap;

use super::load::Phase;
use crate::quantile::{Latencies, Quantiles};

/// A mode's line. Latencies are of one operation at a time; `per_s` maps the
/// number in flight to successes per second.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) mode: &'static str,
    pub(super) isolation: &'static str,
    /// Whether each operation gets a sandbox that nothing used before.
    pub(super) fresh: bool,
    pub(super) version: String,
    pub(super) n: usize,
    pub(super) errors: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first_error: Option<String>,
    pub(super) p50_ms: f64,
    pub(super) p90_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) per_s: BTreeMap<usize, f64>,
    /// What else a mode has to say, e.g. `mb_per_s`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) more: BTreeMap<&'static str, f64>,
}

impl Line {
    /// From one phase for each number in flight, the first of them with 1.
    pub(super) fn new(
        mode: &'static str,
        isolation: &'static str,
        fresh: bool,
        phases: &[(usize, Phase)],
    ) -> Self {
        let mut latencies = Latencies::default();
        let alone = phases
            .first()
            .map_or(&[][..], |(_, phase)| &phase.latencies);
        for latency in alone {
            latencies.add(latency.as_micros() as u64);
        }
        let quantiles = latencies.quantiles();
        let at =
            |pick: fn(&Quantiles) -> u64| quantiles.as_ref().map_or(0.0, |q| pick(q) as f64 / 1e3);
        Self {
            mode,
            isolation,
            fresh,
            version: format!("remuda {}", env!("CARGO_PKG_VERSION")),
            n: alone.len(),
            errors: phases.iter().map(|(_, phase)| phase.errors).sum(),
            first_error: phases
                .iter()
                .find_map(|(_, phase)| phase.first_error.clone()),
            p50_ms: at(|q| q.p50),
            p90_ms: at(|q| q.p90),
            p99_ms: at(|q| q.p99),
            per_s: phases
                .iter()
                .map(|(in_flight, phase)| (*in_flight, round(phase.per_second(), 1)))
                .collect(),
            more: BTreeMap::new(),
        }
    }
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}
