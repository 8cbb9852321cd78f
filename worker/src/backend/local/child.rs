//! The way of one new process from the forker's namespaces to the sidecar.
//!
//! All mounts are made as root of the initial user namespace, and the sandbox's own user
//! namespace is entered last. So its mount, pid, network and other namespaces belong to the
//! initial one: nothing that runs inside can hold a capability over any of them, whatever it
//! holds in its own.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chown, mkdir};

use super::protocol::SandboxSpec;
use super::step::{At as _, MAPS_WRITTEN, Step, StepError, WANT_MAPS};
use super::sys;
use super::template::{self, Template, Templates};

const NONE: Option<&str> = None;

/// The user that commands run as, inside.
pub(crate) const USER: u32 = 1000;
/// Of the sidecar alone: what it starts goes back to 0.
const SIDECAR_NICE: i32 = -10;
const HOSTNAME: &str = "sandbox";

const ROOT: &str = "/sandbox/root";
const UPPER: &str = "/sandbox/upper";
const WORK: &str = "/sandbox/work";
const SHM: &str = "/sandbox/shm";

/// The sidecar's socket; the `cgroup.procs` files follow it.
const SOCKET_FD: RawFd = 3;
/// Numbers below this are set aside for what the sidecar inherits.
pub(crate) const RESERVED_FDS: RawFd = 64;

pub(crate) struct Child<'a> {
    pub(crate) spec: &'a SandboxSpec,
    pub(crate) templates: &'a Templates,
    pub(crate) template: &'a Template,
    pub(crate) sidecar: BorrowedFd<'a>,
    pub(crate) socket: UnixStream,
    pub(crate) cgroups: Vec<OwnedFd>,
}

