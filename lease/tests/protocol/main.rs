//! The lease and claim protocol as a pure state machine, explored to its end by a model checker:
//! clients, dispatchers, NATS, Redis, workers and sidecars, with a fault at every step.
//!
//! [`model`] says who may do what and what must hold; every transition names the function of the
//! product that it stands for. That the properties can fail is shown by leaving parts of the
//! protocol out. That `redis` is what the scripts do is `model.rs` beside this.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(
    clippy::print_stdout,
    reason = "how much was explored is worth knowing"
)]

mod broker;
mod dispatcher;
mod faults;
mod mishaps;
mod model;
mod properties;
mod reach;
mod redis;
mod state;
mod worker;

use model::{Mutation, Protocol};
use properties::{ATTEMPTS_BOUNDED, EPOCHS_GROW, ONE_GRANT, ONE_PER_EPOCH, TERMINAL_STANDS};
use reach::explore;
use stateright::{Checker, HasDiscoveries, Model};

/// One task, and two of everybody.
const PAIRS: Protocol = Protocol {
    tasks: 1,
    workers: 2,
    dispatchers: 2,
    attempts: 2,
    faults: 1,
    cancels: 0,
    reset_in_place: true,
    mutation: None,
};
/// One of everybody, and two faults on top of each other.
const TWO_FAULTS: Protocol = Protocol {
    workers: 1,
    dispatchers: 1,
    faults: 2,
    ..PAIRS
};
/// Two tasks that want the same sandbox.
const TWO_TASKS: Protocol = Protocol {
    tasks: 2,
    workers: 1,
    dispatchers: 2,
    ..PAIRS
};
/// Somebody cancels the task.
const CANCELLED: Protocol = Protocol {
    dispatchers: 1,
    cancels: 1,
    ..PAIRS
};
/// Sandboxes are destroyed after a task, as the worker does.
const DESTROYED: Protocol = Protocol {
    reset_in_place: false,
    ..PAIRS
};

/// Explores all that can happen and finds every property kept.
fn holds(protocol: &Protocol) {
    let checker = protocol.clone().checker().threads(2).spawn_bfs().join();
    println!("{} states, all of them", checker.unique_state_count());
    checker.assert_properties();
}

/// A counterexample to the property is found.
fn breaks(protocol: &Protocol, mutation: Mutation, property: &'static str) {
    let protocol = Protocol {
        mutation: Some(mutation),
        ..protocol.clone()
    };
    let found = HasDiscoveries::AnyOf([property].into());
    let checker = protocol.checker().threads(2).finish_when(found);
    let checker = checker.spawn_bfs().join();
    let states = checker.unique_state_count();
    let Some(path) = checker.discovery(property) else {
        panic!("{property:?} holds without it, in all {states} states");
    };
    let steps = path.into_actions().len();
    println!("{property}: broken by {steps} steps, {states} states");
}

/// Whatever goes wrong, once nothing more does every task comes to its end, and soon: nobody has
/// to wait until the server forgets a message id.
fn ends(protocol: &Protocol) {
    let reach = explore(protocol);
    println!("{} states", reach.states);
    assert_eq!(reach.stuck, None, "from there no end is in reach");
}

#[test]
fn pairs_keep_every_property_through_a_fault() {
    holds(&PAIRS);
}

#[test]
fn two_faults_on_top_of_each_other_change_nothing() {
    holds(&TWO_FAULTS);
}

#[test]
fn two_tasks_do_not_get_in_each_others_way() {
    holds(&TWO_TASKS);
}

#[test]
fn a_cancellation_races_with_everything() {
    holds(&CANCELLED);
}

#[test]
fn destroying_instead_of_resetting_changes_nothing() {
    holds(&DESTROYED);
}

#[test]
fn every_task_ends() {
    for protocol in [PAIRS, TWO_FAULTS, CANCELLED, DESTROYED] {
        ends(&protocol);
    }
}

#[test]
fn without_the_terminal_gate_a_terminal_changes() {
    breaks(&PAIRS, Mutation::NoTerminalGate, TERMINAL_STANDS);
}

#[test]
fn without_the_epoch_check_a_late_operation_is_accepted() {
    breaks(&PAIRS, Mutation::NoEpochCheck, EPOCHS_GROW);
}

#[test]
fn a_claim_that_is_not_atomic_grants_twice() {
    breaks(&PAIRS, Mutation::ClaimNotAtomic, ONE_GRANT);
    breaks(&PAIRS, Mutation::ClaimNotAtomic, ATTEMPTS_BOUNDED);
    let two_workers = Protocol {
        workers: 2,
        faults: 0,
        ..TWO_TASKS
    };
    breaks(&two_workers, Mutation::ClaimNotAtomic, ONE_PER_EPOCH);
}

#[test]
fn an_incarnation_that_outlives_a_restart_gives_an_epoch_out_again() {
    let two_workers = Protocol {
        workers: 2,
        dispatchers: 1,
        ..TWO_TASKS
    };
    breaks(&two_workers, Mutation::IncarnationKept, ONE_PER_EPOCH);
}

#[test]
fn a_worker_that_knows_placements_by_their_attempt_alone_drops_one() {
    let forgetful = Protocol {
        mutation: Some(Mutation::JobsWithoutEpoch),
        ..TWO_FAULTS
    };
    let path = explore(&forgetful).stuck;
    println!("{path:?}");
    // It would come to its end only when the server forgets the request's message id.
    assert!(
        path.is_some(),
        "Redis counts an attempt again, and nothing is lost"
    );
}

/// Minutes: for a change of the protocol itself.
#[test]
#[ignore = "explores millions of states"]
fn pairs_of_workers_keep_every_property_through_two_faults() {
    let protocol = Protocol {
        dispatchers: 1,
        faults: 2,
        ..PAIRS
    };
    holds(&protocol);
    ends(&protocol);
}
