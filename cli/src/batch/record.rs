//! One line of a batch's results.

use broker_schema::{
    Attribution, Blob, ErrorInfo, ExitStatus, Outcome, Output, StepResult, TaskId, Terminal, Times,
};
use serde::Serialize;

/// What became of one task.
#[derive(Debug, Serialize)]
pub(crate) struct ResultLine {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tag: Option<String>,
    pub(crate) task: TaskId,
    /// None where no terminal could be had; `error` tells why.
    pub(crate) outcome: Option<Outcome>,
    pub(crate) attribution: Option<Attribution>,
    pub(crate) exit: Option<ExitStatus>,
    /// What all steps wrote, one after the other.
    pub(crate) stdout: Blob,
    pub(crate) stderr: Blob,
    /// Bytes that all steps wrote, and how many of them were beyond the limit.
    pub(crate) stdout_bytes: u64,
    pub(crate) stdout_dropped: u64,
    pub(crate) stderr_bytes: u64,
    pub(crate) stderr_dropped: u64,
    /// Bytes that were written and are not in `stdout`: beyond the limit, or
    /// between its beginning and its end.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) stdout_omitted: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) stderr_omitted: u64,
    pub(crate) error: Option<ErrorInfo>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) evidence: String,
    pub(crate) attempt: u32,
    /// When the task came to where; absent where there was no terminal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) times: Option<Times>,
    #[serde(flatten)]
    pub(crate) split: Split,
}

/// Where a task's time went, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[expect(
    clippy::struct_field_names,
    reason = "the unit is part of the name on the wire"
)]
pub(crate) struct Split {
    /// Published to claimed.
    pub(crate) queued_ms: Option<f64>,
    /// Claimed to its first step.
    pub(crate) sandbox_ms: Option<f64>,
    /// Its first step to its terminal.
    pub(crate) run_ms: Option<f64>,
    pub(crate) total_ms: Option<f64>,
}

/// The same in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Micros {
    pub(crate) queued: Option<u64>,
    pub(crate) sandbox: Option<u64>,
    pub(crate) run: Option<u64>,
    pub(crate) total: u64,
}

impl Micros {
    pub(crate) fn of(times: &Times) -> Self {
        let between = |from: broker_schema::Timestamp, to: broker_schema::Timestamp| {
            u64::try_from(to.since(from).as_micros()).unwrap_or(u64::MAX)
        };
        Self {
            queued: times.dispatched.map(|at| between(times.queued, at)),
            sandbox: times
                .dispatched
                .zip(times.started)
                .map(|(from, to)| between(from, to)),
            run: times.started.map(|from| between(from, times.finished)),
            total: between(times.queued, times.finished),
        }
    }

    fn split(self) -> Split {
        let millis = |micros: u64| micros as f64 / 1e3;
        Split {
            queued_ms: self.queued.map(millis),
            sandbox_ms: self.sandbox.map(millis),
            run_ms: self.run.map(millis),
            total_ms: Some(millis(self.total)),
        }
    }
}

impl ResultLine {
    pub(crate) fn of(tag: Option<String>, terminal: &Terminal) -> Self {
        let stdout = Gathered::of(&terminal.steps, |step| &step.stdout);
        let stderr = Gathered::of(&terminal.steps, |step| &step.stderr);
        Self {
            tag,
            task: terminal.task,
            outcome: Some(terminal.outcome),
            attribution: Some(terminal.attribution),
            exit: terminal.exit,
            stdout_bytes: stdout.written,
            stdout_dropped: stdout.dropped,
            stderr_bytes: stderr.written,
            stderr_dropped: stderr.dropped,
            stdout_omitted: stdout.omitted(),
            stderr_omitted: stderr.omitted(),
            stdout: stdout.bytes.into(),
            stderr: stderr.bytes.into(),
            error: terminal.error.clone(),
            evidence: terminal.evidence.clone(),
            attempt: terminal.attempt,
            times: Some(terminal.times),
            split: Micros::of(&terminal.times).split(),
        }
    }

