//! Marks everything that is held as in progress, so that what waits here is not sent again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use remuda_client::broker::Delivery;
use remuda_telemetry::Chain;

use crate::fleet::Fleet;

/// The requests that this dispatcher holds, by their place in the stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeldSet(Arc<Mutex<HashMap<u64, Delivery>>>);

/// While it lives its request is held.
#[derive(Debug)]
pub(crate) struct Held {
    set: HeldSet,
    sequence: u64,
}

impl HeldSet {
    /// `None` where it is held already: it was sent again, and once is enough.
    pub(crate) fn hold(&self, delivery: &Delivery) -> Option<Held> {
        let sequence = delivery.stream_sequence;
        let mut held = self.lock();
        if held.contains_key(&sequence) {
            return None;
        }
        held.insert(sequence, delivery.clone());
        Some(Held {
            set: self.clone(),
            sequence,
        })
    }

    fn all(&self) -> Vec<Delivery> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Delivery>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set.lock().remove(&self.sequence);
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
