//! Carries out cgroup plans: the folders of this worker and of its sandboxes.
//!
//! `<mount>/remuda/<instance>/<sandbox>`. A worker holds a lock on its instance folders while it
//! lives; whoever gets the lock of another's folder knows that its worker is dead and removes it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::{CgroupHost, Controller, Folder, Plan, Version};
use super::error::LocalError;

const PARENT: &str = "remuda";
/// How long removal of a folder is tried: its last process may still be on its way out.
pub(crate) const REMOVE_WITHIN: Duration = Duration::from_secs(5);
const REMOVE_PAUSE: Duration = Duration::from_millis(1);

/// What this host's cgroups offer, read from the kernel.
pub(crate) fn detect() -> CgroupHost {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut host = CgroupHost::parse(&mountinfo, |path| {
        fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default()
    });
    host.swap_accounting = host
        .find(Controller::Memory)
        .is_some_and(|mounted| mounted.path.join("memory.memsw.limit_in_bytes").exists());
    host
}

fn made(path: &Path) -> impl Fn(io::Error) -> LocalError {
    move |source| LocalError::MakeCgroup {
        path: path.to_owned(),
        source,
    }
}

/// The folders of one worker, locked while it lives.
#[derive(Debug)]
pub(crate) struct Instance {
    name: String,
    locks: Vec<(PathBuf, Flock<File>)>,
}

impl Instance {
    /// Removes what dead workers left, and makes and locks this worker's folders.
    pub(crate) fn new(host: &CgroupHost, name: String) -> Result<Self, LocalError> {
        let mut locks = Vec::new();
        for mount in host.mounts() {
            let parent = mount.path.join(PARENT);
            let folder = parent.join(&name);
            if mount.version == Version::V2 {
                enable(host.controllers_on(mount), &mount.path).map_err(made(&mount.path))?;
            }
            make(&parent).map_err(made(&parent))?;
            remove_left_overs(&parent);
            let lock = make_locked(&folder).map_err(made(&folder))?;
            if mount.version == Version::V2 {
                for path in [&parent, &folder] {
                    enable(host.controllers_on(mount), path).map_err(made(path))?;
                }
            }
            locks.push((folder, lock));
        }
        Ok(Self { name, locks })
    }

    /// Makes the folders of one sandbox. On an error, `cgroups` has those that were made.
    pub(crate) fn create(
        &self,
        plan: &Plan,
        sandbox: &str,
        cgroups: &mut Cgroups,
    ) -> Result<(), LocalError> {
        for folder in &plan.folders {
            let path = folder.mount.join(PARENT).join(&self.name).join(sandbox);
            fs::create_dir(&path).map_err(made(&path))?;
            cgroups.paths.push(path.clone());
            fill(folder, &path, cgroups)?;
        }
        Ok(())
    }

    /// Ends whatever is left in this worker's folders and removes them. What a sandbox's owner
    /// did not come to, because its process is ending, is done here.
    pub(crate) fn remove_all(&self) {
        for (path, _) in &self.locks {
            for sandbox in subfolders(path) {
                remove_populated(&sandbox);
            }
        }
        self.remove();
    }

    fn remove(&self) {
        for (path, _) in &self.locks {
            let _ = fs::remove_dir(path);
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The folders of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    paths: Vec<PathBuf>,
    /// Open for writing: writing `0` moves the writer in.
    procs: Vec<OwnedFd>,
    memory: Option<Memory>,
}

impl Cgroups {
    pub(crate) fn procs(&self) -> Vec<BorrowedFd<'_>> {
        self.procs.iter().map(|fd| fd.as_fd()).collect()
    }

    /// The sidecar has its own copies by now.
    pub(crate) fn close_procs(&mut self) {
        self.procs.clear();
    }

    pub(crate) fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// Removes the folders; waits a little for processes that are on their way out.
    pub(crate) fn remove(&mut self) -> Result<(), LocalError> {
        let started = Instant::now();
        while let Some(path) = self.paths.last() {
            match fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    if started.elapsed() > REMOVE_WITHIN {
                        return Err(LocalError::CgroupBusy {
                            path: path.clone(),
                            after: REMOVE_WITHIN,
                        });
                    }
                    std::thread::sleep(REMOVE_PAUSE);
                }
                _ => {
                    self.paths.pop();
                }
            }
        }
        Ok(())
    }
}

/// Files that tell about the memory of one sandbox, kept open.
#[derive(Debug)]
pub(crate) struct Memory {
    events: File,
    /// Version 1 counts the times that the limit was met apart: of memory, and of memory and
    /// swap together. Version 2 has the count among the events.
    hits: Vec<File>,
    limit: u64,
    /// Absent on version 2 before Linux 5.19.
    peak: Option<File>,
}

impl Memory {
    fn open(path: &Path, version: Version) -> io::Result<Self> {
        let (events, peak, limit, hits) = match version {
            Version::V1 => (
                "memory.oom_control",
                "memory.max_usage_in_bytes",
                "memory.limit_in_bytes",
                &["memory.failcnt", "memory.memsw.failcnt"][..],
            ),
            Version::V2 => ("memory.events", "memory.peak", "memory.max", &[][..]),
        };
        let limit = fs::read_to_string(path.join(limit))?;
        let hits = hits
            .iter()
            .filter_map(|name| File::open(path.join(name)).ok());
        let peak = path.join(peak);
        let writable = fs::OpenOptions::new().read(true).write(true).open(&peak);
        Ok(Self {
            events: File::open(path.join(events))?,
            hits: hits.collect(),
            limit: limit.trim().parse().unwrap_or(u64::MAX),
            // Read-only before Linux 6.12 on version 2.
            peak: writable.or_else(|_| File::open(&peak)).ok(),
        })
    }

