//! What a fleet holds on this host: processes, control groups, mounts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::unistd::Pid;

/// A process and when it started: an id alone may become another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    pub pid: i32,
    started: u64,
}

impl Seen {
    fn of(pid: i32) -> Option<(Self, i32)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything, a bracket too.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        if fields.first() == Some(&"Z") {
            return None;
        }
        let started = fields.get(19)?.parse().ok()?;
        let parent = fields.get(1)?.parse().ok()?;
        Some((Self { pid, started }, parent))
    }

    /// Whether it runs still.
    pub fn runs(&self) -> bool {
        Self::of(self.pid).is_some_and(|(now, _)| now == *self)
    }
}

/// Everything that a process started, and what that started.
pub fn descendants(root: Pid) -> anyhow::Result<Vec<Seen>> {
    let mut children: BTreeMap<i32, Vec<Seen>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").context("cannot list /proc")? {
        let name = entry.context("cannot list /proc")?.file_name();
        let Some((seen, parent)) = name
            .to_str()
            .and_then(|name| name.parse().ok())
            .and_then(Seen::of)
        else {
            continue;
        };
        children.entry(parent).or_default().push(seen);
    }
    let mut found = Vec::new();
    let mut next = vec![root.as_raw()];
    while let Some(pid) = next.pop() {
        for seen in children.remove(&pid).unwrap_or_default() {
            next.push(seen.pid);
            found.push(seen);
        }
    }
    Ok(found)
}

/// The control groups of one worker's sandboxes, on every hierarchy.
pub fn cgroups_of(worker: Pid) -> anyhow::Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("cannot list mounts")?;
    let roots = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right
            .starts_with("cgroup")
            .then(|| left.split(' ').nth(4))
            .flatten()
    });
    let prefix = format!("{worker}-");
    let mut found = Vec::new();
    for root in roots {
        let instances = std::fs::read_dir(Path::new(root).join("remuda"));
        for instance in instances.into_iter().flatten().flatten() {
            if instance.file_name().to_string_lossy().starts_with(&prefix) {
                found.push(instance.path());
            }
        }
    }
    Ok(found)
}

/// What is mounted beneath a folder.
pub fn mounts_beneath(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("cannot list mounts")?;
    let folder = folder.display().to_string();
    let beneath = |line: &&str| {
        line.split(' ')
            .nth(4)
            .is_some_and(|path| path.starts_with(&folder))
    };
    Ok(mounts.lines().filter(beneath).map(str::to_owned).collect())
}
