//! The life of one command: start it, pass its output on, end it when its time
//! is up or nobody wants it any more, tell how it ended.

use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};
use remuda_proto::v1::{ExecuteEvent, Exited, Started, execute_event::Event};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::args::Ids;
use crate::command::{Command, exec_failure_code, exec_failure_text};
use crate::error::Failure;
use crate::history::{self, CommandId};
use crate::output::{Events, Inlet, Outlet};
use crate::reaper::Reaper;
use crate::sys::Reaped;
use crate::sys::spawn::{ChildError, Limit, Plan, Step};
use crate::tree;

/// How long others who hold a command's output may still write after it ended.
const GRACE: Duration = Duration::from_millis(20);
/// How long a killed command may take to be gone.
const KILL_SECONDS: u64 = 5;
/// Far enough to never come, near enough to be computed.
const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// What all commands of a sandbox have in common.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) user: Option<Ids>,
    /// `/dev/null` for reading: opened once, the way to it is long in an overlay.
    pub(crate) null: OwnedFd,
    pub(crate) cgroups: Vec<OwnedFd>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) reaper: Arc<Reaper>,
}

/// A command that was started.
#[derive(Debug)]
pub(crate) struct Running {
    epoch: u64,
    pid: i32,
    /// When it began, by the wall clock.
    began: u64,
    name: Vec<u8>,
    ended: oneshot::Receiver<Reaped>,
    errors: OwnedFd,
    stdin: Inlet,
    stdout: Outlet,
    stderr: Outlet,
    started: Instant,
    timeout: Option<Duration>,
    reaper: Arc<Reaper>,
}

/// Starts a command. Does not wait for its exec: see [`crate::sys::spawn`].
pub(crate) fn start(
    epoch: u64,
    command: Command,
    around: &Surroundings,
) -> Result<Running, Failure> {
    let failed = |step| move |errno| Failure::Spawn { step, errno };
    let (stdout, stdout_end) =
        Outlet::new(Event::Stdout, command.output_limit).map_err(failed("make pipes"))?;
    let (stderr, stderr_end) =
        Outlet::new(Event::Stderr, command.output_limit).map_err(failed("make pipes"))?;
    let (stdin, stdin_end) = if command.stdin.is_empty() {
        (Inlet::closed(), None)
    } else {
        let (stdin, end) = Inlet::new(command.stdin).map_err(failed("make pipes"))?;
        (stdin, Some(end))
    };
    let stdin_end = stdin_end.as_ref().unwrap_or(&around.null);
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let (errors, errors_end) = pipe2(flags).map_err(failed("make pipes"))?;
    let started = Instant::now();
    let plan = Plan {
        programs: &command.programs,
        argv: &command.argv,
        env: &command.env,
        work_dir: command.work_dir.as_fd(),
        stdio: [stdin_end.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()],
        cgroups: &around.cgroups,
        user: around.user,
        limits: &around.limits,
        errors: errors_end.as_fd(),
    };
    let (pid, ended) = around.reaper.spawn(&plan).map_err(failed("fork"))?;
    let name = command
        .argv
        .first()
        .map(|name| name.as_bytes().to_vec())
        .unwrap_or_default();
    Ok(Running {
        epoch,
        pid,
        began: unix_nanos(),
        name,
        ended,
        errors,
        stdin,
        stdout,
        stderr,
        started,
        timeout: command.timeout,
        reaper: Arc::clone(&around.reaper),
    })
}

impl Running {
    pub(crate) fn started_event(&self) -> ExecuteEvent {
        let started = Started {
            pid: self.pid,
            unix_nanos: self.began,
        };
        ExecuteEvent {
            event: Some(Event::Started(started)),
        }
    }

    /// Follows the command to its end. The last event is its `Exited`, or the
    /// reason why there is none.
    pub(crate) async fn follow(mut self, events: Events) {
        let last = match self.until_ended(&events).await {
            Ok(Some((reaped, timed_out))) => {
                let wall = self.started.elapsed();
                let grace = Instant::now() + GRACE;
                let mut heard = true;
                for outlet in [&mut self.stdout, &mut self.stderr] {
                    heard = heard && outlet.drain(&events, grace).await.is_ok();
                }
                if !heard {
                    return self.recorded(false);
                }
                self.exited(reaped, timed_out, wall)
            }
            Ok(None) => return self.recorded(false),
            Err(failure) => Err(failure),
        };
        let last = last.map(|exited| ExecuteEvent {
            event: Some(Event::Exited(exited)),
        });
        self.recorded(true);
        // Nobody is left to tell when this fails.
        let _gone = events.send(last.map_err(Status::from)).await;
    }

