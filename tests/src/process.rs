//! A child process that a test owns: in a process group of its own, its output
//! in files, gone with the test.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::spawner;

/// The most of a log that a failure message carries, in bytes.
const LOG_TAIL: usize = 4096;

type Exit = Result<ExitStatus, Errno>;

/// A running or exited child. Dropping it kills its whole group.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    child: Child,
    exit: watch::Receiver<Option<Exit>>,
    observer: Option<JoinHandle<()>>,
    logs: TempDir,
}

impl Process {
    /// Starts a command with an empty stdin; stdout and stderr go to files.
    pub fn spawn(command: Command) -> anyhow::Result<Self> {
        Self::spawn_with(command, Stdio::null())
    }

    /// The same with a pipe to its stdin; see [`Process::take_stdin`].
    pub fn spawn_with_stdin(command: Command) -> anyhow::Result<Self> {
        Self::spawn_with(command, Stdio::piped())
    }

    fn spawn_with(mut command: Command, stdin: Stdio) -> anyhow::Result<Self> {
        let program = Path::new(command.get_program()).file_name();
        let name = program.map_or_else(|| "child".to_owned(), |file| file.display().to_string());
        let logs = tempfile::Builder::new()
            .prefix("remuda-test-log-")
            .tempdir()
            .context("cannot make a folder for logs")?;
        command
            .stdin(stdin)
            .stdout(create(&logs.path().join("stdout"))?)
            .stderr(create(&logs.path().join("stderr"))?);
        let child = spawner::spawn(command).with_context(|| format!("cannot start {name}"))?;
        let pid = Pid::from_raw(child.id() as i32);
        let (sender, exit) = watch::channel(None);
        let observer = std::thread::Builder::new()
            .name(format!("exit-of-{name}"))
            .spawn(move || {
                sender.send_replace(Some(observe_exit(pid)));
            })
            .context("cannot start a thread")?;
        Ok(Self {
            name,
            pid,
            child,
            exit,
            observer: Some(observer),
            logs,
        })
    }

    /// Its process id, which is its group's too. Not given to another process
    /// before this is dropped.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Signals the process alone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill(self.pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Signals its whole group, as a terminal's Ctrl-C does.
    pub fn signal_group(&self, signal: Signal) -> anyhow::Result<()> {
        killpg(self.pid, signal)
            .with_context(|| format!("cannot send {signal} to the group of {}", self.name))
    }

    /// How it ended, if it did.
    pub fn try_exit(&self) -> anyhow::Result<Option<ExitStatus>> {
        let exit = *self.exit.borrow();
        exit.transpose()
            .with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Waits until it has ended.
    pub async fn exited(&self) -> anyhow::Result<ExitStatus> {
        let mut exit = self.exit.clone();
        let seen = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| anyhow!("nothing observes {}", self.name))?;
        match *seen {
            Some(Ok(status)) => Ok(status),
            Some(Err(errno)) => bail!("cannot wait for {}: {errno}", self.name),
            None => bail!("{} has not ended", self.name),
        }
    }

    /// Waits until it has ended; the failure carries the end of its stderr.
    pub async fn wait_exit(&self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        match tokio::time::timeout(timeout, self.exited()).await {
            Ok(status) => status,
            Err(_) => bail!(
                "{} still runs after {timeout:?}; {}",
                self.name,
                self.stderr_tail()
            ),
        }
    }

    /// Blocks until it has ended, at most `timeout`: for `Drop`.
    pub fn block_until_exit(&self, timeout: Duration) {
        let give_up = std::time::Instant::now() + timeout;
        while self.exit.borrow().is_none() && std::time::Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it wrote to stdout up to now.
    pub fn stdout(&self) -> anyhow::Result<Vec<u8>> {
        read(&self.logs.path().join("stdout"))
    }

    /// What it wrote to stderr up to now, for people.
    pub fn stderr(&self) -> anyhow::Result<String> {
        let bytes = read(&self.logs.path().join("stderr"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The end of its log, for failure messages.
    pub fn stderr_tail(&self) -> String {
        let tail = |name: &str| {
            let bytes = read(&self.logs.path().join(name)).unwrap_or_default();
            let from = bytes.len().saturating_sub(LOG_TAIL);
            String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
        };
        // Some servers log to stdout.
        match (tail("stderr"), tail("stdout")) {
            (errors, _) if !errors.is_empty() => format!("its stderr ends with:\n{errors}"),
            (_, output) if !output.is_empty() => format!("its stdout ends with:\n{output}"),
            _ => "it printed nothing".to_owned(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The leader is not reaped yet, so the group's number is still its own.
        let _ = killpg(self.pid, Signal::SIGKILL);
        if let Some(observer) = self.observer.take() {
            let _ = observer.join();
        }
        let _ = self.child.wait();
    }
}

/// Blocks until the process has ended, and leaves it to be reaped: until then
/// its number cannot become another's.
fn observe_exit(pid: Pid) -> Exit {
    loop {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(_, signal, core)) => {
                return Ok(ExitStatus::from_raw(signal as i32 | (i32::from(core) << 7)));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn create(path: &PathBuf) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("cannot create {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
