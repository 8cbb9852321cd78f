//! One attempt: the steps in order, within one budget of time, output streamed as it comes.

mod command;
mod files;

use std::future::Future;
use std::time::{Duration, Instant};

use broker_schema::pool::PoolSpec;
use broker_schema::{
    ErrorCode, ErrorInfo, ExitStatus, FrameKind, Placement, Step, StepKind, StepResult,
    TaskRequest, Timestamp, Usage,
};
use remuda_proto::v1;
use remuda_telemetry::history::{self, Call, Event};
use remuda_telemetry::{Chain, TraceHeaders};

use crate::backend::Sandbox;
use crate::outcome::{Budget, Interrupt, Limit, OomKills, StepEnd, budget, not_started, refusal};
use crate::output::{Tally, fit};
use crate::sidecar_client::{CallError, shorten};
use crate::stream::{Stream, StreamError};

/// Names and error texts of all steps of one terminal, in bytes.
const TEXTS: usize = 64 * 1024;
const LONGEST_NAME: usize = 256;

/// What is remembered of a sandbox between the tasks that run in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Past {
    /// The kernel's count of OOM kills when it was last looked at, and of the times that the
    /// memory limit was met.
    oom_kills: u64,
    limit_hits: u64,
    /// No code of a task's has run in it.
    pristine: bool,
}

impl Past {
    pub(crate) fn new() -> Self {
        Self {
            oom_kills: 0,
            limit_hits: 0,
            pristine: true,
        }
    }

    /// OOM kills since the last look.
    pub(crate) fn new_oom_kills(&mut self, sandbox: &Sandbox) -> OomKills {
        let Some(count) = sandbox.oom_kills() else {
            return OomKills::default();
        };
        // Where nobody counts them the code in the sandbox is not excused.
        let hits = sandbox.limit_hits();
        let new = OomKills {
            count: count.saturating_sub(self.oom_kills),
            at_limit: hits.is_none_or(|hits| hits > self.limit_hits)
                || sandbox.memory_was_full() != Some(false),
        };
        self.oom_kills = count;
        self.limit_hits = hits.unwrap_or_default();
        new
    }
}

/// One attempt at a task.
pub(crate) struct Attempt<'a> {
    pub(crate) sandbox: &'a Sandbox,
    pub(crate) spec: &'a PoolSpec,
    pub(crate) placement: &'a Placement,
    pub(crate) stream: Stream,
    pub(crate) trace: &'a TraceHeaders,
    pub(crate) past: &'a mut Past,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) interrupt: Option<Interrupt>,
    pub(crate) ends: Vec<StepEnd>,
    pub(crate) steps: Vec<StepResult>,
    /// Of the last command that ran.
    pub(crate) exit: Option<ExitStatus>,
    pub(crate) frames: u64,
    pub(crate) usage: Usage,
    pub(crate) started: Timestamp,
}

/// An attempt on its way.
struct Run<'a> {
    attempt: Attempt<'a>,
    began: Instant,
    ends: Vec<StepEnd>,
    steps: Vec<StepResult>,
    exit: Option<ExitStatus>,
    open: Option<Open>,
}

/// The step that runs.
struct Open {
    name: String,
    stdout: Tally,
    stderr: Tally,
    began: Instant,
}

/// How one step came out.
struct Closed {
    end: StepEnd,
    exit: ExitStatus,
    usage: Usage,
    /// Beyond the output limit, of stdout and of stderr.
    dropped: [u64; 2],
}

impl Closed {
    fn new(end: StepEnd, exit: ExitStatus) -> Self {
        Self {
            end,
            exit,
            usage: Usage::default(),
            dropped: [0; 2],
        }
    }
}

