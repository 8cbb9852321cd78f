//! Why a command did not do what it was asked to: what, its stable code, what
//! to do about it, and the exit status that says so.

use std::error::Error;
use std::fmt;

use broker_schema::{ErrorCode, ErrorInfo};
use remuda_telemetry::Chain;

/// Exit statuses, as `--help` tells them.
pub(crate) mod exit {
    pub(crate) const FAILED: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const TIMED_OUT: u8 = 124;
    /// `remuda run`: not the command's own doing.
    pub(crate) const NOT_THE_COMMANDS: u8 = 125;
    pub(crate) const OOM_KILLED: u8 = 137;
    pub(crate) const INTERRUPTED: u8 = 130;
}

/// A command's failure, as a person and a script need it.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    code: Option<ErrorCode>,
    mend: Option<String>,
    exit: u8,
    quiet: bool,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            code: None,
            mend: None,
            exit: exit::FAILED,
            quiet: false,
        }
    }

    /// An error with everything that caused it.
    pub(crate) fn chain(error: &(dyn Error + 'static)) -> Self {
        Self::new(Chain(error).to_string())
    }

    pub(crate) fn because(what: impl fmt::Display, error: &(dyn Error + 'static)) -> Self {
        Self::new(format!("{what}: {}", Chain(error)))
    }

    /// What the caller asked for makes no sense.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self {
            exit: exit::USAGE,
            ..Self::new(what)
        }
    }

    /// Whoever read our output has gone: nothing to tell, nothing went wrong.
    pub(crate) fn reader_gone() -> Self {
        Self {
            exit: 0,
            quiet: true,
            ..Self::new("the reader of the output has gone")
        }
    }

    /// Everything has been said already; only the status is left.
    pub(crate) fn silent(exit: u8) -> Self {
        Self {
            exit,
            quiet: true,
            ..Self::new("")
        }
    }

    #[must_use]
    pub(crate) fn code(mut self, code: ErrorCode) -> Self {
        self.code = Some(code);
        self
    }

    #[must_use]
    pub(crate) fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }

    #[must_use]
    pub(crate) fn exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    pub(crate) fn status(&self) -> u8 {
        self.exit
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }
}

impl From<ErrorInfo> for Failure {
    fn from(info: ErrorInfo) -> Self {
        let what = match &info.field {
            Some(field) => format!("{field}: {}", info.message),
            None => info.message,
        };
        Self::new(what).code(info.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if let Some(code) = self.code {
            write!(f, " [{code}]")?;
        }
        if let Some(mend) = &self.mend {
            write!(f, "\n  {mend}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_code_and_mend() {
        let failure = Failure::from(
            ErrorInfo::new(ErrorCode::UnknownPool, "no pool is called \"x\"").at("pool"),
        )
        .mend("see `remuda pool ls`");
        assert_eq!(
            failure.to_string(),
            "error: pool: no pool is called \"x\" [unknown_pool]\n  see `remuda pool ls`"
        );
        assert_eq!(failure.status(), exit::FAILED);
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        assert_eq!(Failure::reader_gone().status(), 0);
        assert!(Failure::reader_gone().is_quiet());
    }
}
