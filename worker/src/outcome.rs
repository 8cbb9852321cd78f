//! From how the steps ended to what the terminal says: pure.
//!
//! What sandboxed code can cause is never blamed on the infrastructure, and what it cannot cause
//! is never blamed on it.

use std::time::Duration;

use broker_schema::{Attribution, CancelCause, ErrorCode, ErrorInfo, ExitStatus, Outcome};
use remuda_proto::code;

/// What a step may take, and what sets that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    pub(crate) time: Duration,
    pub(crate) limit: Limit,
}

/// What ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    Step,
    Task,
    Deadline,
}

/// The least of what the step, the task and the deadline leave.
pub(crate) fn budget(
    step: Option<Duration>,
    task_left: Duration,
    deadline_left: Option<Duration>,
) -> Budget {
    let mut least = Budget {
        time: task_left,
        limit: Limit::Task,
    };
    for (time, limit) in [(step, Limit::Step), (deadline_left, Limit::Deadline)] {
        if let Some(time) = time.filter(|time| *time < least.time) {
            least = Budget { time, limit };
        }
    }
    least
}

/// The kernel's OOM kills in a sandbox since somebody looked last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct OomKills {
    pub(crate) count: u64,
    /// The sandbox had reached its own limit. Otherwise it was the host that ran short.
    pub(crate) at_limit: bool,
}

impl OomKills {
    /// What the code in the sandbox brought upon itself.
    pub(crate) fn by_its_limit(self) -> u64 {
        if self.at_limit { self.count } else { 0 }
    }

    /// What befell it.
    pub(crate) fn by_the_host(self) -> u64 {
        self.count - self.by_its_limit()
    }
}

/// How one step ended, as far as it matters for the task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StepEnd {
    /// A command came to its end.
    Exited {
        exit: ExitStatus,
        /// What ran out, where the sidecar killed it for its time.
        timed_out: Option<Limit>,
        oom: OomKills,
        /// Why the program could not be started.
        spawn_error: String,
        /// Its output could not be taken off its hands for a while, by no fault of its own.
        stalled: bool,
    },
    /// A file step worked.
    FileDone,
    /// The sidecar refused: what it found in the sandbox, or what was asked, forbids it.
    Refused(ErrorInfo),
    /// The sidecar could not do it, and nothing in the sandbox can be the reason.
    Unable(String),
    /// Nothing was left of the time.
    NoTime(Limit),
    /// The time was over, the sidecar answers, and the command's processes did not end.
    Unresponsive(Limit),
    /// The sidecar, and with it the sandbox, is gone.
    Broken { why: String, oom: OomKills },
    /// The sidecar serves a later lease.
    Stale,
}

impl StepEnd {
    pub(crate) fn succeeded(&self) -> bool {
        match self {
            Self::FileDone => true,
            Self::Exited {
                exit, timed_out, ..
            } => exit.success() && timed_out.is_none(),
            _ => false,
        }
    }

    /// Whether nothing more can be run after it, whatever the task asks for.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Exited { timed_out, .. } => timed_out.is_some_and(|limit| limit != Limit::Step),
            Self::FileDone | Self::Refused(_) => false,
            Self::Unable(_)
            | Self::NoTime(_)
            | Self::Unresponsive(_)
            | Self::Broken { .. }
            | Self::Stale => true,
        }
    }
}

/// Why a task was stopped from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupt {
    Cancelled(CancelCause),
    /// Somebody else has the lease, or nobody.
    LeaseLost,
    /// Nobody could be asked about the lease for too long.
    LeaseOverdue,
    /// The worker ends.
    Shutdown,
}

/// What is to be said about an attempt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    Finish(Finding),
    /// Back to the dispatcher, for another attempt elsewhere.
    HandBack(String),
    /// Nothing: whoever has the lease now says it.
    Quiet,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finding {
    pub(crate) outcome: Outcome,
    pub(crate) attribution: Attribution,
    pub(crate) evidence: String,
    pub(crate) error: Option<ErrorInfo>,
    /// Whether the sandbox can be used again by its session.
    pub(crate) usable: bool,
}

