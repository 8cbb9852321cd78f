//! The part of a history that only debug builds have: the file and the clock.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::{Event, History, Record, now};

static PROCESS: OnceLock<History> = OnceLock::new();

/// An open history.
#[derive(Debug)]
pub(super) struct Log {
    who: String,
    file: File,
}

impl Log {
    pub(super) fn append(&self, event: Event) {
        let record = Record {
            at: now(),
            who: self.who.clone(),
            event,
        };
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                (&self.file).write_all(&line)
            });
        if let Err(error) = written {
            // A history with holes would be judged as if it were whole.
            tracing::error!(%error, "the history cannot be written, ending");
            std::process::abort();
        }
    }
}

impl History {
    /// Appends to a file, under the name of `what` and this process's id.
    pub fn to_file(path: &Path, what: &str) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            log: Some(Arc::new(Log {
                who: format!("{what}/{}", std::process::id()),
                file,
            })),
        })
    }

    /// The file, for a process that is to write into it too.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.log.as_ref().map(|log| log.file.as_fd())
    }

    /// Makes this the history of the process. The first one stays.
    pub fn install(self) {
        let _ = PROCESS.set(self);
    }
}

pub(super) fn process() -> History {
    PROCESS.get().cloned().unwrap_or_default()
}

pub(super) fn with_process(use_it: impl FnOnce(&History)) {
    if let Some(history) = PROCESS.get() {
        use_it(history);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Gate;

    #[test]
    fn every_line_is_whole_whoever_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("h.jsonl");
        let event = |attempt| Event::TerminalPut {
            tenant: "t".into(),
            task: "x".repeat(200),
            attempt,
            outcome: "succeeded".into(),
            digest: String::new(),
            gate: Gate::Won,
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let history = History::to_file(&path, "test").unwrap();
                scope.spawn(move || {
                    for attempt in 0..500 {
                        history.record(|| event(attempt));
                    }
                });
            }
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let records: Vec<Record> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(records.len(), 2000);
        assert!(records.iter().all(|record| record.at > 0));
        assert!(records[0].who.starts_with("test/"));
    }

    #[test]
    fn nothing_is_made_for_nowhere() {
        History::default().record(|| panic!("made"));
    }
}
