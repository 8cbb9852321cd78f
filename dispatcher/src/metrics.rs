//! What is counted. Labels are enums, or pools of the configuration: their number is known.

use std::collections::BTreeMap;

use broker_schema::{ErrorCode, PoolId};
use remuda_telemetry::metrics::{Counter, Gauge, Histogram, Label, counter, gauge, histogram};

#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) placed: Counter,
    pub(crate) rejected: Counter,
    pub(crate) dead_lettered: Counter,
    pub(crate) redispatched: Counter,
    pub(crate) removed: Counter,
    pub(crate) refused: Counter,
    pub(crate) foreign_keys: Counter,
    pub(crate) claim: Histogram,
    pub(crate) queue_wait: Histogram,
    pub(crate) queued: Gauge,
    pub(crate) lanes: Gauge,
    pub(crate) workers: Gauge,
    pub(crate) leading: Gauge,
    warm: Gauge,
    pools: BTreeMap<PoolId, PoolLabel>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Code(pub(crate) ErrorCode);

impl Label for Code {
    const KEY: &'static str = "code";

    fn value(&self) -> &'static str {
        self.0.as_str()
    }
}

#[derive(Debug, Clone, Copy)]
struct PoolLabel(&'static str);

impl Label for PoolLabel {
    const KEY: &'static str = "pool";

    fn value(&self) -> &'static str {
        self.0
    }
}

impl Metrics {
    pub(crate) fn new<'p>(pools: impl Iterator<Item = &'p PoolId>) -> Self {
        Self {
            placed: counter("remuda.dispatcher.placed", "Placements handed to workers"),
            rejected: counter("remuda.dispatcher.rejected", "Requests rejected, by code"),
            dead_lettered: counter(
                "remuda.dispatcher.dead.lettered",
                "Messages put into the DLQ",
            ),
            redispatched: counter(
                "remuda.dispatcher.redispatched",
                "Placements of dead workers queued again",
            ),
            refused: counter(
                "remuda.dispatcher.registry.refused",
                "What Redis refused because it was not the caller's, by what it was",
            ),
            foreign_keys: counter(
                "remuda.dispatcher.redis.foreign.keys",
                "Keys under the fleet's names that were not the fleet's, set aside",
            ),
            removed: counter(
                "remuda.dispatcher.removed",
                "Tasks whose results were removed when they asked for it",
            ),
            claim: histogram("remuda.dispatcher.claim", "How long a claim took"),
            queue_wait: histogram(
                "remuda.dispatcher.queue.wait",
                "From intake to a placement that is stored",
            ),
            queued: gauge("remuda.dispatcher.queued", "Requests held and not placed"),
            lanes: gauge("remuda.dispatcher.lanes", "Lanes that are pulled from"),
            workers: gauge("remuda.dispatcher.workers", "Workers that are alive"),
            leading: gauge(
                "remuda.dispatcher.leading",
                "Pools that this dispatcher works for, the fleet's duties counted as one",
            ),
            warm: gauge("remuda.dispatcher.warm", "Warm sandboxes, by pool"),
            // Labels are static; pools are read once, from the configuration.
            pools: pools
                .map(|pool| (pool.clone(), PoolLabel(pool.to_string().leak())))
                .collect(),
        }
    }

    pub(crate) fn warm(&self, counts: &BTreeMap<PoolId, u64>) {
        for (pool, label) in &self.pools {
            let count = counts.get(pool).copied().unwrap_or_default();
            self.warm.set(count as i64, *label);
        }
    }
}
