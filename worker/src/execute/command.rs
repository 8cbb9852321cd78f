//! One command step: from the request to the sidecar to its exit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use broker_schema::{Command, ExitStatus, FrameKind, TaskRequest};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use remuda_proto::v1::execute_event::Event;
use remuda_proto::{code, v1};
use remuda_telemetry::history::{self, Call, Event as Happened};
use remuda_telemetry::propagate::{exporting, record_remote_span};
use remuda_telemetry::{RemoteSpan, failpoint};

use super::{Closed, Run, failed, unpublished, usage_of};
use crate::outcome::{Budget, StepEnd};
use crate::sidecar_client::{CallError, shorten};

/// How long after a command's time is over its exit may take to arrive: killing everything and
/// reading what it had printed.
const GRACE: Duration = Duration::from_secs(15);
/// How long a sidecar may say nothing before it is asked whether it is alive.
const PROBE_AFTER: Duration = Duration::from_secs(5);

/// What every command finds in its environment; the pool's, the task's and its own entries win.
const BASE_ENV: [(&str, &str); 3] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/workspace"),
    ("LANG", "C.UTF-8"),
];

type Probe<'a> = BoxFuture<'a, Result<v1::HealthResponse, CallError>>;

/// What the sidecar answers to the question that is under way.
async fn answered(probe: &mut Option<Probe<'_>>) -> Result<v1::HealthResponse, CallError> {
    match probe {
        Some(probe) => probe.await,
        None => std::future::pending().await,
    }
}

