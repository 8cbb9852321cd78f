//! From a new process to a sidecar that is ready: the worker's half of what the child says on the
//! socket before it becomes the sidecar.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::error::LocalError;
use super::id_range::RANGE;
use super::step::{FAILURE_LENGTH, MAPS_WRITTEN, READY, STEP_FAILED, StepError, WANT_MAPS};
use super::sys;

/// Returns when the sidecar is ready.
pub(crate) async fn until_ready(
    socket: &mut UnixStream,
    pid: i32,
    pidfd: BorrowedFd<'_>,
    id_base: u32,
) -> Result<(), LocalError> {
    expect(socket, WANT_MAPS).await?;
    write_maps(pid, pidfd, id_base).map_err(|source| LocalError::WriteMaps { pid, source })?;
    let told = socket.write_all(&[MAPS_WRITTEN]).await;
    told.map_err(|_| LocalError::DiedStarting)?;
    expect(socket, READY).await
}

async fn expect(socket: &mut UnixStream, expected: u8) -> Result<(), LocalError> {
    match read::<1>(socket).await? {
        [byte] if byte == expected => Ok(()),
        [STEP_FAILED] => {
            let failure = StepError::decode(read::<FAILURE_LENGTH>(socket).await?);
            Err(match failure {
                Some(StepError { step, source }) => LocalError::Start {
                    step: step.name(),
                    source,
                },
                None => LocalError::DiedStarting,
            })
        }
        [byte] => Err(LocalError::BadGreeting { byte }),
    }
}

async fn read<const N: usize>(socket: &mut UnixStream) -> Result<[u8; N], LocalError> {
    let mut bytes = [0; N];
    match socket.read_exact(&mut bytes).await {
        Ok(_) => Ok(bytes),
        // The end, or a reset: either way nobody is there.
        Err(_) => Err(LocalError::DiedStarting),
    }
}

/// Makes ids 0 to 65535 inside mean a range of the host's that nobody else has.
fn write_maps(pid: i32, pidfd: BorrowedFd<'_>, id_base: u32) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let process = open(format!("/proc/{pid}").as_str(), flags, Mode::empty())?;
    // Alive now means that the folder opened above is this process's, not a successor's.
    sys::pidfd_send_signal(pidfd, 0)?;
    let map = format!("0 {id_base} {RANGE}\n");
    for name in ["uid_map", "gid_map"] {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file: OwnedFd = openat(process.as_fd(), name, flags, Mode::empty())?;
        File::from(file).write_all(map.as_bytes())?;
    }
    Ok(())
}
