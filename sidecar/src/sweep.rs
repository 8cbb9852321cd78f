//! Emptying a folder: whatever its depth, without following links, and in
//! pieces so that the sidecar keeps answering. Nobody else may be changing the
//! folder meanwhile: every process was ended before.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// A sweep under way.
#[derive(Debug)]
pub(crate) struct Sweep {
    here: OwnedFd,
    /// How far below the folder `here` is.
    depth: usize,
    /// Folders that hold what the user may not remove, by inode.
    kept: HashSet<u64>,
    /// Whose files must be gone in the end.
    owner: u32,
}

/// Whether a piece of a sweep was the last one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    More,
    Done,
}

enum Found {
    Nothing { kept: bool },
    Folder(CString),
    BudgetSpent,
}

impl Sweep {
    /// Starts with the folder of an `O_PATH` descriptor.
    pub(crate) fn start(folder: OwnedFd, owner: u32) -> Self {
        Self {
            here: folder,
            depth: 0,
            kept: HashSet::new(),
            owner,
        }
    }

    /// Removes about `budget` entries.
    pub(crate) fn step(&mut self, budget: usize) -> Result<Progress, Errno> {
        let mut budget = budget;
        loop {
            let found = match self.clear_here(&mut budget) {
                // Another user's folder that this one cannot even look into.
                Err(Errno::EACCES) if self.depth > 0 && fstat(&self.here)?.st_uid != self.owner => {
                    Found::Nothing { kept: true }
                }
                other => other?,
            };
            match found {
                Found::BudgetSpent => return Ok(Progress::More),
                Found::Folder(name) => {
                    self.here = enter(&self.here, &name)?;
                    self.depth += 1;
                }
                Found::Nothing { .. } if self.depth == 0 => return Ok(Progress::Done),
                Found::Nothing { kept } => {
                    if kept {
                        self.kept.insert(fstat(&self.here)?.st_ino);
                    }
                    // The next look at the parent removes this folder.
                    self.here = openat(&self.here, c"..", path_flags(), Mode::empty())?;
                    self.depth -= 1;
                }
            }
        }
    }

    /// Removes what can be removed here, until a folder with content is met.
    fn clear_here(&mut self, budget: &mut usize) -> Result<Found, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(&self.here, c".", flags, Mode::empty())?;
        let mut kept = false;
        for entry in dir.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if *budget == 0 {
                return Ok(Found::BudgetSpent);
            }
            *budget -= 1;
            let is_folder = match entry.file_type() {
                Some(kind) => kind == Type::Directory,
                None => is_folder(&self.here, name)?,
            };
            let flag = if is_folder {
                UnlinkatFlags::RemoveDir
            } else {
                UnlinkatFlags::NoRemoveDir
            };
            match unlinkat(&self.here, name, flag) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::ENOTEMPTY | Errno::EEXIST) if is_folder => {
                    if !self.kept.contains(&entry.ino()) {
                        return Ok(Found::Folder(name.to_owned()));
                    }
                    kept = true;
                }
                // Not the user's to remove, so it came with the image: it was
                // there before, and stays.
                Err(errno @ (Errno::EPERM | Errno::EACCES)) => {
                    let about = fstatat(&self.here, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                    if about.st_uid == self.owner {
                        return Err(errno);
                    }
                    kept = true;
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(Found::Nothing { kept })
    }
}

fn path_flags() -> OFlag {
    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// Opens a folder, made accessible first where its owner shut it.
fn enter(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    // The entry is a folder and nobody is left to swap it for a link. Another
    // user's folder cannot be changed, and need not be.
    let open = Mode::S_IRWXU;
    match fchmodat(&parent, name, open, FchmodatFlags::FollowSymlink) {
        Ok(()) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(errno),
    }
    openat(&parent, name, path_flags(), Mode::empty())
}

fn is_folder(parent: impl AsFd, name: &CStr) -> Result<bool, Errno> {
    let about = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(about.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn sweep(path: &std::path::Path, budget: usize) -> usize {
        let folder = nix::fcntl::open(path, path_flags(), Mode::empty()).unwrap();
        let mut sweep = Sweep::start(folder, nix::unistd::Uid::effective().as_raw());
        let mut steps = 1;
        while sweep.step(budget).unwrap() == Progress::More {
            steps += 1;
        }
        steps
    }

    #[test]
    fn empties_and_follows_nothing() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("stays"), "x").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        symlink(outside.path(), path.join("link")).unwrap();
        fs::create_dir_all(path.join("a/b/c")).unwrap();
        symlink(outside.path(), path.join("a/b/link")).unwrap();
        for n in 0..100 {
            fs::write(path.join(format!("a/b/c/{n}")), "x").unwrap();
            fs::create_dir(path.join(format!("d{n}"))).unwrap();
        }
        fs::set_permissions(path.join("a/b"), fs::Permissions::from_mode(0o000)).unwrap();
        assert!(sweep(path, 10) > 10);
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        assert!(outside.path().join("stays").exists());
    }

    #[test]
    fn empties_deeper_than_a_path_can_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut here = nix::fcntl::open(folder.path(), path_flags(), Mode::empty()).unwrap();
        let name = CString::new("d".repeat(100)).unwrap();
        for _ in 0..2000 {
            nix::sys::stat::mkdirat(&here, name.as_c_str(), Mode::S_IRWXU).unwrap();
            here = openat(&here, name.as_c_str(), path_flags(), Mode::empty()).unwrap();
        }
        drop(here);
        sweep(folder.path(), 1000);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
