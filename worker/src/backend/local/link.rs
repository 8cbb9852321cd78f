//! The worker's side of the forker: starts it, asks it, and hands each answer to its asker.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use tokio::sync::{oneshot, watch};

use super::error::LocalError;
use super::forker::FORKER_ARGUMENT;
use super::protocol::{self, MAX_MESSAGE, Outcome, Reply, Request, RequestId, SETUP};

/// An answer and its descriptors.
pub(crate) type Answer = (Outcome, Vec<OwnedFd>);

type Waiting = Mutex<Option<HashMap<RequestId, oneshot::Sender<Answer>>>>;

/// A handle on one forker. When the last one goes, the forker ends.
#[derive(Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    next: AtomicU64,
    ended: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    /// `None` once the forker has gone.
    waiting: Waiting,
}

impl Link {
    pub(crate) async fn start(
        exe: &Path,
        sidecar: File,
        mount_point: PathBuf,
    ) -> Result<Self, LocalError> {
        let failed = |source| LocalError::StartForker {
            path: exe.to_owned(),
            source,
        };
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|errno| failed(errno.into()))?;
        let (ready, setup) = oneshot::channel();
        let shared = Arc::new(Shared {
            socket: ours,
            waiting: Mutex::new(Some(HashMap::from([(SETUP, ready)]))),
        });
        let (spawned, was_spawned) = oneshot::channel();
        let (end, ended) = watch::channel(false);
        let mut command = Command::new(exe);
        command
            .arg(FORKER_ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        let reader = shared.clone();
        // A thread, not a task: the kernel ends the forker with the thread that started it.
        std::thread::Builder::new()
            .name("sandbox-forker".to_owned())
            .spawn(move || {
                let child = command.spawn();
                // Holds our copy of the forker's end.
                drop(command);
                match child {
                    Ok(mut child) => {
                        let _ = spawned.send(Ok(()));
                        reader.read();
                        reader.close();
                        let _ = child.wait();
                    }
                    Err(error) => {
                        let _ = spawned.send(Err(error));
                    }
                }
                let _ = end.send(true);
            })
            .map_err(failed)?;
        let link = Self {
            shared,
            next: AtomicU64::new(SETUP + 1),
            ended,
        };
        was_spawned
            .await
            .map_err(|_| LocalError::ForkerLost)?
            .map_err(failed)?;
        link.send(&Request::Setup { mount_point }, &[sidecar.as_fd()])?;
        expect_success(setup.await.map_err(|_| LocalError::ForkerLost)?)?;
        Ok(link)
    }

    /// Asks and waits for the answer. A failure of the forker's is an error.
    pub(crate) async fn ask(
        &self,
        request: impl FnOnce(RequestId) -> Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, LocalError> {
        self.ask_now(request, fds)?.wait().await
    }

    /// Asks; the answer can be waited for without holding the descriptors.
    pub(crate) fn ask_now(
        &self,
        request: impl FnOnce(RequestId) -> Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Pending, LocalError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.shared
            .lock()
            .as_mut()
            .ok_or(LocalError::ForkerLost)?
            .insert(id, sender);
        if let Err(error) = self.send(&request(id), fds) {
            if let Some(waiting) = self.shared.lock().as_mut() {
                waiting.remove(&id);
            }
            return Err(error);
        }
        Ok(Pending(answer))
    }

    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), LocalError> {
        protocol::send(self.shared.socket.as_fd(), request, fds).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EPIPE | libc::ECONNRESET) => LocalError::ForkerLost,
                _ => LocalError::AskForker { source },
            }
        })
    }

    /// Ends the forker and waits until it has gone.
    pub(crate) async fn stop(&self) {
        self.shared.hang_up();
        let mut ended = self.ended.clone();
        // An error means that the thread has gone, which is as good.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.hang_up();
    }
}

/// An answer that has not come yet.
#[derive(Debug)]
pub(crate) struct Pending(oneshot::Receiver<Answer>);

impl Pending {
    pub(crate) async fn wait(self) -> Result<Answer, LocalError> {
        expect_success(self.0.await.map_err(|_| LocalError::ForkerLost)?)
    }
}

fn expect_success((outcome, fds): Answer) -> Result<Answer, LocalError> {
    match outcome {
        Outcome::Failed { step, errno } => Err(LocalError::Forker {
            step,
            source: std::io::Error::from_raw_os_error(errno),
        }),
        outcome => Ok((outcome, fds)),
    }
}

impl Shared {
    fn lock(
        &self,
    ) -> std::sync::MutexGuard<'_, Option<HashMap<RequestId, oneshot::Sender<Answer>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            match protocol::receive::<Reply>(&self.socket, &mut buffer) {
                Ok(Some((reply, fds))) => {
                    let asker = self.lock().as_mut().and_then(|all| all.remove(&reply.id));
                    if let Some(asker) = asker {
                        // Who has stopped waiting drops the descriptors, and so the sandbox.
                        let _ = asker.send((reply.outcome, fds));
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "lost the sandbox forker");
                    return;
                }
            }
        }
    }

    /// Lets every asker know that no answer will come.
    fn close(&self) {
        self.lock().take();
        self.hang_up();
    }

    fn hang_up(&self) {
        // Fails only when it has been shut down before.
        let _ = shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.socket),
            Shutdown::Both,
        );
    }
}
