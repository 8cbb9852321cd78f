//! The part that only test builds have.

use std::fs;
use std::sync::Once;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::known;

/// Sets the points of the variable `FAILPOINTS` and of an option, `name=actions;…` both. They are
/// the process's for its life.
pub(crate) fn set_up(option: Option<&str>) -> Result<(), String> {
    // Begun once, and never ended: a second scenario would wait for the end of the first.
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| std::mem::forget(fail::FailScenario::setup()));
    apply(option.unwrap_or_default())
}

fn apply(points: &str) -> Result<(), String> {
    for part in points.split(';') {
        let part = part.trim();
        if part.is_empty() {
            continue;
        }
        let (name, actions) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is not name=actions"))?;
        fail::cfg(name, actions).map_err(|error| format!("{part:?}: {error}"))?;
    }
    match fail::list().into_iter().find(|(name, _)| !known(name)) {
        Some((name, _)) => Err(format!("there is no point {name:?}")),
        None => Ok(()),
    }
}

pub(super) fn of_sidecars() -> String {
    let points = fail::list();
    let of_sidecars = points
        .iter()
        .filter(|(name, _)| name.starts_with("sidecar."));
    of_sidecars
        .map(|(name, actions)| format!("{name}={actions}"))
        .collect::<Vec<_>>()
        .join(";")
}

pub(super) fn is_on(name: &str) -> bool {
    fail::fail_point!(name, |_| true);
    false
}

pub(super) fn step(name: &str) {
    fail::fail_point!(name, |token| act(name, token.as_deref()));
}

/// `return` kills the process. `return(FILE)` does so where it can take that file away: once for
/// each time that a test puts it there, however often the process is started again.
/// `return(stop:FILE)` stops it instead, until somebody sends SIGCONT.
fn act(name: &str, token: Option<&str>) {
    let (signal, file) = match token.map(|token| (token.strip_prefix("stop:"), token)) {
        None => (Signal::SIGKILL, None),
        Some((Some(file), _)) => (Signal::SIGSTOP, Some(file)),
        Some((None, file)) => (Signal::SIGKILL, Some(file)),
    };
    if file.is_some_and(|file| fs::remove_file(file).is_err()) {
        return;
    }
    tracing::warn!(point = name, %signal, "as told by a test");
    // It is delivered before the call returns.
    let _ = kill(Pid::this(), signal);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failpoint::worker;

    #[test]
    fn points_are_checked_and_set() {
        let error = set_up(Some("worker.fetchd=return")).unwrap_err();
        assert_eq!(error, "there is no point \"worker.fetchd\"");
        fail::remove("worker.fetchd");
        for wrong in ["worker.fetched", "worker.fetched=what"] {
            assert!(apply(wrong).unwrap_err().contains("worker.fetched"));
        }
        apply(" worker.zombie=1*off->return; sidecar.execute=off;").unwrap();
        assert!(!is_on(worker::ZOMBIE));
        assert!(is_on(worker::ZOMBIE));
        assert!(!is_on(worker::NO_RESET));
        assert_eq!(of_sidecars(), "sidecar.execute=off");
        // A file that is not there: nothing happens.
        fail::cfg(worker::FETCHED, "return(/no/such/file)").unwrap();
        step(worker::FETCHED);
    }
}
