//! For tests alone, with the feature `failpoints`: what this sidecar let in and what it passed on,
//! one JSON object a line, and points at which it breaks a rule. Nothing without the feature.

use std::io;
use std::os::fd::OwnedFd;

use crate::args::Watch;

/// A call that came to the epoch gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) epoch: u64,
    /// The highest epoch before it.
    pub(crate) highest: u64,
    pub(crate) call: &'static str,
    pub(crate) accepted: bool,
    pub(crate) killed: u32,
}

/// What names a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CommandId {
    pub(crate) epoch: u64,
    pub(crate) pid: i32,
    pub(crate) began: u64,
}

/// Takes the descriptor of the history and sets the points.
#[cfg_attr(
    not(feature = "failpoints"),
    expect(clippy::unnecessary_wraps, reason = "nothing is left of it")
)]
pub(crate) fn begin(watch: &Watch, file: Option<OwnedFd>) -> io::Result<()> {
    #[cfg(feature = "failpoints")]
    active::begin(watch, file)?;
    #[cfg(not(feature = "failpoints"))]
    let _ = (watch, file);
    Ok(())
}

pub(crate) fn entered(entry: Entry) {
    #[cfg(feature = "failpoints")]
    active::entered(entry);
    #[cfg(not(feature = "failpoints"))]
    let _ = entry;
}

/// A command ended, or nobody listens any more; `whole` tells which.
pub(crate) fn wrote(command: CommandId, stdout: &Account, stderr: &Account, whole: bool) {
    #[cfg(feature = "failpoints")]
    active::wrote(command, stdout, stderr, whole);
    #[cfg(not(feature = "failpoints"))]
    let _ = (command, stdout, stderr, whole);
}

/// Whether every epoch is to be let in.
pub(crate) fn no_epoch_check() -> bool {
    #[cfg(feature = "failpoints")]
    let on = active::is_on("sidecar.mutation.epoch_check");
    #[cfg(not(feature = "failpoints"))]
    let on = false;
    on
}

/// Whether a command is to be answered with what is no answer.
pub(crate) fn garbage() -> bool {
    #[cfg(feature = "failpoints")]
    let on = active::is_on("sidecar.garbage");
    #[cfg(not(feature = "failpoints"))]
    let on = false;
    on
}

/// A command is about to be started: here a test makes it hang or die.
pub(crate) fn before_execute() {
    #[cfg(feature = "failpoints")]
    active::step("sidecar.execute");
}

/// Count and digest of one output stream.
#[derive(Debug, Default)]
pub(crate) struct Account {
    #[cfg(feature = "failpoints")]
    bytes: u64,
    #[cfg(feature = "failpoints")]
    digest: sha2::Sha256,
}

impl Account {
    pub(crate) fn add(&mut self, data: &[u8]) {
        #[cfg(feature = "failpoints")]
        {
            use sha2::Digest as _;
            self.bytes += data.len() as u64;
            self.digest.update(data);
        }
        #[cfg(not(feature = "failpoints"))]
        let _ = (self, data);
    }
}

#[cfg(feature = "failpoints")]
mod active {
    use std::fmt::Write as _;
    use std::fs::File;
    use std::io::{self, Write as _};
    use std::os::fd::OwnedFd;
    use std::sync::OnceLock;

    use nix::time::{ClockId, clock_gettime};
    use sha2::Digest as _;

    use super::{Account, CommandId, Entry, Watch};

    struct Log {
        name: String,
        file: File,
    }

    static LOG: OnceLock<Log> = OnceLock::new();

    pub(super) fn begin(watch: &Watch, file: Option<OwnedFd>) -> io::Result<()> {
        // Begun, and never ended. The environment is empty in here.
        std::mem::forget(fail::FailScenario::setup());
        for part in watch.failpoints.split(';').filter(|part| !part.is_empty()) {
            let set = match part.split_once('=') {
                Some((name, actions)) => fail::cfg(name, actions),
                None => Err("is not name=actions".to_owned()),
            };
            set.map_err(|error| io::Error::other(format!("--failpoints {part}: {error}")))?;
        }
        if let Some(file) = file {
            let name = watch.name.clone();
            let file = File::from(file);
            let _first = LOG.set(Log { name, file });
        }
        Ok(())
    }

    pub(super) fn is_on(name: &str) -> bool {
        fail::fail_point!(name, |_| true);
        false
    }

    /// `return` ends the process here.
    pub(super) fn step(name: &str) {
        fail::fail_point!(name, |_| std::process::abort());
    }

    pub(super) fn entered(entry: Entry) {
        append(
            "entered",
            format_args!(
                r#""epoch":{},"highest":{},"call":"{}","accepted":{},"killed":{}"#,
                entry.epoch, entry.highest, entry.call, entry.accepted, entry.killed
            ),
        );
    }

    pub(super) fn wrote(command: CommandId, stdout: &Account, stderr: &Account, whole: bool) {
        append(
            "wrote",
            format_args!(
                concat!(
                    r#""epoch":{},"pid":{},"began":{},"stdout_bytes":{},"stdout_sha256":"{}","#,
                    r#""stderr_bytes":{},"stderr_sha256":"{}","whole":{}"#
                ),
                command.epoch,
                command.pid,
                command.began,
                stdout.bytes,
                hex(stdout),
                stderr.bytes,
                hex(stderr),
                whole
            ),
        );
    }

    fn hex(account: &Account) -> String {
        let mut text = String::new();
        if account.bytes > 0 {
            for byte in account.digest.clone().finalize() {
                let _infallible = write!(text, "{byte:02x}");
            }
        }
        text
    }

    /// The line that `remuda_telemetry::history` reads. The name is an id: nothing in it needs
    /// to be escaped.
    fn append(event: &str, fields: std::fmt::Arguments<'_>) {
        let Some(log) = LOG.get() else { return };
        let name = &log.name;
        let line = format!(
            r#"{{"at":{},"who":"sidecar/{name}","event":"{event}","sandbox":"{name}",{fields}}}"#,
            now()
        ) + "\n";
        if (&log.file).write_all(line.as_bytes()).is_err() {
            // A history with holes would be judged as if it were whole.
            std::process::abort();
        }
    }

    fn now() -> u64 {
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
            let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
            let nanos = u64::try_from(time.tv_nsec()).unwrap_or_default();
            seconds * 1_000_000_000 + nanos
        })
    }
}