    pub(crate) fn oom_kills(&self) -> io::Result<u64> {
        field(&read_again(&self.events)?, "oom_kill")
    }

    /// Whether the most that was in use since the last reset is about all that may be. Newer
    /// kernels of version 1 do not count when the limit of memory and swap is met.
    pub(crate) fn was_full(&self) -> io::Result<bool> {
        Ok(self.peak()? >= self.limit - self.limit / 8)
    }

    /// An OOM kill without one of these, in a group that was not full, was for want of the
    /// host's memory.
    pub(crate) fn limit_hits(&self) -> io::Result<u64> {
        if self.hits.is_empty() {
            return field(&read_again(&self.events)?, "max");
        }
        let mut hits = 0_u64;
        for file in &self.hits {
            let text = read_again(file)?;
            let count = text.trim().parse::<u64>();
            hits = hits.saturating_add(count.map_err(io::Error::other)?);
        }
        Ok(hits)
    }

    pub(crate) fn peak(&self) -> io::Result<u64> {
        let text = read_again(self.peak_file()?)?;
        let parsed = text.trim().parse();
        parsed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    pub(crate) fn reset_peak(&self) -> io::Result<()> {
        self.peak_file()?.write_all_at(b"0", 0)
    }

    fn peak_file(&self) -> io::Result<&File> {
        let missing = || io::Error::new(io::ErrorKind::Unsupported, "this kernel keeps no peak");
        self.peak.as_ref().ok_or_else(missing)
    }
}

/// One of the lines `name count`.
fn field(text: &str, name: &str) -> io::Result<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(found, _)| *found == name);
    found
        .and_then(|(_, count)| count.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {name} line")))
}

/// Reading at offset 0 makes the kernel write the file anew.
fn read_again(file: &File) -> io::Result<String> {
    let mut buffer = [0; 1024];
    let length = file.read_at(&mut buffer, 0)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn fill(folder: &Folder, path: &Path, cgroups: &mut Cgroups) -> Result<(), LocalError> {
    for write in &folder.writes {
        match (fs::write(path.join(write.file), &write.value), write.limit) {
            (Ok(()), _) | (Err(_), None) => {}
            (Err(error), Some(limit)) => {
                return Err(LocalError::LimitUnenforceable {
                    limit,
                    why: format!("writing {:?} to {}: {error}", write.value, write.file),
                });
            }
        }
    }
    let procs = path.join("cgroup.procs");
    let opened = fs::OpenOptions::new().write(true).open(&procs);
    cgroups.procs.push(opened.map_err(made(&procs))?.into());
    if folder.memory {
        cgroups.memory = Some(Memory::open(path, folder.version).map_err(made(path))?);
    }
    Ok(())
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Lets the children of a version 2 folder use these controllers.
fn enable(controllers: Vec<Controller>, path: &Path) -> io::Result<()> {
    let names: Vec<String> = controllers
        .into_iter()
        .map(|controller| format!("+{}", controller.name()))
        .collect();
    fs::write(path.join("cgroup.subtree_control"), names.join(" "))
}

/// Makes a folder and locks it. Another worker that cleans up may have it locked for a moment and
/// remove it; then once more.
fn make_locked(path: &Path) -> io::Result<Flock<File>> {
    loop {
        make(path)?;
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        let inode = file.metadata()?.ino();
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        match fs::metadata(path) {
            Ok(found) if found.ino() == inode => return Ok(lock),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Ends the processes and removes the folders of workers that are dead. What cannot be removed
/// now is left to the next worker.
fn remove_left_overs(parent: &Path) {
    for folder in subfolders(parent) {
        let Ok(file) = File::open(&folder) else {
            continue;
        };
        let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        for sandbox in subfolders(&folder) {
            remove_populated(&sandbox);
        }
        if let Err(error) = fs::remove_dir(&folder) {
            tracing::warn!(folder = %folder.display(), %error, "cannot remove a dead worker's cgroup");
        }
    }
}

fn remove_populated(path: &Path) {
    let started = Instant::now();
    while let Err(error) = fs::remove_dir(path) {
        if Errno::EBUSY as i32 != error.raw_os_error().unwrap_or(0)
            || started.elapsed() > REMOVE_WITHIN
        {
            return;
        }
        let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        // 0 stands for a process of another pid namespace, and would mean our own group.
        let pids = procs.lines().filter_map(|line| line.parse().ok());
        for pid in pids.filter(|pid| *pid > 1) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(REMOVE_PAUSE);
    }
}

fn subfolders(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    let folders = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_folder_is_made_and_locked_whoever_cleans_up_meanwhile() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("w");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    remove_left_overs(parent.path());
                }
            });
            for _ in 0..2000 {
                let made = make_locked(&path);
                let there = path.exists();
                if made.is_err() || !there {
                    over.store(true, Ordering::Relaxed);
                }
                made.unwrap();
                assert!(there, "it was removed although it is locked");
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
