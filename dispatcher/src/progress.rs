//! Marks everything that is held as in progress, so that what waits here is not sent again.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use broker_schema::Term;
use remuda_client::broker::Delivery;
use remuda_telemetry::Chain;

use crate::fleet::Fleet;

/// The requests that this dispatcher holds, by the term that it got them in and their place in
/// the stream: one that comes in a new term cannot be settled by what it came as before.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeldSet(Arc<Mutex<Sequences>>);

#[derive(Debug, Default)]
struct Sequences {
    held: HashMap<Key, Delivery>,
    /// Those that are being refused before anybody held them.
    aside: HashSet<u64>,
}

type Key = (Term, u64);

/// While it lives its request is held.
#[derive(Debug)]
pub(crate) struct Held {
    set: HeldSet,
    key: Key,
    stored: u64,
}

/// While it lives nobody here can hold the request.
#[derive(Debug)]
pub(crate) struct Aside {
    set: HeldSet,
    sequence: u64,
}

impl HeldSet {
    /// Keeps a request from being held; `None` where somebody holds it.
    pub(crate) fn set_aside(&self, sequence: u64) -> Option<Aside> {
        let mut sequences = self.lock();
        if sequences.held.keys().any(|(_, held)| *held == sequence)
            || !sequences.aside.insert(sequence)
        {
            return None;
        }
        Some(Aside {
            set: self.clone(),
            sequence,
        })
    }

    /// `None` where it is held already: it was sent again, and once is enough.
    pub(crate) fn hold(&self, term: Term, delivery: &Delivery) -> Option<Held> {
        let key = (term, delivery.stream_sequence);
        let mut sequences = self.lock();
        let known = sequences.held.get(&key);
        let again = known.is_some_and(|known| known.stored == delivery.stored);
        if again || sequences.aside.contains(&key.1) {
            return None;
        }
        sequences.held.insert(key, delivery.clone());
        Some(Held {
            set: self.clone(),
            key,
            stored: delivery.stored,
        })
    }

    fn all(&self) -> Vec<Delivery> {
        self.lock().held.values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sequences> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Whether another message has come with its place in the stream: the server lost its
    /// storage and counts anew, and nothing is left of this one but what its client kept.
    pub(crate) fn is_superseded(&self) -> bool {
        let sequences = self.set.lock();
        let known = sequences.held.get(&self.key);
        known.is_some_and(|known| known.stored != self.stored)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.is_superseded() {
            self.set.lock().held.remove(&self.key);
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.set.lock().aside.remove(&self.sequence);
    }
}

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut turn = tokio::time::interval(fleet.options.timings.progress);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = turn.tick() => {}
        }
        for delivery in fleet.held.all() {
            if let Err(error) = delivery.progress().await {
                tracing::debug!(error = %Chain(&error), "progress could not be told");
                break;
            }
        }
    }
}
