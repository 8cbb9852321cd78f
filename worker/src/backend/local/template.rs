//! What sandboxes share: the forker's own small mount tree, with the lower layer of every image
//! and the read-only trees that are bound over it.
//!
//! The tree is a tmpfs that only the forker's mount namespace sees. It is small on purpose: each
//! sandbox starts with a copy of every mount in it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::etc;
use super::protocol::{TemplateId, TemplateSource};
use super::sys;

/// The folders of the forker's tree.
pub(crate) const DEV: &str = "/dev";
/// Empty and read-only for ever: where sandboxes mount their own shared memory.
pub(crate) const EMPTY: &str = "/dev/shm";
/// Where a child mounts its writable layer, and within it its root.
pub(crate) const SANDBOX: &str = "/sandbox";
const TEMPLATES: &str = "/templates";

const NONE: Option<&str> = None;

/// System folders of the host that every program needs. Links to `usr` are copied as links.
const SYSTEM_FOLDERS: &[&str] = &["bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr"];

/// Top folders that exist, empty, in a sandbox made from the host.
const EMPTY_FOLDERS: &[&str] = &["dev", "home", "opt", "proc", "root", "run", "var"];

/// Host paths under `/proc` that sandboxes do not see, where this kernel has them.
const MASKED: &[&str] = &[
    "acpi",
    "asound",
    "bus",
    "config.gz",
    "driver",
    "firmware",
    "fs",
    "interrupts",
    "irq",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "latency_stats",
    "modules",
    "sched_debug",
    "scsi",
    "slabinfo",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
];

const DEVICES: &[(&str, u64, u64)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// A lower layer and the trees bound over it: (path in the forker's tree, path in the sandbox).
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) lower: String,
    pub(crate) trees: Vec<(String, String)>,
}

/// The forker's view of the host and everything it prepared.
#[derive(Debug)]
pub(crate) struct Templates {
    host: OwnedFd,
    own: OwnedFd,
    prepared: Vec<Template>,
    pub(crate) masked_files: Vec<String>,
    pub(crate) masked_folders: Vec<String>,
}