impl Child<'_> {
    /// Becomes the sidecar, or tells the worker why not and ends.
    pub(crate) fn run(mut self) -> ! {
        let Err(error) = self.become_sidecar();
        // The worker that would read this may be gone; then nobody needs it.
        let _ = self.socket.write_all(&error.encode());
        std::process::exit(1);
    }

    fn become_sidecar(&mut self) -> Result<Infallible, StepError> {
        umask(Mode::empty());
        sys::loopback_up().at(Step::Loopback)?;
        nix::unistd::sethostname(HOSTNAME).at(Step::Hostname)?;
        self.mount_storage()?;
        self.mount_overlay()?;
        for (tree, name) in &self.template.trees {
            bind(tree, &format!("{ROOT}/{name}")).at(Step::Trees)?;
        }
        let switches = self.mount_proc()?;
        bind(template::DEV, &format!("{ROOT}/dev")).at(Step::Devices)?;
        bind(SHM, &format!("{ROOT}/dev/shm")).at(Step::Devices)?;
        change_root().at(Step::Pivot)?;
        umask(Mode::from_bits_truncate(0o022));
        // 0 would still start a host's core-dump program; 1 stops that too.
        setrlimit(Resource::RLIMIT_CORE, 1, 1).at(Step::Resources)?;
        // The sidecar answers however many processors its sandbox keeps busy. A host that does
        // not allow it is one where it competes with them.
        let _ = sys::set_nice(SIDECAR_NICE);
        let cgroups = self.cgroups.len();
        let sidecar = self.arrange_descriptors()?;
        self.enter_user_namespace()?;
        forbid_user_namespaces(&switches).at(Step::NoNesting)?;
        sys::restore_signals().at(Step::Session)?;
        SigSet::empty().thread_set_mask().at(Step::Session)?;
        nix::unistd::setsid().at(Step::Session)?;
        sys::new_session_keyring()
            .or_else(unsupported)
            .at(Step::Session)?;
        // After the change of user, which clears it.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).at(Step::ParentDeath)?;
        self.execute(&sidecar, cgroups)
    }

    /// One tmpfs holds everything that the sandbox writes, and its limits are the sandbox's.
    fn mount_storage(&self) -> Result<(), StepError> {
        let options = format!(
            "mode=0755,size={},nr_inodes={}",
            self.spec.disk_bytes, self.spec.inodes
        );
        mount(
            Some("sandbox"),
            template::SANDBOX,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .at(Step::Storage)?;
        let folder =
            |path: &str, mode| mkdir(path, Mode::from_bits_truncate(mode)).at(Step::Folders);
        for path in [ROOT, UPPER, WORK] {
            folder(path, 0o755)?;
        }
        folder(SHM, 0o1777)?;
        // Real folders in the upper layer win over whatever an image has there, so that no
        // link of an image can lead a mount astray.
        for name in ["proc", "dev"] {
            folder(&format!("{UPPER}/{name}"), 0o755)?;
        }
        folder(&format!("{UPPER}/tmp"), 0o1777)?;
        let workspace = format!("{UPPER}/workspace");
        folder(&workspace, 0o755)?;
        let owner = self.spec.id_base + USER;
        chown(
            workspace.as_str(),
            Some(Uid::from_raw(owner)),
            Some(Gid::from_raw(owner)),
        )
        .at(Step::Folders)
    }

    fn mount_overlay(&self) -> Result<(), StepError> {
        let options = format!(
            "lowerdir={},upperdir={UPPER},workdir={WORK}",
            self.template.lower
        );
        mount(
            Some("sandbox"),
            ROOT,
            Some("overlay"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .at(Step::Overlay)
    }

    /// Returns `/proc/sys` as it was before it became read-only.
    fn mount_proc(&self) -> Result<OwnedFd, StepError> {
        let proc = format!("{ROOT}/proc");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // The sidecar's group sees every process, the user only its own.
        let options = format!("hidepid=2,gid={}", self.spec.id_base);
        mount(
            Some("proc"),
            proc.as_str(),
            Some("proc"),
            flags,
            Some(options.as_str()),
        )
        .at(Step::Proc)?;
        let null = format!("{}/null", template::DEV);
        for path in &self.templates.masked_files {
            bind(&null, &format!("{ROOT}{path}")).at(Step::MaskProc)?;
        }
        for path in &self.templates.masked_folders {
            bind(template::EMPTY, &format!("{ROOT}{path}")).at(Step::MaskProc)?;
        }
        // The kernel's switches: shown, since programs read them, but read-only.
        let sys = format!("{ROOT}/proc/sys");
        let switches = fs::File::open(&sys).at(Step::Proc)?;
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
        bind(&sys, &sys).at(Step::MaskProc)?;
        mount(NONE, sys.as_str(), NONE, read_only, NONE).at(Step::MaskProc)?;
        out_of_the_way(switches.as_fd())
    }

    /// Puts null on 0 to 2, the socket on 3, the cgroups behind it; everything else closes on
    /// exec. Returns the sidecar's file under a number that is out of the way.
    fn arrange_descriptors(&mut self) -> Result<OwnedFd, StepError> {
        let null = {
            // Closed before its number is given away below.
            let opened = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")
                .at(Step::Stdio)?;
            out_of_the_way(opened.as_fd())?
        };
        let sidecar = out_of_the_way(self.sidecar)?;
        self.socket = out_of_the_way(self.socket.as_fd())?.into();
        let mut sources = vec![
            null.as_fd(),
            null.as_fd(),
            null.as_fd(),
            self.socket.as_fd(),
        ];
        let cgroups: Vec<OwnedFd> = self
            .cgroups
            .iter()
            .map(|fd| out_of_the_way(fd.as_fd()))
            .collect::<Result<_, _>>()?;
        sources.extend(cgroups.iter().map(AsFd::as_fd));
        let kept = sources.len() as RawFd;
        for (target, source) in (0..).zip(sources) {
            sys::place_fd(source, target).at(Step::Descriptors)?;
        }
        sys::close_on_exec_from(kept).at(Step::Descriptors)?;
        // These numbers now belong to the sidecar; nothing in this process may close them.
        std::mem::forget(std::mem::take(&mut self.cgroups));
        Ok(sidecar)
    }

    fn enter_user_namespace(&mut self) -> Result<(), StepError> {
        unshare(CloneFlags::CLONE_NEWUSER).at(Step::UserNamespace)?;
        // A namespace's maps can only be written by a process outside that may give these ids.
        self.socket.write_all(&[WANT_MAPS]).at(Step::Maps)?;
        let mut answer = [0];
        self.socket.read_exact(&mut answer).at(Step::Maps)?;
        if answer != [MAPS_WRITTEN] {
            return Err(io::Error::from_raw_os_error(libc::EPROTO)).at(Step::Maps);
        }
        let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
        nix::unistd::setgroups(&[]).at(Step::Identity)?;
        nix::unistd::setresgid(gid, gid, gid).at(Step::Identity)?;
        nix::unistd::setresuid(uid, uid, uid).at(Step::Identity)
    }

    fn execute(&self, sidecar: &OwnedFd, cgroups: usize) -> Result<Infallible, StepError> {
        let mut args = vec!["remuda-sidecar".to_owned()];
        let mut flag = |name: &str, value: String| args.extend([name.to_owned(), value]);
        flag("--fd", SOCKET_FD.to_string());
        flag("--uid", USER.to_string());
        flag("--gid", USER.to_string());
        flag("--workspace", "/workspace".to_owned());
        flag("--root", "/".to_owned());
        flag("--open-files", self.spec.open_files.to_string());
        #[cfg(debug_assertions)]
        let cgroups = match &self.spec.watch {
            Some(watch) => {
                let cgroups = cgroups.saturating_sub(1);
                let fd = SOCKET_FD + 1 + cgroups as RawFd;
                flag("--history-fd", fd.to_string());
                flag("--history-name", watch.name.clone());
                flag("--failpoints", watch.failpoints.clone());
                cgroups
            }
            None => cgroups,
        };
        for fd in (SOCKET_FD + 1..).take(cgroups) {
            flag("--cgroup-fd", fd.to_string());
        }
        let args: Vec<CString> = args
            .into_iter()
            .map(CString::new)
            .collect::<Result<_, _>>()
            .at(Step::Exec)?;
        let environment: [&CStr; 0] = [];
        nix::unistd::execveat(sidecar, c"", &args, &environment, AtFlags::AT_EMPTY_PATH)
            .at(Step::Exec)
    }
}

/// No user namespace can be made within this one, whatever the system-call filter lets through:
/// a new one would give its maker capabilities, and with them most of the kernel to attack.
fn forbid_user_namespaces(switches: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = openat(switches, "user/max_user_namespaces", flags, Mode::empty())?;
    fs::File::from(file).write_all(b"0")
}

/// A kernel without keyrings has none to share either.
fn unsupported(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}

fn bind(source: &str, target: &str) -> nix::Result<()> {
    mount(
        Some(source),
        target,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
}

fn change_root() -> nix::Result<()> {
    nix::unistd::chdir(ROOT)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")
}

/// A copy of a descriptor above the reserved numbers.
fn out_of_the_way(fd: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    sys::duplicate_from(fd, RESERVED_FDS).at(Step::Descriptors)
}
