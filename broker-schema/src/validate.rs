//! What a request must be before anybody spends a sandbox on it. The client
//! checks before it publishes, the dispatcher before it claims, the worker
//! before it runs: the same rules, in one place.

use crate::{Blob, Command, ErrorCode, ErrorInfo, Step, StepKind, TaskRequest};

/// The largest request that a fleet takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub steps: usize,
    pub argv: usize,
    pub env: usize,
    pub timeout_ms: u64,
    pub output_limit: u64,
    pub read_limit: u64,
    pub path_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            steps: 1024,
            argv: 4096,
            env: 4096,
            timeout_ms: 24 * 3_600_000,
            output_limit: 4 << 30,
            read_limit: 256 << 20,
            path_bytes: 4095,
        }
    }
}

/// Everything that is wrong with a request; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct Invalid(pub Vec<ErrorInfo>);

impl Invalid {
    /// The first problem, with the number of the others in its message.
    pub fn into_info(self) -> ErrorInfo {
        let others = self.0.len().saturating_sub(1);
        let mut first =
            self.0.into_iter().next().unwrap_or_else(|| {
                ErrorInfo::new(ErrorCode::InvalidField, "the request is not valid")
            });
        if others > 0 {
            first.message = format!("{} (and {others} more problems)", first.message);
        }
        first
    }
}

impl TaskRequest {
    /// Checks everything that can be known without a fleet.
    pub fn validate(&self, limits: &Limits) -> Result<(), Invalid> {
        let mut check = Check {
            limits,
            found: Vec::new(),
        };
        check.task(self);
        if check.found.is_empty() {
            Ok(())
        } else {
            Err(Invalid(check.found))
        }
    }
}

struct Check<'a> {
    limits: &'a Limits,
    found: Vec<ErrorInfo>,
}

