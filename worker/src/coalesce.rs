//! Decides what becomes a frame and when: pure, driven by the clock of its caller.
//!
//! Output is held back until 20 ms have gone by or 64 KiB have gathered. A task that ends before
//! that with little output sends no frame at all: its terminal carries everything.

use std::time::{Duration, Instant};

use broker_schema::{Blob, Epoch, ExitStatus, Frame, FrameKind};

use crate::output::WHOLE;

/// How long output waits for more.
pub(crate) const HOLD: Duration = Duration::from_millis(20);

/// The frames of one attempt that have not been taken, and the number of the next.
#[derive(Debug)]
pub(crate) struct Coalescer {
    attempt: u32,
    epoch: Epoch,
    next: u64,
    /// Whether a frame was taken: from then on everything goes into frames.
    started: bool,
    step: u32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// What is complete: output of steps that have ended, and their exits.
    sealed: Vec<(u32, Piece)>,
    total: u64,
    /// When the oldest byte that is held came in.
    since: Option<Instant>,
}

#[derive(Debug)]
enum Piece {
    Output(FrameKind, Vec<u8>),
    Exit(ExitStatus),
}

impl Coalescer {
    pub(crate) fn new(attempt: u32, epoch: Epoch) -> Self {
        Self {
            attempt,
            epoch,
            next: 0,
            started: false,
            step: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
            sealed: Vec::new(),
            total: 0,
            since: None,
        }
    }

    /// Frames that were taken so far.
    pub(crate) fn taken(&self) -> u64 {
        self.next
    }

    /// Takes in output of the current step; true when so much is held that it must go.
    pub(crate) fn push(&mut self, kind: FrameKind, data: &[u8], now: Instant) -> bool {
        if data.is_empty() {
            return false;
        }
        self.total += data.len() as u64;
        self.since.get_or_insert(now);
        let buffer = match kind {
            FrameKind::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        };
        buffer.extend_from_slice(data);
        self.stdout.len() + self.stderr.len() >= Frame::MAX_DATA
    }

    /// The current step has ended.
    pub(crate) fn end_step(&mut self, exit: ExitStatus, now: Instant) {
        self.seal();
        self.sealed.push((self.step, Piece::Exit(exit)));
        self.step += 1;
        if self.started {
            self.since.get_or_insert(now);
        }
    }