impl Templates {
    /// Leaves the host's mount namespace for a tree of our own on `mount_point`.
    pub(crate) fn new(mount_point: &Path) -> Result<Self, (&'static str, io::Error)> {
        let named = |step| move |error: nix::Error| (step, io::Error::from(error));
        let host = mount_namespace().map_err(|e| ("open the mount namespace", e))?;
        // What there is to mask is asked of this kernel while /proc is still in sight.
        let existing = |names: &[&str], folder: bool| -> Vec<String> {
            let paths = names.iter().map(|name| format!("/proc/{name}"));
            paths
                .filter(|path| fs::metadata(path).is_ok_and(|found| found.is_dir() == folder))
                .collect()
        };
        let masked_files = existing(MASKED, false);
        let masked_folders = existing(MASKED, true);

        unshare(CloneFlags::CLONE_NEWNS).map_err(named("unshare the mount namespace"))?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
            .map_err(named("make mounts private"))?;
        let own = mount_namespace().map_err(|e| ("open the mount namespace", e))?;
        mount(
            Some("remuda"),
            mount_point,
            Some("tmpfs"),
            MsFlags::MS_NOSUID,
            Some("size=128m,mode=0755"),
        )
        .map_err(named("mount the forker's tree"))?;
        std::env::set_current_dir(mount_point).map_err(|e| ("enter the forker's tree", e))?;
        nix::unistd::pivot_root(".", ".").map_err(named("change the forker's root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(named("detach the host's root"))?;
        std::env::set_current_dir("/").map_err(|e| ("enter the forker's tree", e))?;

        make_devices().map_err(|e| ("make devices", e))?;
        for folder in [SANDBOX, TEMPLATES] {
            fs::create_dir(folder).map_err(|e| ("make folders", e))?;
        }
        Ok(Self {
            host,
            own,
            prepared: Vec::new(),
            masked_files,
            masked_folders,
        })
    }

    pub(crate) fn get(&self, TemplateId(index): TemplateId) -> Option<&Template> {
        self.prepared.get(index as usize)
    }

    pub(crate) fn prepare(&mut self, source: &TemplateSource) -> io::Result<TemplateId> {
        let id = TemplateId(self.prepared.len() as u32);
        let folder = format!("{TEMPLATES}/{}", self.prepared.len());
        let template = match source {
            TemplateSource::Host => self.prepare_host(&folder),
            TemplateSource::Rootfs(path) => self.prepare_rootfs(&folder, path),
        };
        // A failed attempt keeps its number, so that the next one does not meet its leftovers.
        self.prepared.push(Template {
            lower: EMPTY.to_owned(),
            trees: Vec::new(),
        });
        if let Some(slot) = self.prepared.last_mut() {
            *slot = template?;
        }
        Ok(id)
    }

    fn prepare_host(&self, folder: &str) -> io::Result<Template> {
        let lower = format!("{folder}/root");
        fs::create_dir_all(&lower)?;
        for name in EMPTY_FOLDERS.iter().chain(&["etc"]) {
            fs::create_dir(format!("{lower}/{name}"))?;
        }
        symlink("/tmp", format!("{lower}/var/tmp"))?;
        let (links, mut trees) = self.in_host(system_folders)?;
        for (name, target) in links {
            symlink(target, format!("{lower}/{name}"))?;
        }
        trees.push(("etc", self.in_host(|| sys::open_tree_clone(c"/etc"))?));
        let mut bound = Vec::new();
        for (index, (name, tree)) in trees.into_iter().enumerate() {
            let at = format!("{folder}/{index}");
            fs::create_dir(&at)?;
            restrict(&tree)?;
            sys::attach_tree(tree.as_fd(), &c_path(&at)?)?;
            if name == "etc" {
                etc::copy_clean(Path::new(&at), Path::new(&format!("{lower}/etc")))?;
                umount2(at.as_str(), MntFlags::MNT_DETACH)?;
            } else {
                fs::create_dir(format!("{lower}/{name}"))?;
                bound.push((at, (*name).to_owned()));
            }
        }
        Ok(Template {
            lower,
            trees: bound,
        })
    }

    /// Runs `action` in the host's mount namespace, where paths mean what the worker means.
    fn in_host<T>(&self, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        setns(&self.host, CloneFlags::CLONE_NEWNS)?;
        let result = action();
        setns(&self.own, CloneFlags::CLONE_NEWNS)?;
        result
    }

    fn prepare_rootfs(&self, folder: &str, path: &Path) -> io::Result<Template> {
        let path = CString::new(path.as_os_str().as_encoded_bytes())?;
        let tree = self.in_host(|| {
            let metadata = nix::sys::stat::stat(path.as_c_str())?;
            if metadata.st_mode & libc::S_IFMT != libc::S_IFDIR {
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            }
            sys::open_tree_clone(&path)
        })?;
        fs::create_dir(folder)?;
        restrict(&tree)?;
        sys::attach_tree(tree.as_fd(), &c_path(folder)?)?;
        Ok(Template {
            lower: folder.to_owned(),
            trees: Vec::new(),
        })
    }
}

type SystemFolders = (Vec<(&'static str, PathBuf)>, Vec<(&'static str, OwnedFd)>);

/// The host's system folders: links with their targets, and trees of the real folders.
fn system_folders() -> io::Result<SystemFolders> {
    let (mut links, mut trees) = (Vec::new(), Vec::new());
    for name in SYSTEM_FOLDERS {
        let path = format!("/{name}");
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => links.push((*name, fs::read_link(&path)?)),
            Ok(found) if found.is_dir() => {
                trees.push((*name, sys::open_tree_clone(&c_path(&path)?)?));
            }
            _ => {}
        }
    }
    Ok((links, trees))
}

fn restrict(tree: &OwnedFd) -> io::Result<()> {
    sys::restrict_tree(
        tree.as_fd(),
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
    )
}

fn mount_namespace() -> io::Result<OwnedFd> {
    Ok(fs::File::open("/proc/self/ns/mnt")?.into())
}

fn c_path(path: &str) -> io::Result<CString> {
    Ok(CString::new(path)?)
}

fn make_devices() -> io::Result<()> {
    fs::create_dir(DEV)?;
    for (name, major, minor) in DEVICES {
        let path = format!("{DEV}/{name}");
        mknod(
            path.as_str(),
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o666),
            makedev(*major, *minor),
        )?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, format!("{DEV}/{name}"))?;
    }
    fs::create_dir(EMPTY)?;
    let tree = sys::open_tree_clone(&c_path(DEV)?)?;
    sys::restrict_tree(
        tree.as_fd(),
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
    )?;
    sys::attach_tree(tree.as_fd(), &c_path(DEV)?)
}
