//! Ranges of user and group ids outside that are 0 to 65535 inside one sandbox.
//!
//! No two live sandboxes of a host share a range, whichever worker made them: workers take blocks
//! of ranges, each held by the lock of a file, and give a range back only when its sandbox is
//! known to be gone.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::error::LocalError;

/// Host-wide, so not within any worker's own folder.
pub(crate) const LOCK_FOLDER: &str = "/run/remuda/ids";

/// The first id of the first range; below 2^31 in all, where old programs still count.
const FIRST: u32 = 1 << 30;
/// Ids in one range.
pub(crate) const RANGE: u32 = 1 << 16;
const RANGES_PER_BLOCK: u32 = 128;
const BLOCKS: u32 = (1 << 30) / RANGE / RANGES_PER_BLOCK;

/// The ranges that this worker may use.
#[derive(Debug, Clone)]
pub(crate) struct IdRanges(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    folder: PathBuf,
    free: Vec<u32>,
    /// Locked files of the blocks that are ours.
    blocks: Vec<(u32, Flock<File>)>,
}

/// One range, given back when dropped.
#[derive(Debug)]
pub(crate) struct IdRange {
    base: u32,
    home: IdRanges,
}

impl IdRange {
    pub(crate) fn base(&self) -> u32 {
        self.base
    }
}

impl Drop for IdRange {
    fn drop(&mut self) {
        let mut state = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.push(self.base);
    }
}

impl IdRanges {
    pub(crate) fn new(folder: &Path) -> Result<Self, LocalError> {
        fs::create_dir_all(folder).map_err(|source| LocalError::LockIdRange {
            path: folder.to_owned(),
            source,
        })?;
        Ok(Self(Arc::new(Mutex::new(State {
            folder: folder.to_owned(),
            free: Vec::new(),
            blocks: Vec::new(),
        }))))
    }

    pub(crate) fn take(&self) -> Result<IdRange, LocalError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.free.is_empty() {
            state.take_block()?;
        }
        let base = state.free.pop().ok_or(LocalError::NoIdRange)?;
        Ok(IdRange {
            base,
            home: self.clone(),
        })
    }
}

impl State {
    fn take_block(&mut self) -> Result<(), LocalError> {
        for block in 0..BLOCKS {
            if self.blocks.iter().any(|(own, _)| *own == block) {
                continue;
            }
            let path = self.folder.join(format!("{block}.lock"));
            if let Some(lock) = try_lock(&path).map_err(|source| LocalError::LockIdRange {
                path: path.clone(),
                source,
            })? {
                self.blocks.push((block, lock));
                let first = block * RANGES_PER_BLOCK;
                let ranges = (first..first + RANGES_PER_BLOCK).rev();
                self.free.extend(ranges.map(|range| FIRST + range * RANGE));
                return Ok(());
            }
        }
        Err(LocalError::NoIdRange)
    }
}

fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn two_workers_never_share_a_range() {
        let folder = tempfile::tempdir().unwrap();
        let workers = [
            IdRanges::new(folder.path()).unwrap(),
            IdRanges::new(folder.path()).unwrap(),
        ];
        let mut taken = Vec::new();
        for _ in 0..=RANGES_PER_BLOCK {
            for worker in &workers {
                taken.push(worker.take().unwrap());
            }
        }
        let bases: HashSet<u32> = taken.iter().map(IdRange::base).collect();
        assert_eq!(bases.len(), taken.len());
        assert!(
            bases
                .iter()
                .all(|base| (base - FIRST).is_multiple_of(RANGE))
        );
    }

    #[test]
    fn a_range_comes_back_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let ranges = IdRanges::new(folder.path()).unwrap();
        let first = ranges.take().unwrap();
        let base = first.base();
        assert_ne!(ranges.take().unwrap().base(), base);
        drop(first);
        assert_eq!(ranges.take().unwrap().base(), base);
    }

    #[test]
    fn the_blocks_end_below_two_to_the_31st() {
        let last = FIRST + (BLOCKS * RANGES_PER_BLOCK - 1) * RANGE;
        assert_eq!(last + (RANGE - 1), (1 << 31) - 1);
    }
}