impl Attempt<'_> {
    /// Runs the steps until they are done or `interrupt` resolves. All frames are acknowledged
    /// when it returns, except where nobody may say anything any more.
    pub(crate) async fn run(self, interrupt: impl Future<Output = Interrupt>) -> Ran {
        let started = Timestamp::now();
        let mut run = Run {
            attempt: self,
            began: Instant::now(),
            ends: Vec::new(),
            steps: Vec::new(),
            exit: None,
            open: None,
        };
        let mut interrupt = std::pin::pin!(interrupt);
        let mut interrupted = tokio::select! {
            biased;
            why = &mut interrupt => Some(why),
            () = run.steps() => None,
        };
        if run.open.is_some() {
            let killed = ExitStatus {
                code: 137,
                signal: Some(9),
            };
            run.close(Closed::new(StepEnd::NoTime(Limit::Task), killed));
        }
        let mut flushed = None;
        if interrupted.is_none() {
            tokio::select! {
                biased;
                why = &mut interrupt => interrupted = Some(why),
                done = run.attempt.stream.finish() => flushed = Some(done),
            }
        }
        // Also where it was cancelled while its last frames were on their way.
        if let (None, Some(Interrupt::Cancelled(_))) = (&flushed, interrupted) {
            flushed = Some(run.attempt.stream.finish().await);
        }
        if let Some(Err(error)) = flushed {
            run.ends = vec![StepEnd::Unable(Chain(&error).to_string())];
        }
        run.finish(interrupted, started)
    }
}

impl Run<'_> {
    async fn steps(&mut self) {
        let task = &self.attempt.placement.task;
        for step in &task.steps {
            let budget = self.budget(step);
            if budget.time.is_zero() {
                self.ends.push(StepEnd::NoTime(budget.limit));
                return;
            }
            self.open = Some(Open {
                name: name_of(step, task),
                stdout: Tally::default(),
                stderr: Tally::default(),
                began: Instant::now(),
            });
            let closed = match &step.action {
                StepKind::Command(command) => self.command(command, budget).await,
                StepKind::FilePatch(patch) => self.write(patch, budget).await,
                StepKind::FileRead(read) => self.read(read, budget).await,
                other => Closed::new(
                    StepEnd::Refused(ErrorInfo::new(
                        ErrorCode::UnknownStepType,
                        format!("this worker cannot run a step of type {}", other.name()),
                    )),
                    ExitStatus::code(1),
                ),
            };
            let stop =
                closed.end.is_final() || !closed.end.succeeded() && !task.continue_on_failure;
            self.close(closed);
            if stop {
                return;
            }
        }
    }

    fn budget(&self, step: &Step) -> Budget {
        let task = &self.attempt.placement.task;
        let whole = task.timeout_ms.unwrap_or(TaskRequest::DEFAULT_TIMEOUT_MS);
        let own = match &step.action {
            StepKind::Command(command) => command.timeout_ms,
            _ => None,
        };
        budget(
            own.map(Duration::from_millis),
            Duration::from_millis(whole).saturating_sub(self.began.elapsed()),
            task.deadline.map(|at| at.since(Timestamp::now())),
        )
    }

    /// The open step has ended.
    fn close(&mut self, closed: Closed) {
        let Some(open) = self.open.take() else {
            return;
        };
        let mut usage = closed.usage;
        usage.wall_us = open.began.elapsed().as_micros() as u64;
        let [stdout, stderr] = closed.dropped;
        let mut result = StepResult {
            name: open.name,
            exit: closed.exit,
            timed_out: false,
            oom_killed: false,
            error: None,
            stdout: open.stdout.finish(stdout),
            stderr: open.stderr.finish(stderr),
            usage,
        };
        match &closed.end {
            StepEnd::Exited {
                timed_out,
                oom,
                spawn_error,
                ..
            } => {
                result.timed_out = timed_out.is_some();
                result.oom_killed = oom.count > 0;
                result.error = not_started(closed.exit, spawn_error);
                self.exit = Some(closed.exit);
            }
            StepEnd::Refused(error) => result.error = Some(error.clone()),
            StepEnd::Unresponsive(_) => result.timed_out = true,
            _ => {}
        }
        if let Some(error) = &mut result.error {
            let most = TEXTS / self.attempt.placement.task.steps.len().max(1);
            cut(&mut error.message, most);
        }
        self.attempt.stream.end_step(closed.exit);
        self.steps.push(result);
        self.ends.push(closed.end);
        fit(&mut self.steps);
    }

    fn finish(self, interrupt: Option<Interrupt>, started: Timestamp) -> Ran {
        let mut usage = Usage {
            wall_us: self.began.elapsed().as_micros() as u64,
            ..Usage::default()
        };
        for step in &self.steps {
            usage.cpu_user_us = usage.cpu_user_us.saturating_add(step.usage.cpu_user_us);
            usage.cpu_system_us = usage.cpu_system_us.saturating_add(step.usage.cpu_system_us);
            usage.peak_memory_bytes = usage.peak_memory_bytes.max(step.usage.peak_memory_bytes);
        }
        if let Some(peak) = self.attempt.sandbox.memory_peak() {
            usage.peak_memory_bytes = peak;
        }
        Ran {
            interrupt,
            ends: self.ends,
            steps: self.steps,
            exit: self.exit,
            frames: self.attempt.stream.frames(),
            usage,
            started,
        }
    }

    /// Takes in output of the open step.
    async fn take(&mut self, kind: FrameKind, data: &[u8]) -> Result<(), StreamError> {
        if let Some(open) = &mut self.open {
            match kind {
                FrameKind::Stderr => open.stderr.push(data),
                _ => open.stdout.push(data),
            }
        }
        self.attempt.stream.push(kind, data).await
    }

    /// Waits until the window has room again.
    async fn room(&mut self) -> Result<(), StreamError> {
        while !self.attempt.stream.has_room() {
            self.attempt.stream.acked().await?;
        }
        Ok(())
    }

    fn call_failed(&mut self, error: &CallError) -> StepEnd {
        if let CallError::Refused { code, message, .. } = error {
            return refusal(code, message, self.attempt.past.pristine);
        }
        StepEnd::Broken {
            why: shorten(&Chain(error).to_string()),
            oom: self.attempt.past.new_oom_kills(self.attempt.sandbox),
        }
    }

    /// A call that takes no time of the task's own took all that there was: a sidecar that
    /// answers was merely slow, one that does not is broken.
    async fn slow(&mut self, limit: Limit) -> StepEnd {
        match self.attempt.sandbox.health().await {
            Ok(_) => StepEnd::NoTime(limit),
            Err(error) => self.call_failed(&error),
        }
    }

    /// A call to the sidecar is about to be made.
    fn note_call(&self, call: Call) {
        history::record(|| {
            let placement = &self.attempt.placement;
            Event::Operation {
                sandbox: placement.sandbox.sandbox.to_string(),
                epoch: self.epoch(),
                worker: placement.sandbox.worker.to_string(),
                tenant: placement.task.tenant.to_string(),
                task: placement.task.id.to_string(),
                attempt: placement.attempt,
                step: self.step(),
                call,
            }
        });
    }

    /// The index of the step that is open.
    fn step(&self) -> u32 {
        self.steps.len() as u32
    }

    fn epoch(&self) -> u64 {
        self.attempt.placement.sandbox.epoch.0
    }
}

