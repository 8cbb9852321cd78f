//! The reassembler against frames that are dropped, repeated and reordered.

use super::*;
use broker_schema::digest::sha256_hex;
use broker_schema::{Attribution, Epoch, Outcome, StepResult, TaskId, Times, Usage};
use proptest::prelude::*;

fn frame(attempt: u32, n: u64, data: &[u8]) -> Frame {
    frame_under(attempt, Epoch(u64::from(attempt)), n, data)
}

fn frame_under(attempt: u32, epoch: Epoch, n: u64, data: &[u8]) -> Frame {
    Frame {
        attempt,
        epoch,
        n,
        step: 0,
        kind: FrameKind::Stdout,
        data: data.into(),
        exit: None,
    }
}

fn terminal(attempt: u32, frames: u64, stdout: &[u8]) -> Terminal {
    Terminal {
        task: TaskId::new(),
        tenant: "t".parse().unwrap(),
        run: "r".parse().unwrap(),
        pool: "p".parse().unwrap(),
        group: None,
        request_digest: String::new(),
        attempt,
        outcome: Outcome::Succeeded,
        attribution: Attribution::Policy,
        evidence: String::new(),
        exit: None,
        error: None,
        steps: vec![StepResult {
            stdout: Output {
                bytes: stdout.len() as u64,
                sha256: if stdout.is_empty() {
                    String::new()
                } else {
                    sha256_hex(stdout)
                },
                ..Output::default()
            },
            ..StepResult::default()
        }],
        frames,
        usage: Usage::default(),
        times: Times::default(),
        sandbox: None,
        kept: false,
    }
}

/// What a reader that obeys resets has in the end.
fn read(events: &[OutputEvent]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for event in events {
        match event {
            OutputEvent::Output { bytes: more, .. } => bytes.extend_from_slice(more),
            OutputEvent::Reset { .. } => bytes.clear(),
            _ => {}
        }
    }
    bytes
}

#[test]
fn a_new_attempt_replaces_the_old() {
    let mut reassembler = Reassembler::default();
    let mut events = Vec::new();
    for frame in [
        frame(1, 0, b"old"),
        frame(2, 0, b"new"),
        frame(1, 1, b"late"),
    ] {
        reassembler.push(frame, &mut events);
    }
    assert!(events.contains(&OutputEvent::Reset { attempt: 2 }));
    assert_eq!(read(&events), b"new");
    let terminal = terminal(2, 1, b"new");
    assert!(reassembler.complete(&terminal));
    reassembler.verify(&terminal).unwrap();
}

/// The terminal of an attempt under a lease.
fn terminal_under(attempt: u32, epoch: Epoch, frames: u64, stdout: &[u8]) -> Terminal {
    Terminal {
        sandbox: Some(broker_schema::SandboxRef {
            sandbox: broker_schema::SandboxId::new(),
            worker: "w".parse().unwrap(),
            epoch,
        }),
        ..terminal(attempt, frames, stdout)
    }
}

/// After a flush attempts are counted from the beginning: the frames of two leases that have the
/// same attempt are never one output.
#[test]
fn frames_of_two_epochs_are_not_mixed() {
    let (old, new) = (Epoch::new(1, 9), Epoch::new(2, 1));
    let of_old = [frame_under(1, old, 0, b"o"), frame_under(1, old, 1, b"ld")];
    let of_new = [frame_under(1, new, 0, b"n"), frame_under(1, new, 1, b"ew")];
    let [o0, o1] = of_old.clone();
    let [n0, n1] = of_new.clone();
    let orders = [
        vec![o0.clone(), o1.clone(), n0.clone(), n1.clone()],
        vec![o0.clone(), n0.clone(), o1.clone(), n1.clone()],
        vec![n0.clone(), o0.clone(), n1.clone(), o1.clone()],
        vec![n1.clone(), o0.clone(), o1.clone(), n0.clone()],
        vec![o0.clone(), n1.clone(), o1.clone(), n0.clone()],
    ];
    for order in orders {
        let (mut reassembler, mut events) = (Reassembler::default(), Vec::new());
        for frame in order.clone() {
            reassembler.push(frame, &mut events);
        }
        assert_eq!(read(&events), b"new", "{order:?}");
        let wins = terminal_under(1, new, 2, b"new");
        assert!(reassembler.complete(&wins) && !reassembler.is_past(&wins));
        // Should the earlier one have won, its frames are read once more, and only they.
        let wins = terminal_under(1, old, 2, b"old");
        assert!(!reassembler.complete(&wins) && reassembler.is_past(&wins));
        reassembler.restart(&wins, &mut events);
        for frame in order.into_iter().filter(|frame| frame.is_of(&wins)) {
            reassembler.push(frame, &mut events);
        }
        // Held frames of the other epoch do not fill what is missing.
        for frame in &of_old {
            reassembler.push(frame.clone(), &mut events);
        }
        assert!(reassembler.complete(&wins));
        assert_eq!(read(&events), b"old");
        reassembler.verify(&wins).unwrap();
    }
}

