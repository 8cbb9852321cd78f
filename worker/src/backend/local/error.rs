//! What can go wrong with local sandboxes, by operation.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A limit of a pool, by the name it has in the pool's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    Memory,
    Pids,
    Cpus,
    Disk,
    Inodes,
}

impl fmt::Display for Limit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Memory => "memory_bytes",
            Self::Pids => "pids",
            Self::Cpus => "cpus",
            Self::Disk => "disk_bytes",
            Self::Inodes => "inodes",
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalError {
    #[error("local sandboxes need root; run the worker as root or choose another backend")]
    NotRoot,
    #[error("cannot open the sidecar {path:?}; build it or set its path")]
    OpenSidecar {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot use {path:?} as state folder")]
    StateDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the forker {path:?}")]
    StartForker {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The sandboxes that it made are gone too. Start a new launcher.
    #[error("the forker has ended, and its sandboxes with it")]
    ForkerLost,
    #[error("cannot reach the forker")]
    AskForker {
        #[source]
        source: io::Error,
    },
    #[error("the forker could not {step}")]
    Forker {
        step: String,
        #[source]
        source: io::Error,
    },
    #[error("image folder {path:?} is not absolute")]
    RelativeImage { path: PathBuf },
    #[error("cannot use image {image}")]
    Image {
        image: String,
        #[source]
        source: io::Error,
    },
    #[error("limit {limit} cannot be enforced on this host: {why}")]
    LimitUnenforceable { limit: Limit, why: String },
    #[error("limit {limit} of {value} is out of range: {why}")]
    BadLimit {
        limit: Limit,
        value: String,
        why: &'static str,
    },
    #[error("cannot make cgroup {path:?}")]
    MakeCgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cgroup {path:?} is still in use after {after:?}")]
    CgroupBusy { path: PathBuf, after: Duration },
    #[error("no free range of user ids is left on this host")]
    NoIdRange,
    #[error("cannot lock a block of user ids in {path:?}")]
    LockIdRange {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the sandbox could not {step}")]
    Start {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot write the user and group maps of process {pid}")]
    WriteMaps {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("the sandbox ended before it was ready")]
    DiedStarting,
    #[error("the sandbox sent byte {byte:#04x} where it should have said that it is ready")]
    BadGreeting { byte: u8 },
    #[error("the sandbox was not ready within {after:?}")]
    StartTimedOut { after: Duration },
    #[error("the sandbox was still alive {after:?} after it was killed")]
    KillTimedOut { after: Duration },
    #[error("cannot kill the sandbox")]
    Kill {
        #[source]
        source: io::Error,
    },
    #[error("cannot watch the sandbox")]
    Watch {
        #[source]
        source: io::Error,
    },
}
