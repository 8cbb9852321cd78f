//! What this host lets the launcher do, for `remuda doctor` and for the launcher's own start.

use std::fs;

use super::cgroup::{CgroupHost, Controller, Version};
use super::cgroup_fs;

/// The launcher's system calls are all in this kernel: `mount_setattr` is the newest.
const KERNEL: (u32, u32) = (5, 12);
/// Fewer than this of a kind of namespace is a small fleet.
const NAMESPACES_WANTED: u64 = 1024;
/// Descriptors that one sandbox costs its worker, rounded up.
const FDS_PER_SANDBOX: u64 = 8;
const FDS_WANTED: u64 = NAMESPACES_WANTED * FDS_PER_SANDBOX;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    /// Without it there are no local sandboxes; otherwise something is weaker.
    pub required: bool,
    pub detail: String,
    /// What to do about it, when it is not as it should be.
    pub mend: Option<String>,
}

/// All checks and what the cgroups offer.
#[derive(Debug, Clone)]
pub struct HostProbe {
    pub checks: Vec<Check>,
    pub cgroups: CgroupHost,
}

impl HostProbe {
    /// Looks; starts and changes nothing.
    pub fn run() -> Self {
        let cgroups = cgroup_fs::detect();
        let mut checks = vec![
            root(),
            kernel(),
            user_namespaces(),
            overlay(),
            seccomp(),
            memfd(),
        ];
        checks.extend(Controller::ALL.map(|controller| controller_check(&cgroups, controller)));
        checks.push(swap(&cgroups));
        checks.extend(["user", "mnt", "pid", "net"].map(namespaces));
        checks.push(open_files());
        Self { checks, cgroups }
    }

    /// Can sandboxes be made at all?
    pub fn usable(&self) -> bool {
        self.checks.iter().all(|check| check.ok || !check.required)
    }
}

fn check(name: &'static str, required: bool, ok: bool, detail: String, mend: &str) -> Check {
    Check {
        name,
        ok,
        required,
        detail,
        mend: (!ok).then(|| mend.to_owned()),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn read_number(path: &str) -> Option<u64> {
    read(path)?.parse().ok()
}

fn root() -> Check {
    let uid = nix::unistd::geteuid();
    check(
        "root",
        true,
        uid.is_root(),
        format!("user id {uid}"),
        "run the worker as root, or use another backend",
    )
}

fn kernel() -> Check {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned());
    let ok = parse_release(&release).is_some_and(|version| version >= KERNEL);
    let mend = format!("use Linux {}.{} or newer", KERNEL.0, KERNEL.1);
    check("kernel", true, ok, release, &mend)
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn user_namespaces() -> Check {
    check(
        "user namespaces",
        true,
        fs::exists("/proc/self/ns/user").unwrap_or(false),
        "a range of user ids for each sandbox".to_owned(),
        "use a kernel with CONFIG_USER_NS",
    )
}

fn overlay() -> Check {
    let known = read("/proc/filesystems").unwrap_or_default();
    check(
        "overlayfs",
        true,
        known.lines().any(|line| line.ends_with("\toverlay")),
        "the writable layer over an image".to_owned(),
        "load it: modprobe overlay",
    )
}

fn seccomp() -> Check {
    let actions = read("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    check(
        "seccomp",
        true,
        actions.split(' ').any(|action| action == "errno"),
        if actions.is_empty() {
            "absent".to_owned()
        } else {
            actions
        },
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

fn memfd() -> Check {
    let level = read_number("/proc/sys/vm/memfd_noexec").unwrap_or(0);
    check(
        "executable memory files",
        true,
        level < 2,
        format!("vm.memfd_noexec is {level}"),
        "sysctl vm.memfd_noexec=1",
    )
}

fn controller_check(cgroups: &CgroupHost, controller: Controller) -> Check {
    let name = match controller {
        Controller::Memory => "cgroup memory",
        Controller::Pids => "cgroup pids",
        Controller::Cpu => "cgroup cpu",
    };
    let mounted = cgroups.find(controller);
    let detail = mounted.map_or_else(
        || "not mounted".to_owned(),
        |mounted| {
            let version = match mounted.version {
                Version::V1 => 1,
                Version::V2 => 2,
            };
            format!("version {version} at {}", mounted.path.display())
        },
    );
    let mend = format!(
        "mount it (cgroup_enable={} on the kernel's command line where it is off), or allow \
         unenforced limits",
        controller.name()
    );
    check(name, false, mounted.is_some(), detail, &mend)
}

fn swap(cgroups: &CgroupHost) -> Check {
    let on_v2 = cgroups
        .find(Controller::Memory)
        .is_some_and(|mounted| mounted.version == Version::V2);
    let no_swap = read("/proc/swaps").is_some_and(|swaps| swaps.lines().count() < 2);
    let limited = on_v2 || cgroups.swap_accounting;
    check(
        "swap",
        false,
        limited || no_swap,
        match (limited, no_swap) {
            (_, true) => "the host has none".to_owned(),
            (true, false) => "limited".to_owned(),
            (false, false) => "not limited".to_owned(),
        },
        "put swapaccount=1 on the kernel's command line, or turn swap off",
    )
}

fn namespaces(kind: &'static str) -> Check {
    let path = format!("/proc/sys/user/max_{kind}_namespaces");
    let most = read_number(&path).unwrap_or(u64::MAX);
    check(
        match kind {
            "user" => "most user namespaces",
            "mnt" => "most mount namespaces",
            "pid" => "most pid namespaces",
            _ => "most network namespaces",
        },
        false,
        most >= NAMESPACES_WANTED,
        most.to_string(),
        &format!("sysctl user.max_{kind}_namespaces={NAMESPACES_WANTED}"),
    )
}

fn open_files() -> Check {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    check(
        "open files",
        false,
        soft >= FDS_WANTED,
        format!("at most {soft}, about {} sandboxes", soft / FDS_PER_SANDBOX),
        &format!("raise the limit: LimitNOFILE={FDS_WANTED} or ulimit -n {FDS_WANTED}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        for (release, new_enough) in [
            ("6.18.44-fc-v769", true),
            ("5.12", true),
            ("5.9.0-2", false),
            ("5.11.22", false),
            ("10.0-rc1", true),
            ("unknown", false),
            ("", false),
        ] {
            let parsed = parse_release(release);
            assert_eq!(parsed.is_some_and(|v| v >= KERNEL), new_enough, "{release}");
        }
    }

    #[test]
    fn only_what_is_not_well_has_a_mend() {
        let probe = HostProbe::run();
        assert!(probe.checks.len() > 10);
        for check in &probe.checks {
            assert_eq!(check.ok, check.mend.is_none(), "{}", check.name);
        }
    }
}
