//! Loopback ports that no other test takes, not even while the server that
//! has one is down.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::getuid;

/// Below the range that the kernel hands out to outgoing connections.
const FIRST: u16 = 12_000;
const COUNT: u16 = 18_000;

/// Held for as long as this lives: a lock on a file named after the port,
/// which the kernel lets go of when the process dies.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: Flock<File>,
}

impl Port {
    /// A port that is free now, and ours until dropped.
    pub fn reserve() -> anyhow::Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Test processes start at different places, to not queue for the same.
        let start = (std::process::id() % u32::from(COUNT)) as u16;
        for _ in 0..COUNT {
            let offset = start
                .wrapping_mul(37)
                .wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
            let number = FIRST + offset % COUNT;
            if let Some(lock) = try_lock(number)?
                && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok()
            {
                return Ok(Self {
                    number,
                    _lock: lock,
                });
            }
        }
        bail!(
            "no free loopback port between {FIRST} and {}",
            FIRST + COUNT
        )
    }

    pub fn number(&self) -> u16 {
        self.number
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}

fn try_lock(number: u16) -> anyhow::Result<Option<Flock<File>>> {
    let folder: PathBuf = std::env::temp_dir().join(format!("remuda-test-ports-{}", getuid()));
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(number.to_string());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
}
