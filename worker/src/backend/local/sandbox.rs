//! One live sandbox as the worker holds it, and its verified end.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::cgroup_fs::{Cgroups, Instance, Memory};
use super::error::LocalError;
use super::id_range::IdRange;
use super::sys;

/// How long a killed sandbox may take to disappear before that is an error.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// A sandbox whose sidecar is ready. Dropped, it is killed and cleaned up in the background.
#[derive(Debug)]
pub struct LocalSandbox {
    // Before the body: the sidecar sees the end of its socket first.
    socket: Option<UnixStream>,
    body: Option<Body>,
}

impl LocalSandbox {
    pub(crate) fn new(socket: UnixStream, mut body: Body) -> Self {
        body.held.cgroups.close_procs();
        Self {
            socket: Some(socket),
            body: Some(body),
        }
    }

    /// The sidecar's socket, ready for an HTTP/2 client. Given out once.
    pub fn take_socket(&mut self) -> Option<UnixStream> {
        self.socket.take()
    }

    /// The sidecar's process id as this process sees it.
    pub fn pid(&self) -> Option<i32> {
        self.body.as_ref().map(|body| body.held.pid)
    }

    /// Resolves when the sandbox's first process, and with it every other, has gone.
    pub async fn died(&self) {
        if let Some(body) = &self.body {
            body.gone().await;
        }
    }

    /// Processes of the sandbox that the kernel killed for want of memory, since the start.
    pub fn oom_kills(&self) -> io::Result<u64> {
        self.memory()?.oom_kills()
    }

    /// How often the sandbox's memory met its limit, since the start.
    pub fn limit_hits(&self) -> io::Result<u64> {
        self.memory()?.limit_hits()
    }

    /// Whether the sandbox's memory was used up at some time since the start or the last reset
    /// of its peak.
    pub fn memory_was_full(&self) -> io::Result<bool> {
        self.memory()?.was_full()
    }

    /// Most bytes of memory in use at once since the start or the last reset.
    pub fn memory_peak(&self) -> io::Result<u64> {
        self.memory()?.peak()
    }

    pub fn reset_memory_peak(&self) -> io::Result<()> {
        self.memory()?.reset_peak()
    }

    fn memory(&self) -> io::Result<&Memory> {
        let body = self.body.as_ref();
        body.and_then(|body| body.held.cgroups.memory())
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "memory is not limited here"))
    }

    /// Kills the sandbox and returns when nothing of it is left.
    pub async fn destroy(mut self) -> Result<(), LocalError> {
        self.socket.take();
        match self.body.take() {
            Some(body) => body.destroy().await,
            None => Ok(()),
        }
    }
}

/// What a sandbox holds of the host. Dropped, it is released in the background, once the
/// sandbox is gone.
#[derive(Debug)]
pub(crate) struct Body {
    watch: AsyncFd<Arc<OwnedFd>>,
    held: Held,
}

#[derive(Debug)]
struct Held {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    cgroups: Cgroups,
    range: Option<IdRange>,
    /// Its folder holds ours.
    instance: Arc<Instance>,
}

impl Body {
    /// Must be called inside a runtime.
    pub(crate) fn new(
        pid: i32,
        pidfd: OwnedFd,
        cgroups: Cgroups,
        range: IdRange,
        instance: Arc<Instance>,
    ) -> Result<Self, LocalError> {
        let pidfd = Arc::new(pidfd);
        let held = Held {
            pid,
            pidfd: pidfd.clone(),
            cgroups,
            range: Some(range),
            instance,
        };
        Ok(Self {
            watch: sys::watch(pidfd).map_err(|source| LocalError::Watch { source })?,
            held,
        })
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.held.pidfd.as_fd()
    }

    pub(crate) async fn gone(&self) {
        // A pidfd becomes readable once and stays so. An error means that the runtime is going
        // down, and with it whoever waits here.
        let _ = self.watch.readable().await;
    }

    pub(crate) async fn destroy(self) -> Result<(), LocalError> {
        kill(self.pidfd())?;
        if timeout(GONE_WITHIN, self.gone()).await.is_err() {
            // Dropping it goes on waiting, and keeps what it holds from being used again.
            return Err(LocalError::KillTimedOut { after: GONE_WITHIN });
        }
        let mut held = self.held;
        let removed = tokio::task::spawn_blocking(move || held.release()).await;
        removed.unwrap_or_else(|error| {
            Err(LocalError::Watch {
                source: io::Error::other(error),
            })
        })
    }
}

impl Held {
    /// Only once every process has gone.
    fn release(&mut self) -> Result<(), LocalError> {
        let removed = self.cgroups.remove();
        // The processes are gone whatever the cgroup's folders do.
        self.range = None;
        removed
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(range) = self.range.take() else {
            return;
        };
        let pid = self.pid;
        let _ = kill(self.pidfd.as_fd());
        let pidfd = self.pidfd.clone();
        let mut cgroups = std::mem::take(&mut self.cgroups);
        let instance = self.instance.clone();
        let clean_up = move || {
            wait_gone(pidfd.as_fd());
            if let Err(error) = cgroups.remove() {
                tracing::warn!(pid, %error, "a dropped sandbox left a cgroup");
            }
            drop(range);
            drop(instance);
        };
        let thread = std::thread::Builder::new().name("sandbox-cleanup".to_owned());
        if let Err(error) = thread.spawn(clean_up) {
            tracing::error!(pid, %error, "cannot clean up after a dropped sandbox");
        }
    }
}

fn kill(pidfd: BorrowedFd<'_>) -> Result<(), LocalError> {
    match sys::pidfd_send_signal(pidfd, libc::SIGKILL) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
            Err(LocalError::Kill { source: error })
        }
        _ => Ok(()),
    }
}

fn wait_gone(pidfd: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::NONE).is_err() {}
}
