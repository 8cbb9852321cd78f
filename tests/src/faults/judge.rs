//! What was seen against what was promised: the answers that clients got, and
//! the histories.

use broker_schema::{Attribution, FrameKind, Outcome, Terminal};
use tokio::time::Instant;

use super::catalogue::Forgiven;
use super::load::Seen;
use super::scene::Violation;
use super::shape::MAX_ATTEMPTS;
use crate::history::Ends;

/// How long a task may take after it was accepted and the last fault ended.
pub(crate) const WITHIN: std::time::Duration = std::time::Duration::from_secs(30);

/// Holds every task that was seen to what it must have come to.
pub(crate) fn judge(
    seen: &[Seen],
    ends: &Ends,
    forgiven: Forgiven,
    fault_end: Instant,
) -> Vec<Violation> {
    seen.iter()
        .flat_map(|seen| {
            let of_one = one(seen, ends, forgiven, fault_end).into_iter();
            of_one.map(|(invariant, what)| {
                Violation::new(
                    invariant,
                    format!("task {} ({}): {what}", seen.task, seen.what),
                )
            })
        })
        .collect()
}

type Found = (&'static str, String);

fn one(seen: &Seen, ends: &Ends, forgiven: Forgiven, fault_end: Instant) -> Vec<Found> {
    let mut found = Vec::new();
    if let Some(error) = &seen.error {
        found.push(("I1", error.clone()));
    }
    let Some(terminal) = &seen.terminal else {
        if seen.accepted.is_some() && seen.error.is_none() {
            found.push(("I1", "was accepted and has no terminal".to_owned()));
        }
        return found;
    };
    if let (Some(accepted), Some(ended)) = (seen.accepted, seen.ended) {
        let took = ended.saturating_duration_since(accepted.max(fault_end));
        if took > WITHIN {
            found.push(("I1", format!("its terminal came after {took:.1?}")));
        }
    }
    let task = seen.task.to_string();
    let stored = ends.terminals.iter().find(|stored| stored.task == task);
    match stored {
        Some(stored) if stored.terminal != *terminal && !forgiven.storage => found.push((
            "I2",
            format!(
                "{} was read, {} is stored",
                terminal.outcome, stored.terminal.outcome
            ),
        )),
        None if !forgiven.storage => found.push(("I2", "its terminal is not stored".to_owned())),
        _ => {}
    }
    let most = MAX_ATTEMPTS + u32::from(seen.retries);
    if terminal.attempt > most {
        found.push(("I7", format!("attempt {} of {most}", terminal.attempt)));
    }
    found.extend(outcome(seen, terminal, forgiven).map(|what| ("check", what)));
    if terminal.outcome == seen.expected.outcome {
        found.extend(output(seen, terminal, ends, forgiven).map(|what| ("I5", what)));
    }
    found
}

/// What the terminal says that it cannot be.
fn outcome(seen: &Seen, terminal: &Terminal, forgiven: Forgiven) -> Option<String> {
    let told = format!(
        "{} by {} in attempt {}: {}",
        terminal.outcome,
        terminal.attribution.as_str(),
        terminal.attempt,
        terminal.evidence
    );
    let expected = &seen.expected;
    match terminal.outcome {
        outcome if outcome == expected.outcome => {
            let code = terminal.exit.map(|exit| exit.code);
            let other = expected.code.is_some() && code != expected.code;
            let blamed = terminal.attribution == Attribution::Infrastructure;
            (other || blamed).then(|| format!("{told}; exit {code:?}"))
        }
        Outcome::Cancelled => (!seen.cancelled).then_some(told),
        Outcome::SandboxLost => (seen.session.is_none() || !forgiven.sessions).then_some(told),
        Outcome::DeadLettered => {
            let early = terminal.attempt < MAX_ATTEMPTS && !forgiven.undelivered;
            (early || !forgiven.dead_letters).then_some(told)
        }
        _ => Some(format!("{told}; expected {}", expected.outcome)),
    }
}

/// What its reader got, or would get, that the sandbox did not write.
fn output(seen: &Seen, terminal: &Terminal, ends: &Ends, forgiven: Forgiven) -> Option<String> {
    let wanted = &seen.expected.stdout;
    let compare = |where_: &str, got: &[u8]| {
        (got != wanted.as_slice()).then(|| {
            let same = got.iter().zip(wanted).take_while(|(a, b)| a == b).count();
            format!(
                "{where_}: {} bytes, expected {}, the first {same} agree",
                got.len(),
                wanted.len()
            )
        })
    };
    if let Some(streamed) = &seen.streamed {
        let differs = compare("what was streamed", streamed);
        if differs.is_some() {
            return differs;
        }
    }
    let step = terminal.steps.last()?;
    if let Some(whole) = step.stdout.whole()
        && terminal.frames == 0
    {
        return compare("the terminal", whole);
    }
    let task = seen.task.to_string();
    let index = terminal.steps.len() as u32 - 1;
    let mut frames: Vec<_> = ends
        .frames
        .iter()
        .filter(|stored| stored.task == task && stored.frame.is_of(terminal))
        .map(|stored| &stored.frame)
        .collect();
    frames.sort_by_key(|frame| frame.n);
    frames.dedup_by_key(|frame| frame.n);
    if frames.len() as u64 != terminal.frames {
        let count = frames.len();
        // What was lost with the storage was read before, or is run again.
        return (!forgiven.storage)
            .then(|| format!("{count} frames of {} are stored", terminal.frames));
    }
    let bytes: Vec<u8> = frames
        .iter()
        .filter(|frame| frame.step == index && frame.kind == FrameKind::Stdout)
        .flat_map(|frame| frame.data.as_slice().iter().copied())
        .collect();
    compare("the frames", &bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use broker_schema::{ExitStatus, Output, StepResult, TaskId};

    use super::super::plan::Work;
    use super::*;
    use crate::history::StoredTerminal;

    fn terminal(task: TaskId, outcome: Outcome, stdout: &[u8]) -> Terminal {
        let json = serde_json::json!({
            "task": task, "tenant": "t", "run": "r", "pool": "p", "attempt": 1,
            "outcome": outcome, "attribution": outcome.default_attribution(),
        });
        let mut terminal: Terminal = serde_json::from_value(json).unwrap();
        terminal.exit = Some(ExitStatus::code(0));
        terminal.steps = vec![StepResult {
            stdout: Output {
                bytes: stdout.len() as u64,
                head: stdout.into(),
                ..Output::default()
            },
            ..StepResult::default()
        }];
        terminal
    }

    fn seen(outcome: Outcome, stdout: &[u8]) -> (Seen, Ends) {
        let task = TaskId::new();
        let terminal = terminal(task, outcome, stdout);
        let now = Instant::now();
        let ends = Ends {
            at: 1,
            terminals: vec![StoredTerminal {
                sequence: 1,
                tenant: "t".to_owned(),
                task: task.to_string(),
                digest: String::new(),
                terminal: terminal.clone(),
            }],
            ..Ends::default()
        };
        let seen = Seen {
            task,
            what: "x".to_owned(),
            session: None,
            expected: Work::Instant { mark: 5 }.expected(),
            retries: 0,
            cancelled: false,
            request: None,
            accepted: Some(now),
            terminal: Some(terminal),
            ended: Some(now + Duration::from_secs(1)),
            streamed: None,
            error: None,
        };
        (seen, ends)
    }

    fn found(seen: &Seen, ends: &Ends, forgiven: Forgiven) -> Vec<String> {
        judge(std::slice::from_ref(seen), ends, forgiven, Instant::now())
            .into_iter()
            .map(|violation| violation.invariant)
            .collect()
    }

    #[test]
    fn what_is_as_it_must_be_is_no_violation() {
        let (seen, ends) = seen(Outcome::Succeeded, b"5\n");
        assert_eq!(found(&seen, &ends, Forgiven::default()), [""; 0]);
    }

    #[test]
    fn everything_else_is_one() {
        let strict = Forgiven::default();
        let (good, ends) = seen(Outcome::Succeeded, b"5\n");
        let missing = Seen {
            terminal: None,
            ..good.clone()
        };
        assert_eq!(found(&missing, &ends, strict), ["I1"]);
        let late = Seen {
            ended: Some(Instant::now() + WITHIN * 2),
            ..good.clone()
        };
        assert_eq!(found(&late, &ends, strict), ["I1"]);
        assert_eq!(found(&good, &Ends::default(), strict), ["I2"]);
        let mut many = good.clone();
        let mut more = ends.clone();
        many.terminal.as_mut().unwrap().attempt = 5;
        more.terminals[0].terminal.attempt = 5;
        assert_eq!(found(&many, &more, strict), ["I7"]);
        assert_eq!(found(&many, &ends, strict), ["I2", "I7"]);
        let (other, ends) = seen(Outcome::Succeeded, b"6\n");
        assert_eq!(found(&other, &ends, strict), ["I5"]);
        for outcome in [
            Outcome::Cancelled,
            Outcome::SandboxLost,
            Outcome::DeadLettered,
            Outcome::Failed,
            Outcome::Expired,
        ] {
            let (bad, ends) = seen(outcome, b"");
            assert_eq!(found(&bad, &ends, strict), ["check"], "{outcome}");
        }
    }

    #[test]
    fn a_fault_is_forgiven_what_it_takes_by_its_nature() {
        let forgiven = Forgiven {
            sessions: true,
            dead_letters: true,
            undelivered: false,
            storage: true,
        };
        let (mut lost, ends) = seen(Outcome::SandboxLost, b"");
        assert_eq!(found(&lost, &ends, forgiven), ["check"]);
        lost.session = Some(0);
        assert_eq!(found(&lost, &ends, forgiven), [""; 0]);
        let (mut dead, mut ends) = seen(Outcome::DeadLettered, b"");
        assert_eq!(found(&dead, &ends, forgiven), ["check"]);
        dead.terminal.as_mut().unwrap().attempt = MAX_ATTEMPTS;
        ends.terminals[0].terminal.attempt = MAX_ATTEMPTS;
        assert_eq!(found(&dead, &ends, forgiven), [""; 0]);
        let (early, ends) = seen(Outcome::DeadLettered, b"");
        let undelivered = Forgiven {
            undelivered: true,
            ..forgiven
        };
        assert_eq!(found(&early, &ends, undelivered), [""; 0]);
        let (good, _) = seen(Outcome::Succeeded, b"5\n");
        assert_eq!(found(&good, &Ends::default(), forgiven), [""; 0]);
    }
}
