//! What the terminal says of one output stream: beginning, end, count, digest.

use std::collections::VecDeque;

use broker_schema::digest::Running;
use broker_schema::{Blob, Output, StepResult};

/// Up to here all that was kept stands in `head`.
pub(crate) const WHOLE: usize = 32 * 1024;
/// Beyond it, this much of the beginning and of the end.
pub(crate) const ENDS: usize = 16 * 1024;
/// Output of one terminal, all steps together.
pub(crate) const TERMINAL_OUTPUT: usize = 384 * 1024;

/// Takes in a stream piece by piece in bounded memory.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    head: Vec<u8>,
    /// The last [`ENDS`] bytes, once there are more than [`WHOLE`].
    tail: VecDeque<u8>,
    kept: u64,
    digest: Running,
}

impl Tally {
    pub(crate) fn push(&mut self, data: &[u8]) {
        self.digest.update(data);
        self.kept += data.len() as u64;
        let room = WHOLE - self.head.len();
        let (first, rest) = data.split_at(room.min(data.len()));
        self.head.extend_from_slice(first);
        if !rest.is_empty() {
            if self.tail.is_empty() {
                let ours = self.head[WHOLE - ENDS..].iter();
                self.tail.extend(ours);
            }
            let last = &rest[rest.len().saturating_sub(ENDS)..];
            let too_many = (self.tail.len() + last.len()).saturating_sub(ENDS);
            self.tail.drain(..too_many);
            self.tail.extend(last);
        }
    }

    /// `dropped` is what the sidecar says it left out.
    pub(crate) fn finish(mut self, dropped: u64) -> Output {
        let tail = (self.kept > WHOLE as u64).then(|| {
            self.head.truncate(ENDS);
            Blob(self.tail.into())
        });
        Output {
            bytes: self.kept.saturating_add(dropped),
            dropped,
            sha256: self.digest.finish(),
            head: Blob(self.head),
            tail,
        }
    }
}

/// Cuts heads and tails until all steps together fit into one terminal. What is cut is in the
/// frames, and the count and the digest stay.
pub(crate) fn fit(steps: &mut [StepResult]) {
    let size = |output: &Output| output.head.len() + output.tail.as_ref().map_or(0, Blob::len);
    let streams = |steps: &[StepResult]| -> Vec<usize> {
        let both = steps.iter().flat_map(|step| [&step.stdout, &step.stderr]);
        both.map(size).filter(|size| *size > 0).collect()
    };
    let sizes = streams(steps);
    if sizes.iter().sum::<usize>() <= TERMINAL_OUTPUT {
        return;
    }
    let share = TERMINAL_OUTPUT / sizes.len();
    for step in steps {
        for output in [&mut step.stdout, &mut step.stderr] {
            if size(output) > share {
                cut(output, share / 2);
            }
        }
    }
}

/// Leaves `most` bytes of the beginning and of the end each.
fn cut(output: &mut Output, most: usize) {
    let end = output.tail.take().unwrap_or_else(|| output.head.clone());
    let from = end.len().saturating_sub(most);
    output.tail = Some(Blob(end.0[from..].to_vec()));
    output.head.0.truncate(most);
    output.head.0.shrink_to_fit();
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::digest::sha256_hex;
    use proptest::prelude::*;

    fn tallied(pieces: &[Vec<u8>]) -> Output {
        let mut tally = Tally::default();
        for piece in pieces {
            tally.push(piece);
        }
        tally.finish(7)
    }

    proptest! {
        #[test]
        fn however_it_comes_the_result_is_that_of_the_whole(
            pieces in prop::collection::vec(
                prop::collection::vec(any::<u8>(), 0..20_000), 0..8),
        ) {
            let whole = pieces.concat();
            let output = tallied(&pieces);
            prop_assert_eq!(output.bytes, whole.len() as u64 + 7);
            prop_assert_eq!(output.dropped, 7);
            if whole.is_empty() {
                prop_assert_eq!(&output.sha256, "");
            } else {
                prop_assert_eq!(&output.sha256, &sha256_hex(&whole));
            }
            if whole.len() <= WHOLE {
                prop_assert_eq!(output.whole(), Some(whole.as_slice()));
            } else {
                prop_assert_eq!(output.head.as_slice(), &whole[..ENDS]);
                let tail = output.tail.unwrap();
                prop_assert_eq!(tail.as_slice(), &whole[whole.len() - ENDS..]);
            }
        }

        #[test]
        fn a_terminal_stays_within_its_size(
            sizes in prop::collection::vec(0_usize..80_000, 0..60),
        ) {
            let mut steps: Vec<StepResult> = sizes.iter().map(|size| {
                let bytes: Vec<u8> = (0..*size).map(|at| at as u8).collect();
                StepResult { stdout: tallied(&[bytes]), ..StepResult::default() }
            }).collect();
            let before = steps.clone();
            fit(&mut steps);
            let total: usize = steps.iter()
                .map(|step| step.stdout.head.len() + step.stdout.tail.as_ref().map_or(0, Blob::len))
                .sum();
            prop_assert!(total <= TERMINAL_OUTPUT, "{}", total);
            for (after, before) in steps.iter().zip(&before) {
                prop_assert_eq!(after.stdout.bytes, before.stdout.bytes);
                prop_assert!(before.stdout.head.0.starts_with(&after.stdout.head.0));
                if after != before {
                    prop_assert!(after.stdout.whole().is_none(), "a cut stream is not whole");
                }
            }
        }
    }
}