#[test]
fn the_terminal_decides_which_run_it_was() {
    let (old, new) = (Epoch::new(1, 9), Epoch::new(2, 1));
    // What was seen, what won, whether it is whole, whether it must begin anew.
    let cases = [
        ((1, old), (1, Some(old)), true, false),
        ((1, old), (1, Some(new)), false, false),
        ((1, new), (1, Some(old)), false, true),
        ((2, old), (1, Some(new)), false, true),
        ((1, new), (2, Some(old)), false, false),
        ((2, old), (2, None), true, false),
        ((2, old), (1, None), false, true),
    ];
    for ((attempt, epoch), (won, under), whole, past) in cases {
        let mut reassembler = Reassembler::default();
        reassembler.push(frame_under(attempt, epoch, 0, b"x"), &mut Vec::new());
        let end = match under {
            Some(under) => terminal_under(won, under, 1, b"x"),
            None => terminal(won, 1, b"x"),
        };
        let found = (reassembler.complete(&end), reassembler.is_past(&end));
        assert_eq!(
            found,
            (whole, past),
            "{attempt} {epoch}, won: {won} {under:?}"
        );
    }
}

#[test]
fn the_first_attempt_resets_nothing() {
    let mut events = Vec::new();
    Reassembler::default().push(frame(3, 0, b"x"), &mut events);
    assert_eq!(events.len(), 1);
}

#[test]
fn damage_is_noticed() {
    let cases: [(&[u8], &str); 3] = [(b"xx", "bytes"), (b"y", "digest"), (b"", "bytes")];
    for (sent, problem) in cases {
        let mut reassembler = Reassembler::default();
        reassembler.push(frame(1, 0, sent), &mut Vec::new());
        let error = reassembler.verify(&terminal(1, 1, b"x")).unwrap_err();
        assert!(error.contains(problem), "{error}");
    }
    let mut reassembler = Reassembler::default();
    let stray = Frame {
        step: 7,
        ..frame(1, 0, b"x")
    };
    reassembler.push(stray, &mut Vec::new());
    let error = reassembler.verify(&terminal(1, 1, b"")).unwrap_err();
    assert!(error.contains("step 7"), "{error}");
}

#[test]
fn what_is_held_is_bounded() {
    let mut reassembler = Reassembler::default();
    for n in 1..10 * MAX_HELD as u64 {
        reassembler.push(frame(1, n, b"x"), &mut Vec::new());
    }
    assert_eq!(reassembler.held.len(), MAX_HELD);
}

proptest! {
    /// Live frames in any order, some missing, some twice, then everything
    /// once more in order as it is stored: the reader has the bytes of the
    /// last attempt, and count and digest agree.
    #[test]
    fn any_delivery_then_a_refill_is_the_output(
        first in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..20),
        last in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..40),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..120),
    ) {
        let mut stored: Vec<Frame> = Vec::new();
        for (attempt, pieces) in [(1, &first), (2, &last)] {
            for (n, piece) in (0..).zip(pieces) {
                stored.push(frame(attempt, n, piece));
            }
        }
        let whole = last.concat();
        let end = terminal(2, last.len() as u64, &whole);
        let mut reassembler = Reassembler::default();
        let mut events = Vec::new();
        for pick in picks {
            reassembler.push(stored[pick.index(stored.len())].clone(), &mut events);
            // Whatever was told so far is a beginning of one attempt.
            let so_far = read(&events);
            prop_assert!(whole.starts_with(&so_far) || first.concat().starts_with(&so_far));
        }
        for frame in stored {
            reassembler.push(frame, &mut events);
        }
        prop_assert!(reassembler.complete(&end));
        prop_assert!(!reassembler.has_gap());
        prop_assert_eq!(read(&events), whole);
        prop_assert!(reassembler.verify(&end).is_ok());
    }
}
