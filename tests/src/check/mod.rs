//! The offline checker: a history and what the streams hold at its end, against the invariants.
//!
//! Pure: it reads no clock, no file and no server. Each invariant stands in a module of its own,
//! with histories written by hand that break it.
//!
//! ```
//! use remuda_tests::check::{Promises, check};
//! use remuda_tests::history::{Ends, History};
//!
//! let violations = check(&History::default(), &Ends::default(), &Promises::default());
//! assert!(violations.is_empty(), "{violations:#?}");
//! ```
//!
//! Every accepted task must be in the history of its client, and every daemon of the fleet must
//! have recorded, with the sidecar of [`crate::binaries::faulty_sidecar`]; else the checker
//! reports what it cannot find.

mod i1_one_terminal;
mod i2_terminal_stays;
mod i3_epochs_grow;
mod i4_reset;
mod i5_output;
mod i6_superseded;
mod i7_attempts;
mod i8_tenants;
mod i9_leftovers;
#[cfg(test)]
mod sample;

use std::fmt;
use std::time::Duration;

use crate::history::{Ends, History, Line};

/// What the run is held to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promises {
    /// How long after its acceptance, and after the last fault's end, a task may take to have its
    /// terminal: the tasks' own time included.
    pub within: Duration,
    /// When the last fault had ended, by [`crate::history::now`].
    pub faults_ended: u64,
    /// When NATS lost what it had stored, where that was the fault: a terminal that was read
    /// before may be another one after.
    pub storage_lost: Vec<u64>,
}

impl Default for Promises {
    fn default() -> Self {
        Self {
            within: Duration::from_secs(30),
            faults_ended: 0,
            storage_lost: Vec::new(),
        }
    }
}

impl Promises {
    /// Which stretch between losses of the storage a time falls into.
    fn stretch(&self, at: u64) -> usize {
        self.storage_lost.iter().filter(|lost| **lost <= at).count()
    }
}

/// What must hold; `docs/faults.md` has them in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Invariant {
    I1,
    I2,
    I3,
    I4,
    I5,
    I6,
    I7,
    I8,
    I9,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// An invariant that does not hold, and what shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: Invariant,
    /// What it is about: `task 0199…`, `sandbox 0199…`.
    pub about: String,
    pub what: String,
    /// The lines of the history that show it.
    pub events: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.invariant, self.about, self.what)?;
        for event in &self.events {
            write!(f, "\n    {event}")?;
        }
        Ok(())
    }
}

impl Violation {
    fn new(invariant: Invariant, about: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            invariant,
            about: about.into(),
            what: what.into(),
            events: Vec::new(),
        }
    }

    fn shown_by<'a>(mut self, lines: impl IntoIterator<Item = &'a Line>) -> Self {
        self.events = lines.into_iter().map(ToString::to_string).collect();
        self
    }
}

/// All violations of all invariants, in their order.
pub fn check(history: &History, ends: &Ends, promises: &Promises) -> Vec<Violation> {
    [
        i1_one_terminal::check(history, ends, promises),
        i2_terminal_stays::check(history, ends, promises),
        i3_epochs_grow::check(history),
        i4_reset::check(history),
        i5_output::check(history, ends, promises),
        i6_superseded::check(history, ends),
        i7_attempts::check(history),
        i8_tenants::check(history, ends),
        i9_leftovers::check(history, ends),
    ]
    .concat()
}
