//! I5: what a reader gets for the winning attempt is the sidecar's output, byte for byte.
//!
//! Four accounts of the same bytes are compared: what the sidecar passed on, what the terminal
//! says, what RES holds, and what the reader read.

use std::collections::{BTreeMap, BTreeSet};

use broker_schema::digest::Running;
use broker_schema::{FrameKind, Output};
use remuda_telemetry::history::{Event, Sum};

use super::{Invariant, Promises, Violation};
use crate::history::{Ends, History, Line, StoredFrame, StoredTerminal};

pub(super) fn check(history: &History, ends: &Ends, promises: &Promises) -> Vec<Violation> {
    let commands = Commands::of(history);
    let mut frames: BTreeMap<(&str, &str), Vec<&StoredFrame>> = BTreeMap::new();
    for frame in &ends.frames {
        let key = (frame.tenant.as_str(), frame.task.as_str());
        frames.entry(key).or_default().push(frame);
    }
    let mut found = Vec::new();
    for terminal in &ends.terminals {
        let key = (terminal.tenant.as_str(), terminal.task.as_str());
        found.extend(written(terminal, &commands));
        // Frames of an attempt that was under way when the storage was lost are lost with it.
        let whole = commands
            .first(terminal)
            .is_none_or(|at| promises.stretch(at) == promises.stretch(ends.at));
        if whole {
            let frames = frames.get(&key).map_or(&[][..], Vec::as_slice);
            found.extend(stored(terminal, frames));
        }
    }
    found.extend(read(history, ends, promises));
    found
}

fn violation(task: &str, what: impl Into<String>) -> Violation {
    Violation::new(Invariant::I5, format!("task {task}"), what)
}

/// The account of one output stream: bytes and digest.
type Account<'a> = (u64, &'a str);

fn account(output: &Output) -> Account<'_> {
    (
        output.bytes.saturating_sub(output.dropped),
        output.sha256.as_str(),
    )
}

/// Both streams of all steps of a terminal that have any bytes.
fn told(terminal: &StoredTerminal) -> BTreeMap<(u32, &'static str), Account<'_>> {
    let mut told = BTreeMap::new();
    for (step, result) in (0..).zip(&terminal.terminal.steps) {
        for (kind, output) in [("stdout", &result.stdout), ("stderr", &result.stderr)] {
            if account(output).0 > 0 {
                told.insert((step, kind), account(output));
            }
        }
    }
    told
}

/// A command, named by its sandbox, its process and when it began.
type Command<'a> = (&'a str, i32, u64);

type Began<'a> = (Command<'a>, &'a Line);

struct Commands<'a> {
    /// By task, attempt and step.
    began: BTreeMap<(&'a str, u32, u32), Vec<Began<'a>>>,
    ended: BTreeMap<Command<'a>, &'a Line>,
    wrote: BTreeMap<Command<'a>, &'a Line>,
    /// Attempts of which a worker recorded anything, by task, attempt and sandbox.
    run: BTreeSet<(&'a str, u32, &'a str)>,
}

impl<'a> Commands<'a> {
    fn of(history: &'a History) -> Self {
        let mut commands = Self {
            began: BTreeMap::new(),
            ended: BTreeMap::new(),
            wrote: BTreeMap::new(),
            run: BTreeSet::new(),
        };
        for line in history.iter() {
            match &line.event {
                Event::Operation {
                    sandbox,
                    task,
                    attempt,
                    ..
                } => {
                    commands.run.insert((task, *attempt, sandbox));
                }
                Event::CommandBegan {
                    sandbox,
                    task,
                    attempt,
                    step,
                    pid,
                    began,
                } => {
                    let command = (sandbox.as_str(), *pid, *began);
                    let key = (task.as_str(), *attempt, *step);
                    commands.began.entry(key).or_default().push((command, line));
                }
                Event::CommandEnded {
                    sandbox,
                    pid,
                    began,
                    ..
                } => {
                    commands.ended.insert((sandbox, *pid, *began), line);
                }
                Event::Wrote {
                    sandbox,
                    pid,
                    began,
                    ..
                } => {
                    commands.wrote.insert((sandbox, *pid, *began), line);
                }
                _ => {}
            }
        }
        commands
    }

    /// When the first command of a terminal's attempt began.
    fn first(&self, terminal: &StoredTerminal) -> Option<u64> {
        let (task, attempt) = (terminal.task.as_str(), terminal.terminal.attempt);
        self.began
            .range((task, attempt, 0)..=(task, attempt, u32::MAX))
            .flat_map(|(_, began)| began)
            .map(|(_, line)| line.at)
            .min()
    }
}