    fn recorded(&self, whole: bool) {
        let command = CommandId {
            epoch: self.epoch,
            pid: self.pid,
            began: self.began,
        };
        history::wrote(command, self.stdout.account(), self.stderr.account(), whole);
    }

    /// Passes output on until the command has ended; `None` when the call was
    /// dropped and the command killed for it.
    async fn until_ended(&mut self, events: &Events) -> Result<Option<(Reaped, bool)>, Failure> {
        let limit = self.started + self.timeout.unwrap_or(NEVER).min(NEVER);
        let mut deadline = pin!(sleep_until(limit));
        let mut timed_out = false;
        loop {
            // One that writes without end must not starve the others.
            tokio::task::coop::consume_budget().await;
            tokio::select! {
                biased;
                ended = &mut self.ended => {
                    // The table only drops a sender with the status in it.
                    let reaped = ended.map_err(|_| Failure::Kill { seconds: 0 })?;
                    return Ok(Some((reaped, timed_out)));
                }
                () = events.closed() => {
                    self.kill();
                    return Ok(None);
                }
                () = &mut deadline => {
                    if timed_out {
                        return Err(Failure::Kill { seconds: KILL_SECONDS });
                    }
                    if self.kill() {
                        timed_out = true;
                    }
                    deadline.as_mut().reset(Instant::now() + Duration::from_secs(KILL_SECONDS));
                }
                // Without a reader, `closed` is ready in the next turn.
                _ = self.stdout.pass_one(events), if self.stdout.is_open() => {}
                _ = self.stderr.pass_one(events), if self.stderr.is_open() => {}
                () = self.stdin.feed(), if self.stdin.is_open() => {}
            }
        }
    }

    /// Ends the whole tree, unless the leader turns out to have ended before.
    fn kill(&self) -> bool {
        self.reaper.reap();
        let runs = self.reaper.runs(self.pid);
        if runs {
            tree::kill_command(self.pid);
        }
        runs
    }

    fn exited(&self, reaped: Reaped, timed_out: bool, wall: Duration) -> Result<Exited, Failure> {
        let mut exited = Exited {
            timed_out,
            stdout_bytes: self.stdout.kept() + self.stdout.dropped(),
            stderr_bytes: self.stderr.kept() + self.stderr.dropped(),
            stdout_dropped: self.stdout.dropped(),
            stderr_dropped: self.stderr.dropped(),
            user_micros: reaped.user_micros,
            system_micros: reaped.system_micros,
            max_rss_bytes: reaped.max_rss_bytes,
            wall_micros: wall.as_micros() as u64,
            unix_nanos: unix_nanos(),
            ..Exited::default()
        };
        (exited.code, exited.signal) = how_it_ended(reaped.status);
        match self.child_error() {
            Some(ChildError {
                step: Step::Exec,
                errno,
            }) => {
                exited.code = exec_failure_code(errno);
                exited.spawn_error = exec_failure_text(&self.name, errno);
            }
            // The folder is there but the user may not enter it.
            Some(ChildError {
                step: step @ Step::WorkDir,
                errno: errno @ Errno::EACCES,
            }) => {
                exited.code = 126;
                exited.spawn_error = format!("{}: {}", step.name(), errno.desc());
            }
            Some(ChildError { step, errno }) => {
                return Err(Failure::Spawn {
                    step: step.name(),
                    errno,
                });
            }
            None => {}
        }
        Ok(exited)
    }

    fn child_error(&self) -> Option<ChildError> {
        let mut bytes = [0; ChildError::BYTES];
        let length = read(&self.errors, &mut bytes).ok()?;
        ChildError::decode(bytes.get(..length)?)
    }
}

/// The exit code as a shell gives it, and the signal or 0.
fn how_it_ended(status: i32) -> (i32, i32) {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        (128 + signal, signal)
    } else {
        (libc::WEXITSTATUS(status), 0)
    }
}

fn unix_nanos() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses() {
        for (status, expected) in [
            (0, (0, 0)),
            (0x0100, (1, 0)),
            (0xff00, (255, 0)),
            (9, (137, 9)),
            (0x8b, (139, 11)),
        ] {
            assert_eq!(how_it_ended(status), expected, "{status:#x}");
        }
    }
}
