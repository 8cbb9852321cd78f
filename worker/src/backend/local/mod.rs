//! Local sandboxes: our own launcher of namespaces, an overlay root, cgroups and a range of user
//! ids, with the sidecar as first process on an inherited socket.
//!
//! A sandbox is made by three parties, each doing what only it may or what it does fastest:
//!
//! 1. the worker ([`LocalLauncher`]) makes the cgroups, and asks the forker;
//! 2. the forker ([`forker_main`]), a process with one thread, clones a child into new
//!    namespaces and hands the worker a pidfd and a socket;
//! 3. the child makes its mounts, enters its user namespace, and becomes the sidecar.
//!
//! Children work in parallel, so the forker is never the bottleneck.

mod cgroup;
mod cgroup_fs;
mod child;
mod error;
mod etc;
mod forker;
mod greeting;
mod id_range;
mod launcher;
mod link;
mod probe;
mod protocol;
mod sandbox;
mod step;
mod sys;
mod template;

pub use cgroup::{CgroupHost, Controller, Mounted, Version};
pub use error::{Limit, LocalError};
pub use forker::{forker_main, is_forker_invocation};
pub use launcher::{LocalLauncher, LocalOptions};
pub use probe::{Check, HostProbe};
pub use sandbox::LocalSandbox;