    /// For a task whose terminal could not be had.
    pub(crate) fn without_terminal(tag: Option<String>, task: TaskId, error: ErrorInfo) -> Self {
        Self {
            tag,
            task,
            outcome: None,
            attribution: None,
            exit: None,
            stdout: Blob::default(),
            stderr: Blob::default(),
            stdout_bytes: 0,
            stdout_dropped: 0,
            stderr_bytes: 0,
            stderr_dropped: 0,
            stdout_omitted: 0,
            stderr_omitted: 0,
            error: Some(error),
            evidence: String::new(),
            attempt: 0,
            times: None,
            split: Split {
                queued_ms: None,
                sandbox_ms: None,
                run_ms: None,
                total_ms: None,
            },
        }
    }
}

/// One stream of all steps.
struct Gathered {
    /// All that the terminal carries of it.
    bytes: Vec<u8>,
    written: u64,
    /// Beyond the limit.
    dropped: u64,
}

impl Gathered {
    fn of(steps: &[StepResult], stream: impl Fn(&StepResult) -> &Output) -> Self {
        let mut all = Self {
            bytes: Vec::new(),
            written: 0,
            dropped: 0,
        };
        for output in steps.iter().map(stream) {
            all.bytes.extend_from_slice(output.head.as_slice());
            if let Some(tail) = &output.tail {
                all.bytes.extend_from_slice(tail.as_slice());
            }
            all.written = all.written.saturating_add(output.bytes);
            all.dropped = all.dropped.saturating_add(output.dropped);
        }
        all
    }

    fn omitted(&self) -> u64 {
        self.written.saturating_sub(self.bytes.len() as u64)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use broker_schema::Timestamp;
    use serde_json::json;

    use super::*;

    fn terminal() -> Terminal {
        let output = |bytes, head: &str, tail: Option<&str>| Output {
            bytes,
            head: head.into(),
            tail: tail.map(Blob::from),
            ..Output::default()
        };
        Terminal {
            task: TaskId::new(),
            tenant: "t".parse().unwrap(),
            run: "r".parse().unwrap(),
            pool: "p".parse().unwrap(),
            group: None,
            request_digest: String::new(),
            attempt: 1,
            outcome: Outcome::Failed,
            attribution: Attribution::Policy,
            evidence: String::new(),
            exit: Some(ExitStatus::code(3)),
            error: None,
            steps: vec![
                StepResult {
                    stdout: output(2, "ab", None),
                    ..StepResult::default()
                },
                StepResult {
                    stdout: output(100, "cd", Some("yz")),
                    stderr: Output {
                        head: Blob(vec![0xff]),
                        bytes: 1,
                        ..Output::default()
                    },
                    ..StepResult::default()
                },
            ],
            frames: 0,
            usage: broker_schema::Usage::default(),
            times: Times {
                queued: Timestamp(1_000),
                dispatched: Some(Timestamp(2_500)),
                started: Some(Timestamp(3_000)),
                finished: Timestamp(10_000),
            },
            sandbox: None,
            kept: false,
        }
    }

    #[test]
    fn a_line_has_text_or_base64_and_split_times() {
        let terminal = terminal();
        let line = ResultLine::of(Some("x".into()), &terminal);
        assert_eq!(
            serde_json::to_value(&line).unwrap(),
            json!({
                "tag": "x",
                "task": terminal.task,
                "outcome": "failed",
                "attribution": "policy",
                "exit": {"code": 3},
                "stdout": "abcdyz",
                "stdout_bytes": 102,
                "stdout_dropped": 0,
                "stderr_bytes": 1,
                "stderr_dropped": 0,
                "stdout_omitted": 96,
                "stderr": {"base64": "/w=="},
                "error": null,
                "attempt": 1,
                "times": {"queued": 1000, "dispatched": 2500, "started": 3000, "finished": 10000},
                "queued_ms": 1.5,
                "sandbox_ms": 0.5,
                "run_ms": 7.0,
                "total_ms": 9.0,
            })
        );
    }

    #[test]
    fn a_task_that_never_ran_has_only_a_total() {
        let times = Times {
            queued: Timestamp(5),
            finished: Timestamp(9),
            ..Times::default()
        };
        let expected = Micros {
            total: 4,
            ..Micros::default()
        };
        assert_eq!(Micros::of(&times), expected);
    }
}
