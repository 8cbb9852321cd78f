//! What was submitted from here: an id stands for one content.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use broker_schema::{PoolId, TaskId};

/// How many ids are remembered; older ones are left to the fleet to notice.
const REMEMBERED: usize = 16_384;
/// How many lanes are remembered as announced.
const LANES: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    digests: HashMap<TaskId, String>,
    order: VecDeque<TaskId>,
    lanes: HashSet<PoolId>,
}

impl Outbox {
    /// Notes a submission; false where the id stands for other content.
    pub(crate) fn admit(&self, task: TaskId, digest: &str) -> bool {
        let mut state = self.lock();
        if let Some(known) = state.digests.get(&task) {
            return known == digest;
        }
        if state.order.len() >= REMEMBERED
            && let Some(oldest) = state.order.pop_front()
        {
            state.digests.remove(&oldest);
        }
        state.order.push_back(task);
        state.digests.insert(task, digest.to_owned());
        true
    }

    /// Whether this is the first submission to a lane, as far as remembered.
    pub(crate) fn first_in_lane(&self, pool: &PoolId) -> bool {
        let mut state = self.lock();
        if state.lanes.contains(pool) {
            return false;
        }
        if state.lanes.len() >= LANES {
            state.lanes.clear();
        }
        state.lanes.insert(pool.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stands_for_one_content() {
        let outbox = Outbox::default();
        let id = TaskId::new();
        assert!(outbox.admit(id, "a"));
        assert!(outbox.admit(id, "a"));
        assert!(!outbox.admit(id, "b"));
        for _ in 0..REMEMBERED {
            assert!(outbox.admit(TaskId::new(), "x"));
        }
        assert!(outbox.admit(id, "b"), "the oldest was to be forgotten");
        assert_eq!(outbox.lock().digests.len(), REMEMBERED);
    }

    #[test]
    fn a_lane_is_new_once() {
        let outbox = Outbox::default();
        let pool: PoolId = "py".parse().unwrap();
        assert!(outbox.first_in_lane(&pool));
        assert!(!outbox.first_in_lane(&pool));
    }
}
