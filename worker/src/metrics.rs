//! What a worker counts.

use std::time::Duration;

use broker_schema::Outcome;
use remuda_telemetry::metrics::{self, Counter, Gauge, Histogram, Label};

/// How an attempt left the worker.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AttemptEnd {
    Outcome(Outcome),
    HandedBack,
    /// Its terminal came second.
    Superseded,
    /// It was given up without a word.
    Quiet,
}

impl Label for AttemptEnd {
    const KEY: &'static str = "end";

    fn value(&self) -> &'static str {
        match self {
            Self::Outcome(outcome) => outcome.as_str(),
            Self::HandedBack => "handed_back",
            Self::Superseded => "superseded",
            Self::Quiet => "quiet",
        }
    }
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SandboxState {
    Creating,
    Warm,
    Leased,
    Session,
    Destroying,
}

impl SandboxState {
    /// In the order of `Inventory::by_state`.
    pub(crate) const ALL: [Self; 5] = [
        Self::Creating,
        Self::Warm,
        Self::Leased,
        Self::Session,
        Self::Destroying,
    ];
}

impl Label for SandboxState {
    const KEY: &'static str = "state";

    fn value(&self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Warm => "warm",
            Self::Leased => "leased",
            Self::Session => "session",
            Self::Destroying => "destroying",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    attempts: Counter,
    attempt: Histogram,
    create: Histogram,
    create_failures: Counter,
    unreadable: Counter,
    refused: Counter,
    foreign_keys: Counter,
    leases_lost: Counter,
    sandboxes: Gauge,
    jobs: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            attempts: metrics::counter(
                "remuda.worker.attempts",
                "Attempts that have left the worker, by how",
            ),
            attempt: metrics::histogram(
                "remuda.worker.attempt",
                "From the placement's arrival to its stored terminal",
            ),
            create: metrics::histogram(
                "remuda.worker.sandbox.create",
                "From nothing to a sandbox that answers",
            ),
            create_failures: metrics::counter(
                "remuda.worker.sandbox.create_failures",
                "Sandboxes that could not be made",
            ),
            unreadable: metrics::counter(
                "remuda.worker.placements.unreadable",
                "Placements that could not be read and had nobody to be told",
            ),
            refused: metrics::counter(
                "remuda.worker.placements.refused",
                "Placements that named other tenants, workers or sandboxes than their subject",
            ),
            foreign_keys: metrics::counter(
                "remuda.worker.redis.foreign.keys",
                "Keys under the fleet's names that were not the fleet's, set aside",
            ),
            leases_lost: metrics::counter(
                "remuda.worker.leases.lost",
                "Leases that were lost while they were held",
            ),
            sandboxes: metrics::gauge("remuda.worker.sandboxes", "Sandboxes here, by state"),
            jobs: metrics::gauge("remuda.worker.jobs", "Placements in hand"),
        }
    }

    pub(crate) fn attempt_ended(&self, end: AttemptEnd, took: Duration) {
        self.attempts.add(1, end);
        self.attempt.record(took, end);
    }

    pub(crate) fn created(&self, took: Duration) {
        self.create.record(took, ());
    }

    pub(crate) fn create_failed(&self) {
        self.create_failures.add(1, ());
    }

    pub(crate) fn unreadable(&self) {
        self.unreadable.add(1, ());
    }

    pub(crate) fn refused(&self) {
        self.refused.add(1, ());
    }

    pub(crate) fn foreign_keys(&self, count: u64) {
        self.foreign_keys.add(count, ());
    }

    pub(crate) fn lease_lost(&self) {
        self.leases_lost.add(1, ());
    }

    pub(crate) fn state(&self, sandboxes: [u32; 5], jobs: usize) {
        for (state, count) in SandboxState::ALL.into_iter().zip(sandboxes) {
            self.sandboxes.set(i64::from(count), state);
        }
        self.jobs.set(jobs as i64, ());
    }
}
