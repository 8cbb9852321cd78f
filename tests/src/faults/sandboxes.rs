//! The processes of a worker's sandboxes, as the host sees them.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::leftovers::{Seen, descendants};

/// The first processes of the sandboxes of a worker: their sidecars.
pub(crate) fn sidecars(worker: Pid) -> anyhow::Result<Vec<Seen>> {
    let all = descendants(worker)?;
    Ok(all.into_iter().filter(|seen| is_first(seen.pid)).collect())
}

/// Whether a process is the first of a namespace of its own.
fn is_first(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.is_some_and(|line| {
        let numbers: Vec<&str> = line.split_whitespace().collect();
        numbers.len() > 1 && numbers.last() == Some(&"1")
    })
}

/// Whether some process of a worker has this in its command line.
pub(crate) fn runs(worker: Pid, marker: &str) -> anyhow::Result<bool> {
    let all = descendants(worker)?;
    Ok(all.iter().any(|seen| {
        let line = std::fs::read(format!("/proc/{}/cmdline", seen.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(marker)
    }))
}

/// Signals a process that is still the one that was seen.
pub(crate) fn signal(seen: &Seen, signal: Signal) -> bool {
    seen.runs() && kill(Pid::from_raw(seen.pid), signal).is_ok()
}
