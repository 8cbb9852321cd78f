//! The steps between a new process and a ready sandbox, and how the child tells the worker that
//! it reached the next one or which one failed. These bytes precede the sidecar's on its socket.

use std::io;

/// Child to worker: I am in my user namespace, write my maps.
pub(crate) const WANT_MAPS: u8 = b'U';
/// Worker to child: the maps are written.
pub(crate) const MAPS_WRITTEN: u8 = b'G';
/// Child to worker: a step failed; the step's number and the error number follow.
pub(crate) const STEP_FAILED: u8 = b'E';
/// Sidecar to worker: ready for calls.
pub(crate) const READY: u8 = b'R';

/// Bytes after [`STEP_FAILED`].
pub(crate) const FAILURE_LENGTH: usize = 5;

macro_rules! steps {
    ($($variant:ident = $text:literal),+ $(,)?) => {
        /// What the child was doing when something failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Step { $($variant),+ }

        impl Step {
            const ALL: &[Self] = &[$(Self::$variant),+];

            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

steps! {
    Loopback = "bring loopback up",
    Hostname = "set the host name",
    Storage = "mount the writable layer",
    Folders = "make the writable folders",
    Overlay = "mount the overlay",
    Trees = "bind the system folders",
    Proc = "mount /proc",
    MaskProc = "mask /proc",
    Devices = "bind /dev",
    Pivot = "change the root",
    Stdio = "open /dev/null",
    Resources = "set resource limits",
    Descriptors = "arrange descriptors",
    UserNamespace = "enter the user namespace",
    Maps = "wait for the user and group maps",
    Identity = "become the sandbox's root user",
    NoNesting = "forbid nested user namespaces",
    Session = "start a session",
    ParentDeath = "tie the sandbox to its forker",
    Exec = "execute the sidecar",
}

/// A step and why it failed.
#[derive(Debug)]
pub(crate) struct StepError {
    pub(crate) step: Step,
    pub(crate) source: io::Error,
}

impl StepError {
    pub(crate) fn encode(&self) -> [u8; 1 + FAILURE_LENGTH] {
        let errno = self.source.raw_os_error().unwrap_or(0).to_le_bytes();
        let [a, b, c, d] = errno;
        [STEP_FAILED, self.step as u8, a, b, c, d]
    }

    /// `None` when the step is unknown: another build's forker.
    pub(crate) fn decode(bytes: [u8; FAILURE_LENGTH]) -> Option<Self> {
        let [step, errno @ ..] = bytes;
        Some(Self {
            step: *Step::ALL.get(usize::from(step))?,
            source: io::Error::from_raw_os_error(i32::from_le_bytes(errno)),
        })
    }
}

/// Names the step of a failed call.
pub(crate) trait At<T> {
    fn at(self, step: Step) -> Result<T, StepError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, StepError> {
        self.map_err(|source| StepError {
            step,
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_wire() {
        for &step in Step::ALL {
            let error = StepError {
                step,
                source: io::Error::from_raw_os_error(28),
            };
            let bytes = error.encode();
            assert_eq!(bytes[0], STEP_FAILED);
            let decoded = StepError::decode(bytes[1..].try_into().unwrap()).unwrap();
            assert_eq!(decoded.step, step);
            assert_eq!(decoded.source.raw_os_error(), Some(28));
        }
    }

    #[test]
    fn an_unknown_step_is_refused() {
        assert!(StepError::decode([200, 1, 0, 0, 0]).is_none());
    }
}
