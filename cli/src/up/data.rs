//! The data folder of one fleet: one `remuda up` at a time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// How long parts of an earlier fleet, whose `remuda up` was killed, may take
/// to end.
const ORPHANS_PATIENCE: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub(crate) enum DataError {
    #[error("the data folder {path} cannot be made")]
    Make {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} cannot be locked")]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another `remuda up` (process {pid}) runs on the data folder {path}")]
    InUse { path: PathBuf, pid: String },
    #[error("servers of an earlier `remuda up` still run on the data folder {path}")]
    Orphans { path: PathBuf },
}

/// The folders, locked for as long as this lives.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) root: PathBuf,
    _lock: Flock<File>,
}

impl Data {
    pub(super) async fn open(root: &Path) -> Result<Self, DataError> {
        let make = |path: &Path| {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(|source| DataError::Make {
                path: path.to_owned(),
                source,
            })
        };
        make(root)?;
        let root = root.canonicalize().map_err(|source| DataError::Make {
            path: root.to_owned(),
            source,
        })?;
        for folder in ["nats", "redis", "logs", "run", "worker"] {
            make(&root.join(folder))?;
        }
        let lock = take_lock(&root)?;
        await_orphans(&root).await?;
        remove_ports_files(&root.join("run"));
        Ok(Self { root, _lock: lock })
    }

    /// Configuration that we write, and what servers write about themselves.
    pub(super) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    /// The servers hold this while they run.
    pub(super) fn servers_lock(&self) -> PathBuf {
        self.root.join("servers.lock")
    }
}

fn take_lock(root: &Path) -> Result<Flock<File>, DataError> {
    let path = root.join("lock");
    let file = open(&path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For the message of the next one only.
            let _ = lock
                .set_len(0)
                .and_then(|()| write!(*lock, "{}", std::process::id()));
            Ok(lock)
        }
        Err((_, Errno::EWOULDBLOCK)) => Err(DataError::InUse {
            path: root.to_owned(),
            pid: fs::read_to_string(&path)
                .ok()
                .filter(|pid| !pid.is_empty())
                .unwrap_or_else(|| "unknown".to_owned()),
        }),
        Err((_, errno)) => Err(DataError::Lock {
            path,
            source: errno.into(),
        }),
    }
}

/// Two servers on the same files would lose them.
async fn await_orphans(root: &Path) -> Result<(), DataError> {
    let path = root.join("servers.lock");
    let mut file = open(&path)?;
    let give_up = tokio::time::Instant::now() + ORPHANS_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => return Ok(()),
            Err((back, Errno::EWOULDBLOCK)) if tokio::time::Instant::now() < give_up => file = back,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(DataError::Orphans {
                    path: root.to_owned(),
                });
            }
            Err((_, errno)) => {
                return Err(DataError::Lock {
                    path,
                    source: errno.into(),
                });
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn open(path: &Path) -> Result<File, DataError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| DataError::Lock {
            path: path.to_owned(),
            source,
        })
}

/// An earlier server with the same process id must not answer for ours.
fn remove_ports_files(run: &Path) {
    for entry in fs::read_dir(run).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "ports") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_one_is_refused_with_the_first_ones_process() {
        let folder = tempfile::tempdir().unwrap();
        let first = Data::open(folder.path()).await.unwrap();
        let error = Data::open(folder.path()).await.unwrap_err().to_string();
        let pid = std::process::id();
        assert!(
            error.starts_with(&format!("another `remuda up` (process {pid})")),
            "{error}"
        );
        drop(first);
        Data::open(folder.path()).await.unwrap();
    }
}