    /// When what is held must go, if nothing else happens.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + HOLD)
    }

    /// Everything that is held, as frames of at most [`Frame::MAX_DATA`].
    pub(crate) fn take(&mut self) -> Vec<Frame> {
        self.seal();
        self.since = None;
        let mut frames = Vec::new();
        for (step, piece) in std::mem::take(&mut self.sealed) {
            match piece {
                Piece::Output(kind, data) if data.len() <= Frame::MAX_DATA => {
                    frames.push(self.frame(step, kind, data, None));
                }
                Piece::Output(kind, data) => {
                    for part in data.chunks(Frame::MAX_DATA) {
                        frames.push(self.frame(step, kind, part.to_vec(), None));
                    }
                }
                Piece::Exit(exit) => {
                    frames.push(self.frame(step, FrameKind::Exit, Vec::new(), Some(exit)));
                }
            }
        }
        self.started |= !frames.is_empty();
        frames
    }

    /// The last frames of the attempt: none where the terminal can carry everything.
    pub(crate) fn finish(&mut self) -> Vec<Frame> {
        if self.started || self.total > WHOLE as u64 {
            self.take()
        } else {
            Vec::new()
        }
    }

    fn seal(&mut self) {
        for (kind, buffer) in [
            (FrameKind::Stdout, &mut self.stdout),
            (FrameKind::Stderr, &mut self.stderr),
        ] {
            if !buffer.is_empty() {
                let piece = Piece::Output(kind, std::mem::take(buffer));
                self.sealed.push((self.step, piece));
            }
        }
    }

    fn frame(
        &mut self,
        step: u32,
        kind: FrameKind,
        data: Vec<u8>,
        exit: Option<ExitStatus>,
    ) -> Frame {
        let n = self.next;
        self.next += 1;
        Frame {
            attempt: self.attempt,
            epoch: self.epoch,
            n,
            step,
            kind,
            data: Blob(data),
            exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn coalescer() -> Coalescer {
        Coalescer::new(1, Epoch::new(1, 1))
    }

    #[test]
    fn a_short_task_sends_no_frame() {
        let now = Instant::now();
        let mut short = coalescer();
        assert!(!short.push(FrameKind::Stdout, b"hello", now));
        short.end_step(ExitStatus::code(0), now);
        assert_eq!(short.finish(), []);
        assert_eq!(short.taken(), 0);
    }

    #[test]
    fn more_than_a_terminal_carries_becomes_frames_at_the_end() {
        let now = Instant::now();
        let mut long = coalescer();
        assert!(!long.push(FrameKind::Stdout, &vec![b'x'; WHOLE], now));
        assert!(!long.push(FrameKind::Stderr, b"y", now));
        long.end_step(ExitStatus::code(3), now);
        let kinds: Vec<FrameKind> = long.finish().iter().map(|frame| frame.kind).collect();
        assert_eq!(
            kinds,
            [FrameKind::Stdout, FrameKind::Stderr, FrameKind::Exit]
        );
    }

    #[test]
    fn output_waits_its_time_and_no_longer() {
        let now = Instant::now();
        let mut held = coalescer();
        assert_eq!(held.due(), None);
        held.push(FrameKind::Stdout, b"a", now);
        held.push(FrameKind::Stdout, b"b", now + HOLD / 2);
        assert_eq!(held.due(), Some(now + HOLD), "the oldest byte decides");
        assert_eq!(held.take().len(), 1);
        assert_eq!(held.due(), None);
        held.end_step(ExitStatus::code(0), now);
        assert_eq!(
            held.due(),
            Some(now + HOLD),
            "readers of frames want the exit"
        );
    }

    proptest! {
        #[test]
        fn frames_are_numbered_without_gaps_and_lose_nothing(
            events in prop::collection::vec(
                (any::<bool>(), 0_usize..150_000, any::<bool>(), any::<bool>()), 1..20),
        ) {
            let now = Instant::now();
            let mut under_test = coalescer();
            let mut wanted = std::collections::BTreeMap::<(u32, bool), Vec<u8>>::new();
            let mut frames = Vec::new();
            let mut step = 0;
            for (index, (stderr, size, take, end)) in events.into_iter().enumerate() {
                let data = vec![index as u8; size];
                let kind = if stderr { FrameKind::Stderr } else { FrameKind::Stdout };
                wanted.entry((step, stderr)).or_default().extend(&data);
                if under_test.push(kind, &data, now) || take {
                    frames.extend(under_test.take());
                }
                if end {
                    under_test.end_step(ExitStatus::code(step as i32), now);
                    step += 1;
                }
            }
            frames.extend(under_test.finish());
            if frames.is_empty() {
                let total: usize = wanted.values().map(Vec::len).sum();
                prop_assert!(total <= WHOLE);
                return Ok(());
            }
            let mut got = std::collections::BTreeMap::<(u32, bool), Vec<u8>>::new();
            let mut exits = Vec::new();
            for (index, frame) in frames.iter().enumerate() {
                prop_assert_eq!(frame.n, index as u64);
                prop_assert!(frame.data.len() <= Frame::MAX_DATA);
                match frame.kind {
                    FrameKind::Exit => exits.push(frame.step),
                    kind => got.entry((frame.step, kind == FrameKind::Stderr))
                        .or_default().extend(&frame.data.0),
                }
            }
            wanted.retain(|_, data| !data.is_empty());
            prop_assert_eq!(got, wanted);
            prop_assert_eq!(exits, (0..step).collect::<Vec<_>>());
            prop_assert_eq!(under_test.taken(), frames.len() as u64);
        }
    }
}