impl Finding {
    pub(crate) fn new(outcome: Outcome, evidence: impl Into<String>) -> Self {
        Self {
            outcome,
            attribution: outcome.default_attribution(),
            evidence: evidence.into(),
            error: None,
            usable: true,
        }
    }

    pub(crate) fn with(mut self, error: ErrorInfo) -> Self {
        self.error = Some(error);
        self
    }

    fn unusable(mut self) -> Self {
        self.usable = false;
        self
    }
}

/// Judges an attempt by its steps' ends. `session`: nothing of it may be run again elsewhere.
pub(crate) fn judge(ends: &[StepEnd], interrupt: Option<Interrupt>, session: bool) -> Verdict {
    if let Some(interrupt) = interrupt {
        return interrupted(interrupt, session);
    }
    if let Some(at) = ends.iter().position(|end| !end.succeeded()) {
        return failed(at, &ends[at], session);
    }
    let evidence = match killed_for_memory(ends) {
        0 => "every step exited with 0".to_owned(),
        kills => {
            format!("every step exited with 0; the kernel's count of OOM kills grew by {kills}")
        }
    };
    Verdict::Finish(Finding::new(Outcome::Succeeded, evidence))
}

fn killed_for_memory(ends: &[StepEnd]) -> u64 {
    let kills = ends.iter().map(|end| match end {
        StepEnd::Exited { oom, .. } => oom.count,
        _ => 0,
    });
    kills.sum()
}

/// A task that somebody ended.
pub(crate) fn cancelled(when: &str, cause: CancelCause) -> Finding {
    let why = format!("it was cancelled {when}: {}", cause.evidence());
    let error = ErrorInfo::new(ErrorCode::Cancelled, why.clone());
    Finding::new(Outcome::Cancelled, why).with(error)
}

fn interrupted(interrupt: Interrupt, session: bool) -> Verdict {
    match interrupt {
        Interrupt::Cancelled(cause) => Verdict::Finish(cancelled("while it ran", cause)),
        Interrupt::LeaseOverdue => Verdict::Quiet,
        Interrupt::LeaseLost => lost(
            session,
            ErrorCode::StaleEpoch,
            "the lease on its sandbox was lost",
        ),
        Interrupt::Shutdown => lost(session, ErrorCode::SandboxLost, "its worker was stopped"),
    }
}

/// The sandbox cannot be used on: another one for a task that stands alone, the end for a session.
fn lost(session: bool, code: ErrorCode, why: &str) -> Verdict {
    if session {
        let finding = Finding::new(Outcome::SandboxLost, why).with(ErrorInfo::new(code, why));
        Verdict::Finish(finding.unusable())
    } else {
        Verdict::HandBack(why.to_owned())
    }
}

