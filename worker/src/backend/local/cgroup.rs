//! Which limits this host's cgroups can enforce, and which writes enforce them. Pure: from what
//! is mounted and what is asked to a list of folders and writes. `cgroup_fs` carries it out.
//!
//! Hosts have controllers on version 1, on version 2, or some on each (hybrid), so each
//! controller is looked up by itself.

use std::path::{Path, PathBuf};

use broker_schema::pool::Limits;

use super::error::Limit;

/// The period of the cpu quota.
const CPU_PERIOD_MICROS: u64 = 100_000;
/// The kernel refuses a smaller quota.
const CPU_QUOTA_MIN_MICROS: u64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Controller {
    Memory,
    Pids,
    Cpu,
}

impl Controller {
    pub const ALL: [Self; 3] = [Self::Memory, Self::Pids, Self::Cpu];

    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
        }
    }

    fn limit(self) -> Limit {
        match self {
            Self::Memory => Limit::Memory,
            Self::Pids => Limit::Pids,
            Self::Cpu => Limit::Cpus,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// Where one controller is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    pub version: Version,
    pub path: PathBuf,
}

/// What one host's cgroups offer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CgroupHost {
    controllers: Vec<(Controller, Mounted)>,
    /// Version 1 can limit memory and swap together.
    pub swap_accounting: bool,
}

impl CgroupHost {
    /// From `/proc/self/mountinfo` and a way to read a version 2 root's `cgroup.controllers`.
    pub(crate) fn parse(mountinfo: &str, read_controllers: impl Fn(&Path) -> String) -> Self {
        let mut host = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(path) = left.split(' ').nth(4) else {
                continue;
            };
            let path = PathBuf::from(unescape(path));
            let mut right = right.split(' ');
            let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
            let (version, names) = match kind {
                "cgroup" => (Version::V1, options.replace(',', " ")),
                "cgroup2" => (Version::V2, read_controllers(&path)),
                _ => continue,
            };
            for controller in Controller::ALL {
                // Mounted twice (as in a container): the first is as good as the second.
                if host.find(controller).is_none()
                    && names
                        .split_whitespace()
                        .any(|name| name == controller.name())
                {
                    let path = path.clone();
                    host.controllers
                        .push((controller, Mounted { version, path }));
                }
            }
        }
        host
    }

    pub fn find(&self, controller: Controller) -> Option<&Mounted> {
        let found = self.controllers.iter().find(|(own, _)| *own == controller);
        found.map(|(_, mounted)| mounted)
    }

    /// Every place where a controller is mounted, once.
    pub(crate) fn mounts(&self) -> Vec<&Mounted> {
        let mut mounts: Vec<&Mounted> = Vec::new();
        for (_, mounted) in &self.controllers {
            if !mounts.contains(&mounted) {
                mounts.push(mounted);
            }
        }
        mounts
    }

    /// The controllers on one mount.
    pub(crate) fn controllers_on(&self, mount: &Mounted) -> Vec<Controller> {
        let on = self.controllers.iter().filter(|(_, own)| own == mount);
        on.map(|(controller, _)| *controller).collect()
    }
}

/// Mount points have space, tab, newline and backslash as octal.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// One file to write after a folder was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) file: &'static str,
    pub(crate) value: String,
    /// The limit that is not enforced when the write fails; `None` where the file may be absent.
    pub(crate) limit: Option<Limit>,
}

/// One folder to make, on one mount, for one or more controllers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Folder {
    pub(crate) mount: PathBuf,
    pub(crate) version: Version,
    pub(crate) writes: Vec<Write>,
    pub(crate) memory: bool,
}

/// What to do for one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) folders: Vec<Folder>,
    /// Asked for, but not to be had here; refused unless the operator allowed it.
    pub(crate) unenforceable: Vec<(Limit, String)>,
}

/// Which folders and writes enforce `limits` on `host`.
pub(crate) fn plan(host: &CgroupHost, limits: &Limits) -> Plan {
    let mut plan = Plan::default();
    for controller in Controller::ALL {
        if controller == Controller::Cpu && limits.cpus.is_none() {
            continue;
        }
        let Some(mounted) = host.find(controller) else {
            let why = format!(
                "no cgroup with the {} controller is mounted",
                controller.name()
            );
            plan.unenforceable.push((controller.limit(), why));
            continue;
        };
        let writes = writes(controller, mounted.version, limits, host.swap_accounting);
        let memory = controller == Controller::Memory;
        match plan
            .folders
            .iter_mut()
            .find(|folder| folder.mount == mounted.path)
        {
            Some(folder) => {
                folder.writes.extend(writes);
                folder.memory |= memory;
            }
            None => plan.folders.push(Folder {
                mount: mounted.path.clone(),
                version: mounted.version,
                writes,
                memory,
            }),
        }
    }
    plan
}

fn writes(controller: Controller, version: Version, limits: &Limits, swap: bool) -> Vec<Write> {
    let limit = Some(controller.limit());
    let write = |file, value: String, limit| Write { file, value, limit };
    let memory = limits.memory_bytes.to_string();
    match (controller, version) {
        (Controller::Memory, Version::V1) => {
            let mut writes = vec![write("memory.limit_in_bytes", memory.clone(), limit)];
            if swap {
                // Memory and swap together: no swap beyond the memory limit.
                writes.push(write("memory.memsw.limit_in_bytes", memory, limit));
            }
            writes
        }
        (Controller::Memory, Version::V2) => vec![
            write("memory.max", memory, limit),
            // Absent where the kernel has no swap accounting.
            write("memory.swap.max", "0".to_owned(), None),
        ],
        (Controller::Pids, _) => vec![write("pids.max", limits.pids.to_string(), limit)],
        (Controller::Cpu, version) => {
            let cpus = limits.cpus.unwrap_or(0.0);
            let quota = ((cpus * CPU_PERIOD_MICROS as f64) as u64).max(CPU_QUOTA_MIN_MICROS);
            match version {
                Version::V1 => vec![
                    write("cpu.cfs_period_us", CPU_PERIOD_MICROS.to_string(), limit),
                    write("cpu.cfs_quota_us", quota.to_string(), limit),
                ],
                Version::V2 => vec![write(
                    "cpu.max",
                    format!("{quota} {CPU_PERIOD_MICROS}"),
                    limit,
                )],
            }
        }
    }
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