/// The terminal against the sidecar's log.
fn written(terminal: &StoredTerminal, commands: &Commands<'_>) -> Vec<Violation> {
    let mut found = Vec::new();
    let task = terminal.task.as_str();
    let Some(sandbox) = &terminal.terminal.sandbox else {
        return found;
    };
    let sandbox = sandbox.sandbox.to_string();
    let run = (task, terminal.terminal.attempt, sandbox.as_str());
    if !told(terminal).is_empty() && !commands.run.contains(&run) {
        let what = "has output of a sandbox in which, by the histories, it never ran";
        return vec![violation(task, what)];
    }
    for (step, result) in (0..).zip(&terminal.terminal.steps) {
        let key = (task, terminal.terminal.attempt, step);
        let began = commands.began.get(&key).map_or(&[][..], Vec::as_slice);
        // The same attempt somewhere else is not this terminal's.
        let here = began.iter().rfind(|(command, _)| command.0 == sandbox);
        let Some((command, began)) = here else {
            continue;
        };
        let ended = commands.ended.get(command);
        let Some(log) = commands.wrote.get(command) else {
            if ended.is_some() {
                let what = format!("step {step}: its sidecar recorded no output");
                found.push(violation(task, what).shown_by([*began]));
            }
            continue;
        };
        let Event::Wrote {
            stdout_bytes,
            stdout_sha256,
            stderr_bytes,
            stderr_sha256,
            ..
        } = &log.event
        else {
            continue;
        };
        for (kind, told, wrote) in [
            (
                "stdout",
                account(&result.stdout),
                (*stdout_bytes, stdout_sha256.as_str()),
            ),
            (
                "stderr",
                account(&result.stderr),
                (*stderr_bytes, stderr_sha256.as_str()),
            ),
        ] {
            // One that was cut short was heard up to somewhere.
            let right = match ended {
                Some(_) => told == wrote,
                None => told.0 <= wrote.0,
            };
            if !right {
                let what = format!(
                    "step {step} {kind}: its terminal has {} bytes ({}), the sidecar wrote {} ({})",
                    told.0, told.1, wrote.0, wrote.1
                );
                found.push(violation(task, what).shown_by([*began, *log]));
            }
        }
    }
    found
}