fn failed(at: usize, end: &StepEnd, session: bool) -> Verdict {
    let killed = |oom: OomKills, what: &str| {
        Finding::new(
            Outcome::OomKilled,
            format!(
                "step {at} {what}; the kernel's count of OOM kills grew by {}",
                oom.count
            ),
        )
    };
    match end {
        StepEnd::Exited {
            timed_out: Some(limit),
            stalled,
            ..
        } => {
            if *stalled && !session {
                return Verdict::HandBack(format!(
                    "step {at} ran out of time while its output could not be published"
                ));
            }
            let mut finding = out_of_time(at, *limit);
            if *stalled {
                finding.attribution = Attribution::Infrastructure;
                finding.evidence += "; its output could not be published meanwhile";
            }
            Verdict::Finish(finding)
        }
        StepEnd::Exited { exit, oom, .. } if oom.by_its_limit() > 0 => {
            Verdict::Finish(killed(*oom, &format!("exited with {}", exit.code)))
        }
        StepEnd::Exited { exit, oom, .. } if oom.by_the_host() > 0 => {
            let mut finding = killed(*oom, &format!("exited with {}", exit.code));
            finding.attribution = Attribution::Infrastructure;
            finding.evidence +=
                ", and the sandbox was below its memory limit: the host ran out of memory";
            if session {
                Verdict::Finish(finding)
            } else {
                Verdict::HandBack(finding.evidence)
            }
        }
        StepEnd::Exited {
            exit, spawn_error, ..
        } => {
            let how = match exit.signal {
                Some(signal) => format!("step {at} was ended by signal {signal}"),
                None if spawn_error.is_empty() => format!("step {at} exited with {}", exit.code),
                None => format!("step {at} could not be started: {spawn_error}"),
            };
            let mut finding = Finding::new(Outcome::Failed, how);
            finding.error = not_started(*exit, spawn_error);
            Verdict::Finish(finding)
        }
        StepEnd::Refused(error) if error.code == ErrorCode::InvalidField => {
            let finding = Finding::new(Outcome::Rejected, format!("step {at} was refused"));
            Verdict::Finish(finding.with(error.clone()))
        }
        StepEnd::Refused(error) => {
            let evidence = format!("step {at} failed: {}", error.message);
            Verdict::Finish(Finding::new(Outcome::Failed, evidence).with(error.clone()))
        }
        StepEnd::NoTime(limit) => Verdict::Finish(out_of_time(at, *limit)),
        StepEnd::Unresponsive(limit) => {
            let mut finding = out_of_time(at, *limit);
            finding.evidence += "; its processes outlived SIGKILL while the sidecar answered, the sandbox was \
                 destroyed";
            Verdict::Finish(finding.unusable())
        }
        StepEnd::Broken { oom, .. } if oom.by_its_limit() > 0 => {
            Verdict::Finish(killed(*oom, "took its sandbox down").unusable())
        }
        StepEnd::Broken { why, .. } | StepEnd::Unable(why) => lost(
            session,
            ErrorCode::SandboxLost,
            &format!("step {at} lost its sandbox: {why}"),
        ),
        StepEnd::Stale => lost(
            session,
            ErrorCode::StaleEpoch,
            "the sandbox serves a later lease",
        ),
        StepEnd::FileDone => Verdict::Finish(Finding::new(Outcome::Succeeded, "")),
    }
}

/// Why a program did not start, as an error: `None` where it did.
pub(crate) fn not_started(exit: ExitStatus, spawn_error: &str) -> Option<ErrorInfo> {
    /// What a shell exits with where there is no such program.
    const NO_PROGRAM: i32 = 127;
    let code = match exit.code {
        _ if spawn_error.is_empty() => return None,
        NO_PROGRAM => ErrorCode::FileNotFound,
        _ => ErrorCode::PermissionDenied,
    };
    Some(ErrorInfo::new(code, spawn_error))
}

fn out_of_time(at: usize, limit: Limit) -> Finding {
    match limit {
        Limit::Step => Finding::new(
            Outcome::TimedOut,
            format!("step {at} took longer than its time-out"),
        ),
        Limit::Task => Finding::new(
            Outcome::TimedOut,
            format!("the task took longer than its time-out, in step {at}"),
        ),
        Limit::Deadline => expired(&format!("the deadline passed in step {at}")),
    }
}

/// The deadline came first.
pub(crate) fn expired(why: &str) -> Finding {
    Finding::new(Outcome::Expired, why).with(ErrorInfo::new(ErrorCode::DeadlineExpired, why))
}

/// What a refusal of the sidecar means. `pristine`: no code of the task's has run in the sandbox
/// yet, so that none can be the reason.
pub(crate) fn refusal(sidecar_code: &str, message: &str, pristine: bool) -> StepEnd {
    let code = match sidecar_code {
        code::STALE_EPOCH => return StepEnd::Stale,
        code::INVALID_ARGUMENT => ErrorCode::InvalidField,
        code::WORK_DIR_MISSING => ErrorCode::WorkDirMissing,
        code::PATH_ESCAPES => ErrorCode::PathEscapes,
        code::NOT_A_FILE => ErrorCode::NotAFile,
        code::NOT_FOUND => ErrorCode::FileNotFound,
        code::PERMISSION_DENIED => ErrorCode::PermissionDenied,
        code::NO_SPACE => ErrorCode::NoSpace,
        code::TOO_LARGE => ErrorCode::FileTooLarge,
        _ if pristine => return StepEnd::Unable(format!("{sidecar_code}: {message}")),
        // Too many processes, a file system that it broke: code in there can cause it.
        _ => ErrorCode::SidecarFailed,
    };
    StepEnd::Refused(ErrorInfo::new(code, message))
}

#[cfg(test)]
#[path = "outcome_tests.rs"]
mod tests;