impl Run<'_> {
    pub(super) async fn command(&mut self, command: &Command, budget: Budget) -> Closed {
        let request = self.request(command, budget);
        let outages = self.attempt.stream.outages();
        let span = exporting().then(SystemTime::now);
        self.note_call(Call::Execute);
        let mut events = match self
            .attempt
            .sandbox
            .execute(request, self.attempt.trace)
            .await
        {
            Ok(events) => events,
            Err(error) => {
                let end = self.call_failed(&error);
                let exit = failed(&end);
                return Closed::new(end, exit);
            }
        };
        self.attempt.past.pristine = false;
        let over = Instant::now() + budget.time + GRACE;
        let mut heard = Instant::now();
        let mut command_began = None;
        let mut pid = 0;
        let sandbox = self.attempt.sandbox;
        // A sidecar that hangs must not cost all of a long command's time.
        let mut alive = Instant::now();
        let mut probe: Option<Probe<'_>> = None;
        loop {
            let stream = &mut self.attempt.stream;
            let (has_room, waiting) = (stream.has_room(), stream.waiting());
            let due = stream.due().unwrap_or(over);
            let silent = over.max(heard + GRACE);
            let event = tokio::select! {
                biased;
                acked = stream.acked(), if waiting => match acked {
                    Ok(()) => None,
                    Err(error) => return Closed::new(unpublished(&error), ExitStatus::code(1)),
                },
                event = events.next(), if has_room => {
                    (alive, probe) = (Instant::now(), None);
                    Some(event)
                }
                health = answered(&mut probe), if probe.is_some() => {
                    (alive, probe) = (Instant::now(), None);
                    match health {
                        Ok(_) => continue,
                        Err(error) => Some(Err(error)),
                    }
                }
                () = tokio::time::sleep_until((alive + PROBE_AFTER).into()), if probe.is_none() => {
                    alive = Instant::now();
                    // While its output waits for us it cannot be blamed for silence.
                    if has_room {
                        probe = Some(sandbox.health().boxed());
                    }
                    continue;
                }
                () = tokio::time::sleep_until(due.min(silent).into()), if has_room => {
                    if Instant::now() >= silent {
                        let end = StepEnd::Unresponsive(budget.limit);
                        let exit = ExitStatus { code: 137, signal: Some(9) };
                        return Closed::new(end, exit);
                    }
                    if let Err(error) = stream.flush().await {
                        return Closed::new(unpublished(&error), ExitStatus::code(1));
                    }
                    None
                }
            };
            heard = Instant::now();
            let (kind, data) = match event {
                None => continue,
                Some(Ok(Event::Started(started))) => {
                    command_began = Some(started.unix_nanos);
                    pid = started.pid;
                    self.note_command(pid, started.unix_nanos, false);
                    failpoint::step(failpoint::worker::COMMAND_BEGAN);
                    continue;
                }
                Some(Ok(Event::Stdout(data))) => (FrameKind::Stdout, data),
                Some(Ok(Event::Stderr(data))) => (FrameKind::Stderr, data),
                Some(Ok(Event::Exited(exited))) => {
                    self.note_command(pid, command_began.unwrap_or_default(), true);
                    if failpoint::is_on(failpoint::worker::ZOMBIE) {
                        self.haunt().await;
                    }
                    if let Some(called) = span {
                        self.record(called, command_began, &exited);
                    }
                    let stalled = self.attempt.stream.outages() > outages;
                    return self.exited(&exited, budget, stalled);
                }
                // It was killed, and did not die.
                Some(Err(error)) if error.code() == Some(code::KILL_FAILED) => {
                    let exit = ExitStatus {
                        code: 137,
                        signal: Some(9),
                    };
                    return Closed::new(StepEnd::Unresponsive(budget.limit), exit);
                }
                Some(Err(error)) => {
                    let end = self.call_failed(&error);
                    let exit = failed(&end);
                    return Closed::new(end, exit);
                }
            };
            if let Err(error) = self.take(kind, &data).await {
                return Closed::new(unpublished(&error), ExitStatus::code(1));
            }
        }
    }

    fn request(&self, command: &Command, budget: Budget) -> v1::ExecuteRequest {
        let attempt = &self.attempt;
        let mut env: BTreeMap<&str, &[u8]> = BASE_ENV
            .iter()
            .map(|(name, value)| (*name, value.as_bytes()))
            .collect();
        let pool = attempt.spec.env.iter();
        env.extend(pool.map(|(name, value)| (name.as_str(), value.as_bytes())));
        for own in [&attempt.placement.task.env, &command.env] {
            let entries = own.iter();
            env.extend(entries.map(|(name, value)| (name.as_str(), value.as_slice())));
        }
        let entry =
            |(name, value): (&str, &[u8])| Bytes::from([name.as_bytes(), b"=", value].concat());
        v1::ExecuteRequest {
            epoch: self.epoch(),
            argv: command
                .argv
                .iter()
                .map(|argument| Bytes::copy_from_slice(argument.as_slice()))
                .collect(),
            env: env.into_iter().map(entry).collect(),
            work_dir: Bytes::copy_from_slice(
                command.work_dir.as_deref().unwrap_or_default().as_bytes(),
            ),
            stdin: Bytes::copy_from_slice(command.stdin.as_slice()),
            timeout_ms: (budget.time.as_millis() as u64).max(1),
            output_limit: command
                .output_limit
                .unwrap_or(TaskRequest::DEFAULT_OUTPUT_LIMIT),
        }
    }

    fn exited(&mut self, exited: &v1::Exited, budget: Budget, stalled: bool) -> Closed {
        let exit = ExitStatus {
            code: exited.code.clamp(0, 255),
            signal: (1..=64).contains(&exited.signal).then_some(exited.signal),
        };
        let end = StepEnd::Exited {
            exit,
            timed_out: exited.timed_out.then_some(budget.limit),
            oom: self.attempt.past.new_oom_kills(self.attempt.sandbox),
            spawn_error: shorten(&exited.spawn_error),
            stalled,
        };
        Closed {
            end,
            exit,
            usage: usage_of(exited),
            dropped: [exited.stdout_dropped, exited.stderr_dropped],
        }
    }

    /// A call under the epoch before this one, as a holder would make it that has not noticed
    /// that another was let in. For tests: it is to be refused.
    async fn haunt(&mut self) {
        let request = v1::ExecuteRequest {
            epoch: self.epoch().saturating_sub(1),
            argv: vec![Bytes::from_static(b"true")],
            timeout_ms: 1000,
            ..v1::ExecuteRequest::default()
        };
        let trace = self.attempt.trace;
        if let Ok(mut events) = self.attempt.sandbox.execute(request, trace).await {
            while let Ok(event) = events.next().await {
                if matches!(event, Event::Exited(_)) {
                    break;
                }
            }
        }
    }

    /// A command has begun, or ended.
    fn note_command(&self, pid: i32, began: u64, ended: bool) {
        history::record(|| {
            let placement = &self.attempt.placement;
            let (sandbox, task) = (
                placement.sandbox.sandbox.to_string(),
                placement.task.id.to_string(),
            );
            let (attempt, step) = (placement.attempt, self.step());
            if ended {
                Happened::CommandEnded {
                    sandbox,
                    task,
                    attempt,
                    step,
                    pid,
                    began,
                }
            } else {
                Happened::CommandBegan {
                    sandbox,
                    task,
                    attempt,
                    step,
                    pid,
                    began,
                }
            }
        });
    }

    /// The span of the sidecar, which has no way to send its own. Its clock is ours, but its word
    /// is only taken within the call.
    fn record(&self, called: SystemTime, began: Option<u64>, exited: &v1::Exited) {
        let now = SystemTime::now();
        let at = |nanos: u64| {
            UNIX_EPOCH
                .checked_add(Duration::from_nanos(nanos))
                .unwrap_or(now)
                .clamp(called.min(now), now)
        };
        let code = Cow::Owned(exited.code.to_string());
        record_remote_span(
            self.attempt.trace,
            &RemoteSpan {
                name: "run command",
                start: began.map_or(called, at),
                end: at(exited.unix_nanos),
                attributes: &[("exit_code", code)],
                error: exited.timed_out.then_some("timed out"),
            },
        );
    }
}
