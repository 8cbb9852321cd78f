//! A control group with little memory, to put a process of ours in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use nix::unistd::Pid;

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";
const PREFIX: &str = "remuda-faults-";

/// Why there can be none.
pub(crate) fn lacking() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("control groups need root".to_owned());
    }
    root()
        .is_none()
        .then(|| format!("no memory controller in {V1}, nor enabled for children in {V2}"))
}

/// The folder in which to make one, and whether it is of version 2.
fn root() -> Option<(&'static Path, bool)> {
    if Path::new(V1).join("memory.limit_in_bytes").exists() {
        return Some((Path::new(V1), false));
    }
    let control = std::fs::read_to_string(Path::new(V2).join("cgroup.subtree_control")).ok()?;
    let enabled = control.split_whitespace().any(|name| name == "memory");
    enabled.then_some((Path::new(V2), true))
}

/// Removed when dropped; what is in it goes back to where it can.
#[derive(Debug)]
pub(crate) struct MemoryGroup {
    path: PathBuf,
    second: bool,
}

impl MemoryGroup {
    pub(crate) fn create() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (root, second) = root().context("no memory controller")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, second })
    }

    /// Moves a process, all its threads with it, into the group.
    pub(crate) fn add(&self, pid: Pid) -> anyhow::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// What starts a program in the group, as the same process.
    pub(crate) fn wrap(&self) -> Vec<OsString> {
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"",
            self.path.display()
        );
        vec!["sh".into(), "-c".into(), script.into()]
    }

    /// No more than this.
    pub(crate) fn limit(&self, bytes: u64) -> anyhow::Result<()> {
        let name = if self.second {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        self.write(name, &bytes.to_string())
    }

    /// What it uses now.
    pub(crate) fn used(&self) -> anyhow::Result<u64> {
        let name = if self.second {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let path = self.path.join(name);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        text.trim()
            .parse()
            .with_context(|| format!("{} is {text:?}", path.display()))
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path.join(name);
        std::fs::write(&path, text)
            .with_context(|| format!("cannot write {text:?} to {}", path.display()))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        empty(&self.path);
    }
}

/// Moves what is in a group to its parent, and removes it.
fn empty(path: &Path) {
    let Some(parent) = path.parent() else { return };
    // Bounded: what forks meanwhile is moved in a later round.
    for _ in 0..100 {
        let members = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            let _ = std::fs::write(parent.join("cgroup.procs"), pid);
        }
        if std::fs::remove_dir(path).is_ok() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Removes what a process left that was killed.
pub(crate) fn sweep() {
    let Some((root, _)) = root() else { return };
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            empty(&entry.path());
        }
    }
}
