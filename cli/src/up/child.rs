//! One supervised child: in a process group of its own, so that a Ctrl-C at
//! the terminal reaches us alone and we stop the parts in order; gone when we
//! are; its log in a file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child as Process, Command};

/// What a failure shows of a log.
const TAIL_BYTES: u64 = 4096;
/// A log that is longer when the fleet starts is put aside.
const MOST_LOG_BYTES: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    #[error("the log {path} cannot be written")]
    Log {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{program} cannot be started")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{name} cannot be waited for")]
    Wait {
        name: &'static str,
        #[source]
        source: io::Error,
    },
}

/// This very program, also when its file was replaced since it started.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// A program and its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// A file that it keeps locked while it runs.
    pub(crate) hold: Option<PathBuf>,
}

#[derive(Debug)]
pub(crate) struct Child {
    name: &'static str,
    process: Process,
    pid: i32,
    log: PathBuf,
}

impl Child {
    /// Starts a program under `remuda supervise`, which makes it end with us.
    /// Must be called from the main thread: the kernel ends the child when the
    /// thread that started it ends.
    pub(crate) fn start(
        name: &'static str,
        invocation: &Invocation,
        log: PathBuf,
    ) -> Result<Self, ChildError> {
        let output = open_log(&log)?;
        let errors = output.try_clone().map_err(|source| ChildError::Log {
            path: log.clone(),
            source,
        })?;
        let mut command = Command::new(OWN_PROGRAM);
        command
            .arg0("remuda")
            .args(["supervise", "--parent", &std::process::id().to_string()]);
        if let Some(file) = &invocation.hold {
            command.arg("--hold").arg(file);
        }
        let process = command
            .arg("--")
            .arg(&invocation.program)
            .args(&invocation.args)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| ChildError::Spawn {
                program: OWN_PROGRAM.into(),
                source,
            })?;
        let pid = process.id().unwrap_or_default() as i32;
        Ok(Self {
            name,
            process,
            pid,
            log,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until it has ended. Can be dropped and called again.
    pub(crate) async fn exited(&mut self) -> Result<ExitStatus, ChildError> {
        let name = self.name;
        self.process
            .wait()
            .await
            .map_err(|source| ChildError::Wait { name, source })
    }

    /// SIGTERM, and SIGKILL when `patience` has run out.
    pub(crate) async fn stop(&mut self, patience: Duration) {
        self.signal(Signal::SIGTERM);
        if tokio::time::timeout(patience, self.process.wait())
            .await
            .is_err()
        {
            crate::out::note(format_args!(
                "{} did not end within {} s and is killed",
                self.name,
                patience.as_secs()
            ));
            self.kill().await;
        }
    }

    pub(crate) async fn kill(&mut self) {
        // Fails only when it has ended.
        let _ = self.process.kill().await;
    }

    fn signal(&self, signal: Signal) {
        // Without an id it has been waited for: its number may be another's.
        if let Some(pid) = self.process.id() {
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log.
    pub(crate) fn log_tail(&self) -> String {
        tail(&self.log).unwrap_or_default()
    }
}

fn open_log(path: &Path) -> Result<File, ChildError> {
    if path.metadata().is_ok_and(|log| log.len() > MOST_LOG_BYTES) {
        let _ = fs::rename(path, path.with_extension("log.old"));
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| ChildError::Log {
            path: path.to_owned(),
            source,
        })
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let cut = len > TAIL_BYTES;
    let whole_lines = match text.split_once('\n') {
        Some((_, rest)) if cut => rest,
        _ => &text,
    };
    Ok(whole_lines.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_whole_lines_from_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(tail(&path).unwrap(), "one\ntwo");
        let lines: Vec<String> = (0..2000).map(|n| format!("line {n}")).collect();
        let long = lines.join("\n") + "\n";
        std::fs::write(&path, &long).unwrap();
        let end = tail(&path).unwrap();
        assert!(end.starts_with("line "), "{end}");
        assert!(end.ends_with("line 1999"), "{end}");
        assert!(end.len() as u64 <= TAIL_BYTES);
    }
}