impl Check<'_> {
    /// More would only make the answer long.
    const MOST_PROBLEMS: usize = 32;

    fn add(&mut self, code: ErrorCode, field: String, message: impl Into<String>) {
        if self.found.len() < Self::MOST_PROBLEMS {
            self.found.push(ErrorInfo::new(code, message).at(field));
        }
    }

    fn task(&mut self, task: &TaskRequest) {
        // Without steps a session is opened, closed, or merely kept from idling.
        if task.steps.is_empty() && task.session.is_none() && task.keep_alive.is_none() {
            self.add(
                ErrorCode::InvalidField,
                "steps".into(),
                "has no steps, give at least one",
            );
        }
        if task.steps.len() > self.limits.steps {
            self.add(
                ErrorCode::InvalidField,
                "steps".into(),
                format!(
                    "has {} steps, at most {} are taken",
                    task.steps.len(),
                    self.limits.steps
                ),
            );
        }
        self.timeout("timeout_ms", task.timeout_ms);
        if task.deadline.is_some_and(|deadline| deadline.0 == 0) {
            self.add(
                ErrorCode::InvalidTimeout,
                "deadline".into(),
                "is zero, leave it out for none",
            );
        }
        self.retries(task);
        self.group(task);
        if let Some(keep) = task.keep_alive {
            self.timeout("keep_alive.idle_timeout_ms", Some(keep.idle_timeout_ms));
            self.timeout("keep_alive.max_life_ms", Some(keep.max_life_ms));
            if task.session.is_some() {
                self.add(
                    ErrorCode::InvalidField,
                    "keep_alive".into(),
                    "stands beside session: a session is kept already",
                );
            }
        }
        if task.close_session && task.session.is_none() {
            self.add(
                ErrorCode::InvalidField,
                "close_session".into(),
                "needs session, the session to close",
            );
        }
        self.env("env", task.env.iter());
        for (index, step) in task.steps.iter().enumerate().take(self.limits.steps) {
            self.step(index, step);
        }
    }

    fn retries(&mut self, task: &TaskRequest) {
        if task.retries > TaskRequest::MOST_RETRIES {
            self.add(
                ErrorCode::InvalidField,
                "retries".into(),
                format!(
                    "is {}, at most {} are made",
                    task.retries,
                    TaskRequest::MOST_RETRIES
                ),
            );
        } else if task.retries > 0 && (task.session.is_some() || task.keep_alive.is_some()) {
            self.add(
                ErrorCode::InvalidField,
                "retries".into(),
                "stands beside a session, whose sandbox no fresh one can replace",
            );
        }
    }

    fn group(&mut self, task: &TaskRequest) {
        let most = TaskRequest::MOST_GROUP;
        for (field, number) in [
            ("group_size", task.group_size),
            ("min_valid", task.min_valid),
        ] {
            let Some(number) = number else { continue };
            if !(1..=most).contains(&number) {
                self.add(
                    ErrorCode::InvalidField,
                    field.into(),
                    format!("is {number}, expected 1 to {most}"),
                );
            } else if task.group.is_none() {
                self.add(
                    ErrorCode::InvalidField,
                    field.into(),
                    "needs group, the group that it speaks of",
                );
            }
        }
        if let (Some(size), Some(valid)) = (task.group_size, task.min_valid)
            && valid > size
        {
            self.add(
                ErrorCode::InvalidField,
                "min_valid".into(),
                format!("is {valid}, more than the {size} tasks that the group has"),
            );
        }
        let most = TaskRequest::MOST_WEIGHT;
        if let Some(weight) = task
            .run_weight
            .filter(|weight| !(1..=most).contains(weight))
        {
            self.add(
                ErrorCode::InvalidField,
                "run_weight".into(),
                format!("is {weight}, expected 1 to {most}"),
            );
        }
    }

    fn step(&mut self, index: usize, step: &Step) {
        let at = format!("steps[{index}].action.{}", step.action.name());
        match &step.action {
            StepKind::Command(command) => self.command(&at, command),
            StepKind::FilePatch(patch) => {
                self.path(&format!("{at}.path"), &patch.path);
                if let Some(mode) = patch.mode.filter(|mode| mode & !0o777 != 0) {
                    self.add(
                        ErrorCode::InvalidField,
                        format!("{at}.mode"),
                        format!("is {mode:#o}, only permission bits up to 0o777 are taken"),
                    );
                }
            }
            StepKind::FileRead(read) => {
                self.path(&format!("{at}.path"), &read.path);
                if read
                    .limit
                    .is_some_and(|limit| limit > self.limits.read_limit)
                {
                    self.add(
                        ErrorCode::InvalidField,
                        format!("{at}.limit"),
                        format!("is more than {} bytes", self.limits.read_limit),
                    );
                }
            }
        }
    }

    fn command(&mut self, at: &str, command: &Command) {
        let argv = format!("{at}.argv");
        if command.argv.first().is_none_or(Blob::is_empty) {
            self.add(
                ErrorCode::EmptyArgv,
                argv.clone(),
                "names no program, give at least one argument that is not empty",
            );
        }
        if command.argv.len() > self.limits.argv {
            self.add(
                ErrorCode::InvalidField,
                argv.clone(),
                format!(
                    "has {} arguments, at most {} are taken",
                    command.argv.len(),
                    self.limits.argv
                ),
            );
        }
        if let Some(index) = command.argv.iter().position(|arg| arg.0.contains(&0)) {
            self.nul(format!("{argv}[{index}]"));
        }
        self.env(&format!("{at}.env"), command.env.iter());
        if let Some(dir) = &command.work_dir {
            self.path(&format!("{at}.work_dir"), dir);
        }
        self.timeout(&format!("{at}.timeout_ms"), command.timeout_ms);
        if command
            .output_limit
            .is_some_and(|limit| limit > self.limits.output_limit)
        {
            self.add(
                ErrorCode::InvalidField,
                format!("{at}.output_limit"),
                format!("is more than {} bytes", self.limits.output_limit),
            );
        }
    }

    fn env<'e>(&mut self, at: &str, env: impl ExactSizeIterator<Item = (&'e String, &'e Blob)>) {
        if env.len() > self.limits.env {
            self.add(
                ErrorCode::InvalidField,
                at.to_owned(),
                format!(
                    "has {} entries, at most {} are taken",
                    env.len(),
                    self.limits.env
                ),
            );
        }
        for (name, value) in env.take(self.limits.env) {
            if name.is_empty() || name.contains('=') {
                self.add(
                    ErrorCode::InvalidField,
                    format!("{at}.{name}"),
                    "is no name of an environment variable (empty, or with '=')",
                );
            }
            if name.contains('\0') || value.0.contains(&0) {
                self.nul(format!("{at}.{}", name.replace('\0', "\\0")));
            }
        }
    }

    fn path(&mut self, at: &str, path: &str) {
        if path.is_empty() || path.len() > self.limits.path_bytes {
            self.add(
                ErrorCode::InvalidField,
                at.to_owned(),
                format!(
                    "has {} bytes, expected 1 to {}",
                    path.len(),
                    self.limits.path_bytes
                ),
            );
        } else if path.contains('\0') {
            self.nul(at.to_owned());
        } else if escapes(path) {
            self.add(
                ErrorCode::PathEscapes,
                at.to_owned(),
                format!("{path:?} leads out of the sandbox"),
            );
        }
    }

    fn nul(&mut self, at: String) {
        self.add(
            ErrorCode::NulByte,
            at,
            "holds a NUL byte, which no program can be given",
        );
    }

    fn timeout(&mut self, at: &str, millis: Option<u64>) {
        match millis {
            Some(0) => self.add(
                ErrorCode::InvalidTimeout,
                at.to_owned(),
                "is zero, leave it out for the default",
            ),
            Some(millis) if millis > self.limits.timeout_ms => self.add(
                ErrorCode::InvalidTimeout,
                at.to_owned(),
                format!(
                    "is {millis} ms, at most {} ms are taken",
                    self.limits.timeout_ms
                ),
            ),
            _ => {}
        }
    }
}

/// Whether `path` climbs above the root, or above `/workspace` where it is
/// relative. Links are the sidecar's to judge.
fn escapes(path: &str) -> bool {
    let mut depth = 0_i32;
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => depth -= 1,
            _ => depth += 1,
        }
        if depth < 0 {
            return true;
        }
    }
    false
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
