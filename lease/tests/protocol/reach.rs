//! I1: from every state that can be reached, whatever went wrong on the way, every task's
//! terminal can still be reached by steps in which nothing more goes wrong.
//!
//! In a finite graph this is what "eventually" means under fairness: a run that never ended
//! would pass some state without end and never take the step that leads out of it.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{HashMap, VecDeque};
use std::hash::{Hash as _, Hasher as _};

use stateright::Model;

use crate::model::{Action, Protocol};
use crate::state::State;

pub(crate) struct Reach {
    pub(crate) states: usize,
    /// How one that has no way to the end was reached.
    pub(crate) stuck: Option<Vec<Action>>,
}

/// Waiting until the server forgets a message id is no way out: it takes minutes.
pub(crate) fn explore(protocol: &Protocol) -> Reach {
    // By fingerprints: the states themselves are kept only until they were visited.
    let mut index: HashMap<u64, u32> = HashMap::new();
    let mut queue: VecDeque<(u32, State)> = VecDeque::new();
    // For each state those that lead to it without a fault.
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut ends = Vec::new();
    let mut reached_by: Vec<Option<(u32, Action)>> = vec![None];
    for state in protocol.init_states() {
        index.insert(fingerprint(&state), 0);
        before.push(Vec::new());
        queue.push_back((0, state));
    }
    let mut actions = Vec::new();
    while let Some((here, state)) = queue.pop_front() {
        if state.broker.terminals[..protocol.tasks]
            .iter()
            .all(Option::is_some)
        {
            // What comes after the end does not matter here.
            ends.push(here);
            continue;
        }
        actions.clear();
        protocol.actions(&state, &mut actions);
        for &action in &actions {
            let Some(next) = protocol.next_state(&state, action) else {
                continue;
            };
            let there = match index.entry(fingerprint(&next)) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let there = u32::try_from(before.len()).unwrap();
                    queue.push_back((there, next));
                    before.push(Vec::new());
                    reached_by.push(Some((here, action)));
                    *new.insert(there)
                }
            };
            if !matches!(
                action,
                Action::Fault(_) | Action::Cancel(_) | Action::DuplicateWindowPasses
            ) {
                before[there as usize].push(here);
            }
        }
    }
    let mut leads_out = vec![false; before.len()];
    while let Some(state) = ends.pop() {
        if !std::mem::replace(&mut leads_out[state as usize], true) {
            ends.extend(&before[state as usize]);
        }
    }
    let stuck = leads_out.iter().position(|leads| !leads).map(|mut at| {
        let mut path = Vec::new();
        while let Some((from, action)) = reached_by[at] {
            path.push(action);
            at = from as usize;
        }
        path.reverse();
        path
    });
    Reach {
        states: before.len(),
        stuck,
    }
}

fn fingerprint(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}
