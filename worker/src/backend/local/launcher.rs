//! Makes sandboxes: the worker's handle on its forker, its cgroups and its id ranges.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use broker_schema::SandboxId;
use broker_schema::pool::{ImageRef, Limits};
#[cfg(debug_assertions)]
use remuda_telemetry::failpoint;
use remuda_telemetry::history::History;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::cgroup::{self, Plan};
use super::cgroup_fs::{Cgroups, Instance};
use super::error::{Limit, LocalError};
use super::greeting;
use super::id_range::{IdRange, IdRanges, LOCK_FOLDER};
use super::link::{Link, Pending};
use super::probe::HostProbe;
#[cfg(debug_assertions)]
use super::protocol::Watch;
use super::protocol::{Outcome, Request, SandboxSpec, TemplateId, TemplateSource};
use super::sandbox::{Body, LocalSandbox};

/// From the request to a ready sidecar. Far above any real time, so that a stuck one is noticed.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// Less does not hold a shell.
const LEAST_MEMORY: u64 = 4 << 20;
const LEAST_DISK: u64 = 256 << 10;
/// The sandbox's own folders need a few.
const LEAST_INODES: u64 = 64;

#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The static sidecar.
    pub sidecar: PathBuf,
    /// A binary that calls `forker_main`; this process's own when absent.
    pub forker_exe: Option<PathBuf>,
    /// A folder of this worker's.
    pub state_dir: PathBuf,
    /// Make sandboxes even when this host cannot enforce one of their limits.
    pub allow_unenforced: bool,
}

/// Makes sandboxes. Clones are the same launcher.
#[derive(Debug, Clone)]
pub struct LocalLauncher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    probe: HostProbe,
    allow_unenforced: bool,
    link: Link,
    instance: Arc<Instance>,
    ranges: IdRanges,
    templates: Mutex<HashMap<ImageRef, TemplateId>>,
}

impl LocalLauncher {
    /// Starts the forker and takes this worker's places on the host.
    pub async fn start(options: LocalOptions) -> Result<Self, LocalError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LocalError::NotRoot);
        }
        let sidecar = File::open(&options.sidecar).map_err(|source| LocalError::OpenSidecar {
            path: options.sidecar.clone(),
            source,
        })?;
        let mount_point = options.state_dir.join("forker");
        let made = std::fs::create_dir_all(&mount_point);
        let mount_point = made
            .and_then(|()| mount_point.canonicalize())
            .map_err(|source| LocalError::StateDir {
                path: options.state_dir.clone(),
                source,
            })?;
        let probe = HostProbe::run();
        let ranges = IdRanges::new(Path::new(LOCK_FOLDER))?;
        let (cgroups, name) = (probe.cgroups.clone(), instance_name());
        let instance = blocking(move || Instance::new(&cgroups, name)).await?;
        let exe = options
            .forker_exe
            .unwrap_or_else(|| "/proc/self/exe".into());
        let link = Link::start(&exe, sidecar, mount_point).await?;
        Ok(Self(Arc::new(Inner {
            probe,
            allow_unenforced: options.allow_unenforced,
            link,
            instance: Arc::new(instance),
            ranges,
            templates: Mutex::default(),
        })))
    }

    pub fn probe(&self) -> &HostProbe {
        &self.0.probe
    }

    /// Makes a sandbox and returns when its sidecar is ready. A caller that gives up leaves
    /// nothing behind.
    pub async fn create(
        &self,
        sandbox: SandboxId,
        image: &ImageRef,
        limits: &Limits,
    ) -> Result<LocalSandbox, LocalError> {
        let plan = self.0.plan(limits)?;
        let template = self.0.template(image).await?;
        let (inner, limits) = (self.0.clone(), limits.clone());
        // A task of its own: dropping the future half-way would lose track of a process.
        let task = remuda_telemetry::task::spawn("sandbox-create", async move {
            let started = inner.clone();
            let asked = blocking(move || started.ask(sandbox, &plan, template, &limits)).await?;
            inner.finish(asked).await
        });
        task.await.unwrap_or(Err(LocalError::DiedStarting))
    }

    /// Ends the forker, and with it every sandbox that is still there, and leaves nothing of
    /// them on the host.
    pub async fn shutdown(self) {
        self.0.link.stop().await;
        let instance = self.0.instance.clone();
        let removed = blocking(move || {
            instance.remove_all();
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "control groups are left to the next worker");
        }
    }
}

