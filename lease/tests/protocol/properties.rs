//! What must hold in every state, and what must happen in some: a model in which nothing happens
//! keeps every promise.

use stateright::Property;

use crate::broker::Presence;
use crate::model::Protocol;
use crate::state::{State, Terminal, WORKERS};
use crate::worker::At;

pub(crate) fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always(TERMINAL_STANDS, |_, state: &State| {
            !state.seen.broken.terminal_changed
        }),
        Property::always(EPOCHS_GROW, |_, state: &State| {
            !state.seen.broken.epoch_went_back
        }),
        Property::always(ONE_PER_EPOCH, |_, state: &State| {
            !state.seen.broken.epoch_shared
        }),
        Property::always(ONE_GRANT, |_, state: &State| {
            !state.seen.broken.granted_twice
        }),
        Property::always(ATTEMPTS_BOUNDED, |protocol: &Protocol, state: &State| {
            let most = protocol.attempts * (1 + state.seen.forgot);
            state.seen.grants.iter().all(|grants| *grants <= most)
        }),
        Property::always(RESULT_IS_REAL, |_, state: &State| {
            state
                .broker
                .terminals
                .iter()
                .all(|terminal| match terminal {
                    Some(Terminal::Done { epoch, .. }) => {
                        state.seen.acted.iter().any(|(acted, _)| acted == epoch)
                    }
                    _ => true,
                })
        }),
        // The model is not empty: what the properties are about does happen.
        Property::sometimes("a second attempt wins", |_, state: &State| {
            matches!(
                state.broker.terminals[0],
                Some(Terminal::Done { attempt: 2, .. })
            )
        }),
        Property::sometimes("an attempt loses at the gate", |_, state: &State| {
            loses(state, |terminal| matches!(terminal, Terminal::Done { .. }))
        }),
        Property::sometimes("attempts are exhausted", |_, state: &State| {
            state.broker.terminals[0] == Some(Terminal::DeadLettered)
        }),
        Property::sometimes(
            "all is settled after the end",
            |protocol: &Protocol, state: &State| {
                let waiting = state.broker.requests.iter().flatten();
                protocol.over(state)
                    && state.broker.placements.is_empty()
                    && waiting.copied().all(|request| request == Presence::Absent)
            },
        ),
    ]
}

/// Somebody is about to conclude, and another terminal is there.
fn loses(state: &State, stored: fn(Terminal) -> bool) -> bool {
    (0..WORKERS).any(|w| match state.workers[w].holder {
        Some(holder) => match (holder.at, state.broker.terminals[holder.task]) {
            (At::Ran(ours), Some(first)) => ours != first && stored(first),
            _ => false,
        },
        None => false,
    })
}

/// I2.
pub(crate) const TERMINAL_STANDS: &str = "a terminal never changes";
/// I3 and, at the sidecar, I6.
pub(crate) const EPOCHS_GROW: &str = "a sandbox accepts no epoch below one that it accepted";
/// I3.
pub(crate) const ONE_PER_EPOCH: &str = "one sandbox, and with it one worker, acts under an epoch";
/// What the claim is for.
pub(crate) const ONE_GRANT: &str = "nothing is granted that somebody holds";
/// I7.
pub(crate) const ATTEMPTS_BOUNDED: &str = "attempts stay within the limit";
/// I6, at the terminal.
pub(crate) const RESULT_IS_REAL: &str = "a result stands for what a sandbox accepted";