fn unpublished(error: &StreamError) -> StepEnd {
    StepEnd::Unable(shorten(&Chain(error).to_string()))
}

fn name_of(step: &Step, task: &TaskRequest) -> String {
    let mut name = step.name.clone();
    let most = TEXTS / task.steps.len().max(1);
    cut(&mut name, most.min(LONGEST_NAME));
    name
}

/// Shortens a text to `most` bytes at a character.
fn cut(text: &mut String, most: usize) {
    let mut at = most.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.truncate(at);
}

/// The exit of a step that ended without one.
fn failed(end: &StepEnd) -> ExitStatus {
    match end {
        StepEnd::Refused(error) if error.code == ErrorCode::WorkDirMissing => ExitStatus::code(126),
        StepEnd::FileDone => ExitStatus::code(0),
        _ => ExitStatus::code(1),
    }
}

/// What the sidecar says about the use of a command; it is not to be trusted beyond its range.
fn usage_of(exited: &v1::Exited) -> Usage {
    const DAY_US: u64 = 24 * 3600 * 1_000_000;
    const MOST_CORES: u64 = 4096;
    Usage {
        wall_us: 0,
        cpu_user_us: exited.user_micros.min(DAY_US * MOST_CORES),
        cpu_system_us: exited.system_micros.min(DAY_US * MOST_CORES),
        peak_memory_bytes: exited.max_rss_bytes.min(1 << 50),
    }
}