/// A sandbox that was asked for, with what it will hold.
struct Asked {
    pending: Pending,
    cgroups: Cgroups,
    range: IdRange,
}

impl Inner {
    fn plan(&self, limits: &Limits) -> Result<Plan, LocalError> {
        check_limits(limits)?;
        let plan = cgroup::plan(&self.probe.cgroups, limits);
        match plan.unenforceable.first() {
            Some((limit, why)) if !self.allow_unenforced => Err(LocalError::LimitUnenforceable {
                limit: *limit,
                why: why.clone(),
            }),
            _ => Ok(plan),
        }
    }

    /// Prepares an image once. The lock makes others wait who want it too.
    async fn template(&self, image: &ImageRef) -> Result<TemplateId, LocalError> {
        let mut templates = self.templates.lock().await;
        if let Some(id) = templates.get(image) {
            return Ok(*id);
        }
        let source = match image {
            ImageRef::Host => TemplateSource::Host,
            ImageRef::Rootfs(path) if path.is_absolute() => TemplateSource::Rootfs(path.clone()),
            ImageRef::Rootfs(path) => {
                return Err(LocalError::RelativeImage { path: path.clone() });
            }
        };
        let name = match image {
            ImageRef::Host => "host".to_owned(),
            ImageRef::Rootfs(path) => path.display().to_string(),
        };
        let answer = self
            .link
            .ask(|id| Request::Prepare { id, image: source }, &[]);
        match answer.await {
            Ok((Outcome::Prepared(id), _)) => {
                templates.insert(image.clone(), id);
                Ok(id)
            }
            Ok(_) => Err(unexpected_answer()),
            Err(LocalError::Forker { source, .. }) => Err(LocalError::Image {
                image: name,
                source,
            }),
            Err(error) => Err(error),
        }
    }

    /// Blocks for as long as the kernel takes to make cgroups.
    fn ask(
        &self,
        sandbox: SandboxId,
        plan: &Plan,
        template: TemplateId,
        limits: &Limits,
    ) -> Result<Asked, LocalError> {
        let range = self.ranges.take()?;
        let mut cgroups = Cgroups::default();
        let made = self
            .instance
            .create(plan, &sandbox.to_string(), &mut cgroups);
        let history = History::process();
        let mut fds = cgroups.procs();
        fds.extend(history.descriptor());
        let spec = SandboxSpec {
            template,
            id_base: range.base(),
            disk_bytes: storage_bytes(limits),
            inodes: limits.inodes,
            open_files: limits.open_files,
            #[cfg(debug_assertions)]
            watch: history.is_on().then(|| Watch {
                name: sandbox.to_string(),
                failpoints: failpoint::of_sidecars(),
            }),
        };
        let request = |id| Request::Create { id, sandbox: spec };
        match made.and_then(|()| self.link.ask_now(request, &fds)) {
            Ok(pending) => Ok(Asked {
                pending,
                cgroups,
                range,
            }),
            Err(error) => Err(forget(cgroups, error)),
        }
    }

    async fn finish(&self, asked: Asked) -> Result<LocalSandbox, LocalError> {
        let Asked {
            pending,
            cgroups,
            range,
        } = asked;
        let id_base = range.base();
        let (pid, fds) = match pending.wait().await {
            Ok((Outcome::Created { pid }, fds)) => (pid, fds),
            Ok(_) => return Err(forget(cgroups, unexpected_answer())),
            Err(error) => return Err(forget(cgroups, error)),
        };
        let Ok([pidfd, socket]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(forget(cgroups, unexpected_answer()));
        };
        let body = Body::new(pid, pidfd, cgroups, range, self.instance.clone())?;
        let mut socket = async_socket(socket)?;
        let greeted = greeting::until_ready(&mut socket, pid, body.pidfd(), id_base);
        let greeted = timeout(READY_WITHIN, greeted).await;
        match greeted.unwrap_or(Err(LocalError::StartTimedOut {
            after: READY_WITHIN,
        })) {
            Ok(()) => Ok(LocalSandbox::new(socket, body)),
            Err(error) => {
                body.destroy().await?;
                Err(error)
            }
        }
    }
}