/// What RES holds against the terminal.
fn stored(terminal: &StoredTerminal, frames: &[&StoredFrame]) -> Vec<Violation> {
    let (task, wanted) = (terminal.task.as_str(), terminal.terminal.frames);
    if wanted == 0 {
        return Vec::new();
    }
    let mut by_number: BTreeMap<u64, &StoredFrame> = BTreeMap::new();
    for stored in frames {
        if !stored.frame.is_of(&terminal.terminal) {
            continue;
        }
        let first = *by_number.entry(stored.frame.n).or_insert(*stored);
        if first.frame != stored.frame {
            let what = format!(
                "frame {} of attempt {} is stored as {} and, with other content, as {}",
                stored.frame.n, stored.frame.attempt, first.sequence, stored.sequence
            );
            return vec![violation(task, what)];
        }
    }
    if let Some(missing) = (0..wanted).find(|n| !by_number.contains_key(n)) {
        let what = format!("frame {missing} of {wanted} is not stored");
        return vec![violation(task, what)];
    }
    let mut sums: BTreeMap<(u32, &'static str), (u64, Running)> = BTreeMap::new();
    for stored in by_number.range(..wanted).map(|(_, stored)| stored) {
        let kind = match stored.frame.kind {
            FrameKind::Stdout => "stdout",
            FrameKind::Stderr => "stderr",
            _ => continue,
        };
        let sum = sums.entry((stored.frame.step, kind)).or_default();
        sum.0 += stored.frame.data.len() as u64;
        sum.1.update(stored.frame.data.as_slice());
    }
    let sums = sums
        .into_iter()
        .map(|(key, (bytes, digest))| (key, (bytes, digest.finish())))
        .filter(|(_, (bytes, _))| *bytes > 0)
        .collect::<BTreeMap<_, _>>();
    let told = told(terminal);
    let same = sums.len() == told.len()
        && sums.iter().all(|(key, (bytes, digest))| {
            told.get(key).is_some_and(|told| *told == (*bytes, digest))
        });
    if same {
        return Vec::new();
    }
    let what = format!("its frames add up to {sums:?}, its terminal says {told:?}");
    vec![violation(task, what)]
}

/// What readers read against the terminal.
fn read(history: &History, ends: &Ends, promises: &Promises) -> Vec<Violation> {
    let mut found = Vec::new();
    for line in history.iter() {
        // The terminal at the end may be another one than was read before.
        if promises.stretch(line.at) != promises.stretch(ends.at) {
            continue;
        }
        match &line.event {
            Event::OutputDamaged { task, detail, .. } if promises.storage_lost.is_empty() => {
                let what = format!("its reader got other output: {detail}");
                found.push(violation(task, what).shown_by([line]));
            }
            Event::OutputRead {
                tenant,
                task,
                attempt,
                streams,
            } => {
                let terminal = ends
                    .terminals
                    .iter()
                    .find(|terminal| terminal.tenant == *tenant && terminal.task == *task);
                let Some(terminal) = terminal else { continue };
                let told = told(terminal);
                let same = |sum: &Sum| {
                    told.iter().any(|((step, kind), told)| {
                        (*step, *kind) == (sum.step, sum.kind.as_str())
                            && *told == (sum.bytes, sum.sha256.as_str())
                    })
                };
                let attempts = terminal.terminal.attempt;
                let right =
                    *attempt == attempts && streams.len() == told.len() && streams.iter().all(same);
                if !right {
                    let what = format!(
                        "attempt {attempt} was read, its terminal is of attempt {attempts} and \
                         says {told:?}"
                    );
                    found.push(violation(task, what).shown_by([line]));
                }
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{Sample, frame, terminal};

    fn only(sample: &Sample) -> String {
        let mut broken = sample.broken(Invariant::I5);
        assert_eq!(broken.len(), 1, "{broken:#?}");
        broken.remove(0)
    }

    #[test]
    fn the_sidecar_wrote_something_else() {
        let mut sample = Sample::clean();
        sample.change(|event| match event {
            Event::Wrote { stdout_sha256, .. } => {
                *stdout_sha256 = "other".into();
                true
            }
            _ => false,
        });
        assert!(only(&sample).contains("the sidecar wrote 6 (other)"));
    }

    #[test]
    fn output_that_was_cut_short_may_be_less_but_not_more() {
        let longer = |bytes| {
            let mut sample = Sample::clean();
            sample.without(|event| matches!(event, Event::CommandEnded { .. }));
            sample.change(|event| match event {
                Event::Wrote { stdout_bytes, .. } => {
                    *stdout_bytes = bytes;
                    true
                }
                _ => false,
            });
            sample
        };
        assert!(longer(9).broken(Invariant::I5).is_empty());
        assert!(only(&longer(5)).contains("stdout"));
    }

    #[test]
    fn a_sidecar_that_recorded_nothing() {
        let mut sample = Sample::clean();
        sample.without(|event| matches!(event, Event::Wrote { .. }));
        assert!(only(&sample).contains("recorded no output"));
    }

    #[test]
    fn frames_that_are_missing_doubled_or_damaged() {
        let mut sample = Sample::clean();
        sample.ends.frames.remove(1);
        assert_eq!(only(&sample), "frame 1 of 2 is not stored");
        // It was under way when everything was lost.
        sample.promises.storage_lost = vec![9_500_000_000];
        assert!(sample.broken(Invariant::I5).is_empty());

        let mut sample = Sample::clean();
        sample.ends.frames.push(frame(1, b"lo\n"));
        assert!(sample.broken(Invariant::I5).is_empty());
        sample.ends.frames.push(frame(1, b"LO\n"));
        assert!(only(&sample).contains("with other content"));

        let mut sample = Sample::clean();
        sample.ends.frames[1] = frame(1, b"LO\n");
        assert!(only(&sample).starts_with("its frames add up to"));
    }

    #[test]
    fn frames_of_another_attempt_are_no_part_of_it() {
        let mut sample = Sample::clean();
        let mut other = frame(0, b"something else");
        other.frame.attempt = 2;
        sample.ends.frames.push(other);
        assert!(sample.broken(Invariant::I5).is_empty());
    }

    #[test]
    fn a_reader_read_something_else() {
        let mut sample = Sample::clean();
        sample.change(|event| match event {
            Event::OutputRead { streams, .. } => {
                streams[0].bytes = 5;
                true
            }
            _ => false,
        });
        assert!(only(&sample).starts_with("attempt 1 was read"));
        let mut sample = Sample::clean();
        sample.add(
            "c/1",
            Event::OutputDamaged {
                tenant: "t".into(),
                task: sample.ends.terminals[0].task.clone(),
                detail: "5 bytes, expected 6".into(),
            },
        );
        assert!(only(&sample).contains("5 bytes, expected 6"));
    }

    #[test]
    fn output_of_an_attempt_that_nobody_saw() {
        let mut sample = Sample::clean();
        sample.without(|event| matches!(event, Event::Operation { .. }));
        assert!(only(&sample).ends_with("it never ran"));
    }

    #[test]
    fn a_terminal_that_carries_its_output_needs_no_frames() {
        let mut sample = Sample::clean();
        sample.ends.frames.clear();
        sample.ends.terminals[0].terminal = terminal(0);
        assert!(sample.broken(Invariant::I5).is_empty());
    }
}
