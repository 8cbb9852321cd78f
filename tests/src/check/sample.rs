//! A history of one task, written by hand, in which nothing is wrong; tests break it.

use broker_schema::digest::sha256_hex;
use broker_schema::{Epoch, Frame, FrameKind, Terminal};
use remuda_telemetry::history::{Call, Event, Gate, Sum};
use serde_json::json;

use super::{Invariant, Promises, Violation};
use crate::history::{Ends, History, Line, StoredFrame, StoredTerminal};

pub(super) const TASK: &str = "01900000-0000-7000-8000-000000000001";
pub(super) const SANDBOX: &str = "01900000-0000-7000-8000-00000000000a";
pub(super) const OTHER_SANDBOX: &str = "01900000-0000-7000-8000-00000000000b";
pub(super) const EPOCH: u64 = (1 << 32) | 1;
pub(super) const PRINTED: &[u8] = b"hello\n";
const SECOND: u64 = 1_000_000_000;

/// A history under construction, one second from line to line.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) lines: Vec<Line>,
    pub(super) ends: Ends,
    pub(super) promises: Promises,
}

pub(super) fn claimed(attempt: u32, epoch: u64, sandbox: &str) -> Event {
    Event::Claimed {
        tenant: "t".into(),
        task: TASK.into(),
        attempt,
        limit: 4,
        sandbox: sandbox.into(),
        epoch,
        worker: "w".into(),
    }
}

pub(super) fn created(sandbox: &str) -> Event {
    Event::Created {
        sandbox: sandbox.into(),
        processes: 0,
        max_epoch: 0,
    }
}

pub(super) fn offered(sandbox: &str) -> Event {
    Event::Offered {
        sandbox: sandbox.into(),
    }
}

pub(super) fn adopted(tenant: &str, epoch: u64) -> Event {
    Event::Adopted {
        sandbox: SANDBOX.into(),
        epoch,
        worker: "w".into(),
        tenant: tenant.into(),
        task: TASK.into(),
        attempt: 1,
    }
}

pub(super) fn entered(epoch: u64, highest: u64, accepted: bool) -> Event {
    Event::Entered {
        sandbox: SANDBOX.into(),
        epoch,
        highest,
        call: Call::Execute,
        accepted,
        killed: 0,
    }
}

pub(super) fn put(digest: &str, gate: Gate) -> Event {
    Event::TerminalPut {
        tenant: "t".into(),
        task: TASK.into(),
        attempt: 1,
        outcome: "succeeded".into(),
        digest: digest.into(),
        gate,
    }
}

pub(super) fn read(tenant: &str, digest: &str) -> Event {
    Event::TerminalRead {
        tenant: tenant.into(),
        task: TASK.into(),
        attempt: 1,
        outcome: "succeeded".into(),
        digest: digest.into(),
    }
}

pub(super) fn terminal(frames: u64) -> Terminal {
    let output = json!({
        "bytes": PRINTED.len(), "sha256": sha256_hex(PRINTED),
    });
    serde_json::from_value(json!({
        "task": TASK, "tenant": "t", "run": "r", "pool": "p", "attempt": 1,
        "outcome": "succeeded", "attribution": "policy", "frames": frames,
        "steps": [{"exit": {"code": 0}, "stdout": output}],
        "sandbox": {"sandbox": SANDBOX, "worker": "w", "epoch": EPOCH},
    }))
    .unwrap()
}

pub(super) fn frame(n: u64, data: &[u8]) -> StoredFrame {
    StoredFrame {
        sequence: n + 1,
        tenant: "t".into(),
        task: TASK.into(),
        frame: Frame {
            attempt: 1,
            epoch: Epoch(EPOCH),
            n,
            step: 0,
            kind: FrameKind::Stdout,
            data: data.to_vec().into(),
            exit: None,
        },
    }
}