/// Removes the cgroups of a sandbox that never came to be.
fn forget(mut cgroups: Cgroups, error: LocalError) -> LocalError {
    if let Err(error) = cgroups.remove() {
        tracing::warn!(%error, "a sandbox that failed to start left a cgroup");
    }
    error
}

fn unexpected_answer() -> LocalError {
    LocalError::Forker {
        step: "answer what it was asked; it is of another build".to_owned(),
        source: std::io::Error::from_raw_os_error(libc::EPROTO),
    }
}

fn async_socket(socket: OwnedFd) -> Result<UnixStream, LocalError> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    let made = socket
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(socket));
    made.map_err(|source| LocalError::Watch { source })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LocalError> + Send + 'static,
) -> Result<T, LocalError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        Err(LocalError::Watch {
            source: std::io::Error::other(error),
        })
    })
}

/// Unique among the workers of a host, whatever pid namespace they are in.
fn instance_name() -> String {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    format!(
        "{}-{nanos:x}-{:x}",
        std::process::id(),
        rand::random::<u32>()
    )
}

/// The size of the writable layer. It lives in memory and counts as memory, so that a layer as
/// large as the memory limit would end a program that fills it with an OOM kill. A little less,
/// and it gets the error that a full disk gives.
fn storage_bytes(limits: &Limits) -> u64 {
    limits
        .disk_bytes
        .min(limits.memory_bytes - limits.memory_bytes / 8)
}

fn check_limits(limits: &Limits) -> Result<(), LocalError> {
    let bad = |limit, value: String, why| Err(LocalError::BadLimit { limit, value, why });
    if limits.memory_bytes < LEAST_MEMORY {
        return bad(
            Limit::Memory,
            limits.memory_bytes.to_string(),
            "at least 4 MiB",
        );
    }
    if limits.disk_bytes < LEAST_DISK {
        return bad(
            Limit::Disk,
            limits.disk_bytes.to_string(),
            "at least 256 KiB",
        );
    }
    if limits.inodes < LEAST_INODES {
        return bad(Limit::Inodes, limits.inodes.to_string(), "at least 64");
    }
    if limits.pids == 0 {
        return bad(Limit::Pids, "0".to_owned(), "at least 1");
    }
    match limits.cpus {
        Some(cpus) if !(cpus.is_finite() && cpus > 0.0) => {
            bad(Limit::Cpus, cpus.to_string(), "more than 0")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_full_memory() {
        for (memory_bytes, disk_bytes, expected) in
            [(512, 512, 448), (512, 100, 100), (64, 900, 56)]
        {
            let limits = Limits {
                memory_bytes,
                disk_bytes,
                ..Limits::default()
            };
            assert_eq!(storage_bytes(&limits), expected);
        }
    }

    #[test]
    fn limits_out_of_range_are_refused_by_name() {
        let fine = Limits::default();
        assert!(check_limits(&fine).is_ok());
        let cases = [
            (
                Limit::Memory,
                Limits {
                    memory_bytes: 1,
                    ..fine.clone()
                },
            ),
            (
                Limit::Disk,
                Limits {
                    disk_bytes: 0,
                    ..fine.clone()
                },
            ),
            (
                Limit::Inodes,
                Limits {
                    inodes: 3,
                    ..fine.clone()
                },
            ),
            (
                Limit::Pids,
                Limits {
                    pids: 0,
                    ..fine.clone()
                },
            ),
            (
                Limit::Cpus,
                Limits {
                    cpus: Some(0.0),
                    ..fine.clone()
                },
            ),
            (
                Limit::Cpus,
                Limits {
                    cpus: Some(f64::NAN),
                    ..fine.clone()
                },
            ),
        ];
        for (expected, limits) in cases {
            match check_limits(&limits) {
                Err(LocalError::BadLimit { limit, .. }) => assert_eq!(limit, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
