//! The terminals of sessions' tasks that ran here, for those that come again.
//!
//! A session's task cannot be run twice: the first run has changed the sandbox. Its message may
//! come again all the same, because an acknowledgement was lost, because the server forgot it,
//! or because the client lost patience. Then what it came to is said again, word for word.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use broker_schema::{Blob, Terminal};

use crate::jobs::JobKey;

const REMEMBERED: usize = 4096;
/// Output that is remembered, all terminals together.
const BYTES: usize = 32 << 20;

/// The latest terminals. Pure; one lock around it.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    known: HashMap<JobKey, Arc<Terminal>>,
    order: VecDeque<JobKey>,
    bytes: usize,
}

impl Answers {
    /// The first terminal of a task stays.
    pub(crate) fn remember(&mut self, key: &JobKey, terminal: &Arc<Terminal>) {
        if self.known.contains_key(key) {
            return;
        }
        self.bytes += size(terminal);
        self.known.insert(key.clone(), terminal.clone());
        self.order.push_back(key.clone());
        while self.order.len() > REMEMBERED || self.bytes > BYTES {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            if let Some(forgotten) = self.known.remove(&oldest) {
                self.bytes -= size(&forgotten);
            }
        }
    }

    pub(crate) fn of(&self, key: &JobKey) -> Option<Arc<Terminal>> {
        self.known.get(key).cloned()
    }
}

/// What a terminal holds, roughly.
fn size(terminal: &Terminal) -> usize {
    const ENVELOPE: usize = 512;
    let outputs = terminal
        .steps
        .iter()
        .flat_map(|step| [&step.stdout, &step.stderr]);
    let output = outputs
        .map(|output| ENVELOPE / 4 + output.head.len() + output.tail.as_ref().map_or(0, Blob::len));
    ENVELOPE + terminal.evidence.len() + output.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use broker_schema::{Output, StepResult, TaskId};

    use super::*;
    use crate::outcome::Finding;

    fn key() -> JobKey {
        JobKey {
            tenant: "t".parse().unwrap(),
            task: TaskId::new(),
            attempt: 0,
            epoch: broker_schema::Epoch::new(1, 1),
        }
    }

    fn terminal(output: usize) -> Arc<Terminal> {
        let placement = crate::testing::placement();
        let finding = Finding::new(broker_schema::Outcome::Succeeded, "");
        let mut terminal = crate::finish::terminal(&placement, finding, None, true);
        terminal.steps.push(StepResult {
            stdout: Output {
                head: Blob(vec![b'x'; output]),
                ..Output::default()
            },
            ..StepResult::default()
        });
        Arc::new(terminal)
    }

    #[test]
    fn the_first_terminal_is_the_answer() {
        let (mut answers, key) = (Answers::default(), key());
        assert!(answers.of(&key).is_none());
        let first = terminal(1);
        answers.remember(&key, &first);
        answers.remember(&key, &terminal(2));
        assert!(Arc::ptr_eq(&answers.of(&key).unwrap(), &first));
    }

    #[test]
    fn memory_is_bounded_by_count_and_by_bytes() {
        let (mut answers, first) = (Answers::default(), key());
        let small = terminal(1);
        answers.remember(&first, &small);
        for _ in 0..REMEMBERED {
            answers.remember(&key(), &small);
        }
        assert!(answers.of(&first).is_none());
        assert_eq!(answers.known.len(), REMEMBERED);
        let large = terminal(BYTES / 3);
        for _ in 0..5 {
            answers.remember(&key(), &large);
        }
        assert!(answers.bytes <= BYTES);
        assert_eq!(answers.known.len(), 2, "two and their envelopes fit");
    }
}