impl Sample {
    /// One task, one attempt, one command that printed six bytes in two frames.
    pub(super) fn clean() -> Self {
        let mut sample = Self {
            lines: Vec::new(),
            ends: Ends {
                at: 100 * SECOND,
                terminals: vec![StoredTerminal {
                    sequence: 1,
                    tenant: "t".into(),
                    task: TASK.into(),
                    digest: "d".into(),
                    terminal: terminal(2),
                }],
                frames: vec![frame(0, b"hel"), frame(1, b"lo\n")],
                leftovers: Vec::new(),
            },
            promises: Promises::default(),
        };
        let (tenant, task, sandbox) =
            (|| "t".to_owned(), || TASK.to_owned(), || SANDBOX.to_owned());
        let sum = sha256_hex(PRINTED);
        sample.add("w/1", created(SANDBOX));
        sample.add("w/1", offered(SANDBOX));
        sample.add(
            "c/1",
            Event::Submitted {
                tenant: tenant(),
                run: "r".into(),
                task: task(),
                request_digest: "q".into(),
            },
        );
        sample.add(
            "c/1",
            Event::Accepted {
                tenant: tenant(),
                task: task(),
                sequence: 1,
                duplicate: false,
            },
        );
        sample.add("d/1", claimed(1, EPOCH, SANDBOX));
        sample.add("w/1", adopted("t", EPOCH));
        sample.add(
            "w/1",
            Event::Operation {
                sandbox: sandbox(),
                epoch: EPOCH,
                worker: "w".into(),
                tenant: tenant(),
                task: task(),
                attempt: 1,
                step: 0,
                call: Call::Execute,
            },
        );
        sample.add("s/1", entered(EPOCH, 0, true));
        sample.add(
            "w/1",
            Event::CommandBegan {
                sandbox: sandbox(),
                task: task(),
                attempt: 1,
                step: 0,
                pid: 2,
                began: 7,
            },
        );
        sample.add(
            "s/1",
            Event::Wrote {
                sandbox: sandbox(),
                epoch: EPOCH,
                pid: 2,
                began: 7,
                stdout_bytes: PRINTED.len() as u64,
                stdout_sha256: sum.clone(),
                stderr_bytes: 0,
                stderr_sha256: String::new(),
                whole: true,
            },
        );
        sample.add(
            "w/1",
            Event::CommandEnded {
                sandbox: sandbox(),
                task: task(),
                attempt: 1,
                step: 0,
                pid: 2,
                began: 7,
            },
        );
        sample.add("w/1", put("d", Gate::Won));
        sample.add("c/1", read("t", "d"));
        sample.add(
            "c/1",
            Event::OutputRead {
                tenant: tenant(),
                task: task(),
                attempt: 1,
                streams: vec![Sum {
                    step: 0,
                    kind: "stdout".into(),
                    bytes: PRINTED.len() as u64,
                    sha256: sum,
                }],
            },
        );
        sample.add(
            "w/1",
            Event::Destroyed {
                sandbox: sandbox(),
                clean: true,
            },
        );
        sample.add("w/1", Event::Left);
        sample
    }

    /// Adds a line a second after the last.
    pub(super) fn add(&mut self, who: &str, event: Event) -> &mut Self {
        let number = self.lines.len() + 1;
        self.lines.push(Line {
            place: format!("sample:{number}"),
            at: self.lines.last().map_or(0, |line| line.at) + SECOND,
            who: who.into(),
            event,
        });
        self
    }

    /// Puts a line before the first for which `before` says so.
    pub(super) fn insert(&mut self, before: impl Fn(&Event) -> bool, event: Event) -> &mut Self {
        let index = self
            .lines
            .iter()
            .position(|line| before(&line.event))
            .expect("no such line");
        let at = self.lines[index].at;
        self.lines.insert(
            index,
            Line {
                place: format!("sample:before {}", index + 1),
                at,
                who: "x/1".into(),
                event,
            },
        );
        self
    }

    /// Drops the lines for which `which` says so; there must be one.
    pub(super) fn without(&mut self, which: impl Fn(&Event) -> bool) -> &mut Self {
        let before = self.lines.len();
        self.lines.retain(|line| !which(&line.event));
        assert!(self.lines.len() < before, "no such line");
        self
    }

    /// Changes the first line for which `change` says that it did.
    pub(super) fn change(&mut self, change: impl Fn(&mut Event) -> bool) -> &mut Self {
        let changed = self.lines.iter_mut().any(|line| change(&mut line.event));
        assert!(changed, "no such line");
        self
    }

    pub(super) fn check(&self) -> Vec<Violation> {
        let history = History::of(self.lines.clone());
        super::check(&history, &self.ends, &self.promises)
    }

    /// What is wrong with one invariant.
    pub(super) fn broken(&self, invariant: Invariant) -> Vec<String> {
        self.check()
            .into_iter()
            .filter(|violation| violation.invariant == invariant)
            .map(|violation| violation.what)
            .collect()
    }
}

#[test]
fn a_clean_history_has_no_violation() {
    assert_eq!(Sample::clean().check(), []);
}
