//! Frames to output: ordered, without repeats, one attempt at a time. Pure.

use std::collections::{BTreeMap, HashMap};

use broker_schema::digest::Running;
use broker_schema::{Epoch, ExitStatus, Frame, FrameKind, Output, Terminal};

/// Frames that are kept while an earlier one is missing; what comes beyond is
/// read again later. 64 KiB each.
const MAX_HELD: usize = 128;

/// What a reader of a task's output gets.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputEvent {
    /// Some output of a step. `kind` is stdout or stderr.
    Output {
        step: u32,
        kind: FrameKind,
        bytes: Vec<u8>,
    },
    /// A step ended.
    StepExit { step: u32, exit: ExitStatus },
    /// Everything before this is replaced by what follows: another attempt, or
    /// a second reading of the same.
    Reset { attempt: u32 },
    /// The task ended, and all of its output came before this.
    Done(Box<Terminal>),
}

/// Puts the frames of a task in order.
#[derive(Debug, Default)]
pub(crate) struct Reassembler {
    run: Run,
    next: u64,
    held: BTreeMap<u64, Frame>,
    sums: HashMap<(u32, FrameKind), Sum>,
    emitted: bool,
}

/// Which run of the task the frames are of. A Redis that was flushed counts attempts from the
/// beginning, under a higher epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    attempt: u32,
    epoch: Epoch,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            attempt: 0,
            epoch: Epoch(0),
        }
    }
}

impl Run {
    /// A terminal without a lease leaves the epoch open: `otherwise`.
    fn of(terminal: &Terminal, otherwise: Epoch) -> Self {
        let lease = terminal.sandbox.as_ref();
        Self {
            attempt: terminal.attempt,
            epoch: lease.map_or(otherwise, |lease| lease.epoch),
        }
    }
}

#[derive(Debug, Default)]
struct Sum {
    bytes: u64,
    digest: Running,
}

impl Reassembler {
    /// Takes a frame, whenever and however often it comes, and appends what
    /// can be told now.
    pub(crate) fn push(&mut self, frame: Frame, events: &mut impl Extend<OutputEvent>) {
        let run = Run {
            attempt: frame.attempt,
            epoch: frame.epoch,
        };
        if run < self.run {
            return;
        }
        if run > self.run {
            self.begin(run, events);
        }
        if frame.n < self.next {
            return;
        }
        if frame.n > self.next {
            if self.held.len() < MAX_HELD {
                self.held.entry(frame.n).or_insert(frame);
            }
            return;
        }
        self.emit(frame, events);
        while let Some(frame) = self.held.remove(&self.next) {
            self.emit(frame, events);
        }
    }

    /// Forgets everything and begins with the terminal's attempt anew.
    pub(crate) fn restart(&mut self, terminal: &Terminal, events: &mut impl Extend<OutputEvent>) {
        self.begin(Run::of(terminal, Epoch(0)), events);
    }

    fn begin(&mut self, run: Run, events: &mut impl Extend<OutputEvent>) {
        if self.emitted {
            events.extend([OutputEvent::Reset {
                attempt: run.attempt,
            }]);
        }
        *self = Self {
            run,
            ..Self::default()
        };
    }

    /// Whether later frames wait for a missing one.
    pub(crate) fn has_gap(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether these are all frames of the terminal's attempt.
    pub(crate) fn complete(&self, terminal: &Terminal) -> bool {
        self.run == Run::of(terminal, self.run.epoch) && self.next == terminal.frames
    }

    /// Whether it has begun with what comes after the terminal's attempt: frames of that would
    /// be passed over.
    pub(crate) fn is_past(&self, terminal: &Terminal) -> bool {
        self.run > Run::of(terminal, self.run.epoch)
    }

    fn emit(&mut self, frame: Frame, events: &mut impl Extend<OutputEvent>) {
        self.next += 1;
        self.emitted = true;
        if frame.kind == FrameKind::Exit {
            events.extend([OutputEvent::StepExit {
                step: frame.step,
                exit: frame.exit.unwrap_or_default(),
            }]);
            return;
        }
        let sum = self.sums.entry((frame.step, frame.kind)).or_default();
        sum.bytes += frame.data.len() as u64;
        sum.digest.update(frame.data.as_slice());
        events.extend([OutputEvent::Output {
            step: frame.step,
            kind: frame.kind,
            bytes: frame.data.0,
        }]);
    }

    /// Appends the output of a task that sent no frames: its terminal has it.
    pub(crate) fn emit_terminal(
        &mut self,
        terminal: &Terminal,
        events: &mut impl Extend<OutputEvent>,
    ) {
        self.restart(terminal, events);
        for (step, result) in (0u32..).zip(&terminal.steps) {
            for (kind, output) in [
                (FrameKind::Stdout, &result.stdout),
                (FrameKind::Stderr, &result.stderr),
            ] {
                if !output.head.is_empty() {
                    self.emit(
                        Frame {
                            attempt: terminal.attempt,
                            epoch: self.run.epoch,
                            n: 0,
                            step,
                            kind,
                            data: output.head.clone(),
                            exit: None,
                        },
                        events,
                    );
                }
            }
            events.extend([OutputEvent::StepExit {
                step,
                exit: result.exit,
            }]);
        }
    }

    /// Compares what was emitted with what the terminal says it adds up to;
    /// the error says where it does not.
    pub(crate) fn verify(&mut self, terminal: &Terminal) -> Result<(), String> {
        let mut sums = std::mem::take(&mut self.sums);
        for (step, result) in (0u32..).zip(&terminal.steps) {
            for (kind, output) in [
                (FrameKind::Stdout, &result.stdout),
                (FrameKind::Stderr, &result.stderr),
            ] {
                let sum = sums.remove(&(step, kind)).unwrap_or_default();
                check(sum, output).map_err(|problem| format!("step {step} {kind:?}: {problem}"))?;
            }
        }
        match sums.keys().next() {
            Some((step, kind)) => Err(format!(
                "step {step} {kind:?}: has output, the terminal has {} steps",
                terminal.steps.len()
            )),
            None => Ok(()),
        }
    }
}

fn check(sum: Sum, output: &Output) -> Result<(), String> {
    let expected = output.bytes.saturating_sub(output.dropped);
    if sum.bytes != expected {
        return Err(format!("{} bytes, expected {expected}", sum.bytes));
    }
    let digest = sum.digest.finish();
    if digest == output.sha256 {
        Ok(())
    } else {
        Err(format!("digest {digest}, expected {}", output.sha256))
    }
}

#[cfg(test)]
#[path = "reassemble_tests.rs"]
mod tests;
