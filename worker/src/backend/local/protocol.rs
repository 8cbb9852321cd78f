//! What the worker and its forker say to each other: one MessagePack message per packet of a
//! sequenced-packet socket, descriptors beside it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::sys;

/// Larger than any message: paths are at most 4 KiB.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024;

/// Pairs an answer with its question.
pub(crate) type RequestId = u64;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// The first message. Carries the sidecar's file.
    Setup {
        /// An existing folder to mount the forker's own tree on; nobody else sees that mount.
        mount_point: PathBuf,
    },
    /// Make an image usable as the lower layer of sandboxes.
    Prepare {
        id: RequestId,
        image: TemplateSource,
    },
    /// Start a sandbox. Carries the `cgroup.procs` files that its sidecar inherits.
    Create { id: RequestId, sandbox: SandboxSpec },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum TemplateSource {
    Host,
    Rootfs(PathBuf),
}

/// Everything the child needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SandboxSpec {
    pub(crate) template: TemplateId,
    /// The uid and gid outside that is 0 inside.
    pub(crate) id_base: u32,
    pub(crate) disk_bytes: u64,
    pub(crate) inodes: u64,
    pub(crate) open_files: u32,
    /// For tests: the last of the descriptors is the history's.
    #[cfg(debug_assertions)]
    #[serde(default)]
    pub(crate) watch: Option<Watch>,
}

/// What a test wants to know of a sidecar, or to go wrong in it.
#[cfg(debug_assertions)]
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// Under which name its history is kept.
    pub(crate) name: String,
    pub(crate) failpoints: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TemplateId(pub(crate) u32);

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) id: RequestId,
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Ready,
    Prepared(TemplateId),
    /// Carries the pidfd and the worker's end of the sidecar's socket.
    Created {
        pid: i32,
    },
    Failed {
        step: String,
        errno: i32,
    },
}

/// The id of [`Request::Setup`]'s answer.
pub(crate) const SETUP: RequestId = 0;

pub(crate) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = rmp_serde::to_vec_named(message).map_err(io::Error::other)?;
    sys::send_with_fds(socket, &bytes, fds)
}

/// `None` when the other side has gone.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let Some((length, fds)) = sys::receive_with_fds(socket.as_fd(), buffer)? else {
        return Ok(None);
    };
    let message = rmp_serde::from_slice(&buffer[..length])
        .map_err(|source| io::Error::new(io::ErrorKind::InvalidData, source))?;
    Ok(Some((message, fds)))
}
