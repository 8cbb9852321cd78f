//! What the sidecar gives up before it listens to anybody.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, setgroups};

use crate::args::Settings;
use crate::seccomp::{self, FilterError};
use crate::sys;

/// The descriptors that the launcher named.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) socket: OwnedFd,
    pub(crate) cgroups: Vec<OwnedFd>,
    /// Only for tests.
    pub(crate) history: Option<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum HardenError {
    #[error("cannot take inherited descriptor {fd}")]
    Descriptor { fd: RawFd, source: io::Error },
    #[error("cannot open the null device or mark descriptors close-on-exec")]
    Descriptors { source: io::Error },
    #[error("cannot {what}")]
    Restrict {
        what: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Filter(#[from] FilterError),
}

/// Takes ownership of the named descriptors; every other one becomes
/// close-on-exec, so that no command sees it.
pub(crate) fn take_descriptors(settings: &Settings) -> Result<Inherited, HardenError> {
    sys::fill_standard_descriptors().map_err(|source| HardenError::Descriptors { source })?;
    let take =
        |fd| sys::take_descriptor(fd).map_err(|source| HardenError::Descriptor { fd, source });
    let inherited = Inherited {
        socket: take(settings.socket)?,
        cgroups: settings
            .cgroups
            .iter()
            .copied()
            .map(take)
            .collect::<Result<_, _>>()?,
        history: settings.watch.history.map(take).transpose()?,
    };
    sys::close_all_on_exec().map_err(|source| HardenError::Descriptors { source })?;
    Ok(inherited)
}

/// Gives up, for itself and for every command: being inspected, new
/// privileges, groups, capabilities, and the filtered system calls.
pub(crate) fn restrict(settings: &Settings) -> Result<(), HardenError> {
    let failed = |what| {
        move |errno: nix::Error| HardenError::Restrict {
            what,
            source: errno.into(),
        }
    };
    sys::default_signals();
    umask(Mode::from_bits_truncate(0o022));
    prctl::set_dumpable(false).map_err(failed("become undumpable"))?;
    if std::process::id() != 1 {
        // Orphans come to whoever is to end them; PID 1 gets them anyway.
        prctl::set_child_subreaper(true).map_err(failed("become the reaper of orphans"))?;
    }
    prctl::set_no_new_privs().map_err(failed("set no-new-privileges"))?;
    if let Some(user) = settings.user {
        setgroups(&[Gid::from_raw(user.gid)]).map_err(failed("leave the supplementary groups"))?;
        sys::drop_capabilities().map_err(|source| HardenError::Restrict {
            what: "drop capabilities",
            source,
        })?;
    }
    if settings.seccomp {
        seccomp::install()?;
    }
    Ok(())
}
