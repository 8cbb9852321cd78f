//! A small file system in memory, to be filled up.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    path: PathBuf,
}

/// The file that takes what is free.
const BALLAST: &str = "ballast";

impl Volume {
    pub(crate) fn create(path: &Path, bytes: u64) -> anyhow::Result<Self> {
        std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        mount(
            Some("remuda-faults"),
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(format!("size={bytes},mode=755").as_str()),
        )
        .with_context(|| format!("cannot mount a tmpfs on {}", path.display()))?;
        Ok(Self { path: path.into() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes everything that is free; how many bytes that were.
    pub(crate) fn fill(&self) -> anyhow::Result<u64> {
        let path = self.path.join(BALLAST);
        let mut file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let piece = vec![0x5a; 4096];
        let mut taken = 0;
        // Bounded by the volume, which holds no more than it was made with.
        loop {
            match file.write(&piece) {
                Ok(count) => taken += count as u64,
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(taken),
                Err(error) => bail!("cannot fill {}: {error}", path.display()),
            }
        }
    }

    /// Gives back what [`Volume::fill`] took.
    pub(crate) fn empty(&self) -> anyhow::Result<()> {
        let path = self.path.join(BALLAST);
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Unmounts what is mounted beneath a folder: what a killed run left there.
pub(crate) fn sweep(folder: &Path) {
    for line in crate::leftovers::mounts_beneath(folder).unwrap_or_default() {
        if let Some(path) = line.split(' ').nth(4) {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
}
