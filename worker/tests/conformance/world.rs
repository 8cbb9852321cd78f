//! One backend under test, and how the same things are said to each.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what tests share, where clippy's own exception does not reach"
)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use broker_schema::pool::{ImageRef, Limits};
use broker_schema::{Epoch, SandboxId};
use bytes::Bytes;
use remuda_proto::v1;
use remuda_proto::v1::execute_event::Event;
use remuda_telemetry::TraceHeaders;
use remuda_tests::wait::eventually;
use remuda_worker::CallError;
use remuda_worker::backend::fake::FakeBackend;
use remuda_worker::backend::local::{LocalLauncher, LocalOptions};
use remuda_worker::backend::{Backend, Backends, Events, Sandbox};
use tempfile::TempDir;

pub(crate) const LONG: Duration = Duration::from_secs(30);
const MEMORY: u64 = 64 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Fake,
    Local,
}

pub(crate) struct World {
    pub(crate) kind: Kind,
    backend: Backend,
    backends: Backends,
    _state: Option<TempDir>,
}

type Argv = Vec<Bytes>;

impl World {
    #[expect(clippy::unused_async, reason = "as the other one has it")]
    pub(crate) async fn fake() -> Self {
        let fake = FakeBackend::default();
        Self {
            kind: Kind::Fake,
            backend: Backend::Fake(fake.clone()),
            backends: Backends {
                local: None,
                fake: Some(fake),
            },
            _state: None,
        }
    }

    /// None, with the reason on stdout, where this host cannot run it.
    pub(crate) async fn local(test: &str) -> Option<Self> {
        let sidecar = if nix::unistd::geteuid().is_root() {
            remuda_tests::binaries::sidecar().map_err(|error| error.to_string())
        } else {
            Err("local sandboxes need root".to_owned())
        };
        let sidecar = match sidecar {
            Ok(sidecar) => sidecar,
            Err(why) => {
                println!("local::{test} is skipped: {why}");
                return None;
            }
        };
        let state = tempfile::tempdir().unwrap();
        let launcher = LocalLauncher::start(LocalOptions {
            sidecar,
            forker_exe: Some(PathBuf::from(env!("CARGO_BIN_EXE_remuda-worker"))),
            state_dir: state.path().to_owned(),
            allow_unenforced: true,
        })
        .await
        .unwrap();
        Some(Self {
            kind: Kind::Local,
            backend: Backend::Local(launcher.clone()),
            backends: Backends {
                local: Some(launcher),
                fake: None,
            },
            _state: Some(state),
        })
    }

    pub(crate) fn skip(&self, why: &str) {
        println!("{:?}: skipped: {why}", self.kind);
    }

    pub(crate) async fn end(self) {
        if let Some(local) = self.backends.local {
            drop(self.backend);
            local.shutdown().await;
        }
    }

    pub(crate) async fn sandbox(&self) -> Held {
        let limits = Limits {
            memory_bytes: MEMORY,
            disk_bytes: 32 << 20,
            inodes: 4096,
            pids: 64,
            ..Limits::default()
        };
        let id = SandboxId::new();
        let inner = self.backend.create(id, &ImageRef::Host, &limits).await;
        Held {
            inner: inner.unwrap(),
            epoch: Epoch::new(1, 1),
            trace: TraceHeaders::default(),
        }
    }

    /// What exists of these sandboxes: fake ones alive, or processes in their pid namespaces.
    pub(crate) fn remains(&self, marks: &[Mark]) -> usize {
        match &self.backends.fake {
            Some(fake) => fake.alive() as usize,
            None => marks.iter().map(Mark::remains).sum(),
        }
    }

    /// Ends a sandbox from outside.
    pub(crate) async fn kill(&self, sandbox: &Held) {
        match self.kind {
            Kind::Fake => {
                let request = sandbox.request(argv(&["fake:die"]));
                // Listened to until it is gone: dropping it would kill the command first.
                let events = sandbox.inner.execute(request, &sandbox.trace).await;
                if let Ok(mut events) = events {
                    while events.next().await.is_ok() {}
                }
            }
            Kind::Local => {
                let pid = sandbox.inner.pid().unwrap();
                let pid = nix::unistd::Pid::from_raw(pid);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            }
        }
    }

    fn either(&self, fake: &[&str], shell: &str) -> Argv {
        match self.kind {
            Kind::Fake => argv(fake),
            Kind::Local => argv(&["/bin/sh", "-c", shell]),
        }
    }

    pub(crate) fn exit(&self, code: i32) -> Argv {
        self.either(&["fake:exit", &code.to_string()], &format!("exit {code}"))
    }

    pub(crate) fn print(&self, stdout: &str, stderr: &str) -> Argv {
        self.either(
            &["fake:print", stdout, "fake:error", stderr],
            &format!("printf '{stdout}'; printf '{stderr}' >&2"),
        )
    }

    /// What [`World::print`] makes of a text with an escape.
    pub(crate) fn printed(&self, text: &str) -> Vec<u8> {
        match self.kind {
            Kind::Fake => text.as_bytes().to_vec(),
            Kind::Local => text.replace("\\n", "\n").into_bytes(),
        }
    }

    pub(crate) fn print_and_sleep(&self, text: &str, millis: u64) -> Argv {
        self.either(
            &["fake:print", text, "fake:sleep", &millis.to_string()],
            &format!("printf '{text}'; sleep {}", millis / 1000),
        )
    }

    pub(crate) fn cat(&self) -> Argv {
        self.either(&["fake:cat"], "exec cat")
    }

    pub(crate) fn env(&self, name: &str) -> Argv {
        self.either(&["fake:env", name], &format!("printf %s \"${name}\""))
    }

    pub(crate) fn pwd(&self) -> Argv {
        self.either(&["fake:pwd"], "printf %s \"$PWD\"")
    }

    pub(crate) fn flood(&self, bytes: u64) -> Argv {
        self.either(
            &["fake:flood", &bytes.to_string()],
            &format!("head -c {bytes} /dev/zero"),
        )
    }

    pub(crate) fn hog(&self) -> Argv {
        self.either(&["fake:oom"], "exec tail /dev/zero")
    }
}

fn argv(words: &[&str]) -> Argv {
    let words = words.iter();
    words
        .map(|word| Bytes::copy_from_slice(word.as_bytes()))
        .collect()
}

/// What a sandbox is known by while it exists, and must be gone after it.
#[derive(Debug)]
pub(crate) struct Mark {
    namespace: Option<PathBuf>,
    cgroups: Vec<PathBuf>,
}

impl Mark {
    fn of(pid: Option<i32>) -> Self {
        let Some(process) = pid.map(|pid| PathBuf::from(format!("/proc/{pid}"))) else {
            return Self {
                namespace: None,
                cgroups: Vec::new(),
            };
        };
        let memberships = std::fs::read_to_string(process.join("cgroup")).unwrap();
        Self {
            namespace: Some(namespace(&process).unwrap()),
            cgroups: memberships.lines().flat_map(folders).collect(),
        }
    }

    fn remains(&self) -> usize {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let inside = processes
            .filter_map(|process| namespace(&process.path()))
            .filter(|found| Some(found) == self.namespace.as_ref());
        let cgroups = self.cgroups.iter().filter(|folder| folder.exists());
        inside.count() + cgroups.count()
    }
}

fn namespace(process: &Path) -> Option<PathBuf> {
    std::fs::read_link(process.join("ns/pid")).ok()
}

/// The folders of one line of `/proc/<pid>/cgroup` that were made for a sandbox.
fn folders(line: &str) -> Vec<PathBuf> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
        return Vec::new();
    };
    // Deeper than this worker's own: `/`, `/a`, or wherever the tests were started.
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    if own.lines().any(|line| line.ends_with(&format!(":{path}"))) {
        return Vec::new();
    }
    let mounts = ["", "unified"].into_iter().chain([controllers]);
    mounts
        .map(|mount| Path::new("/sys/fs/cgroup").join(mount).join(&path[1..]))
        .filter(|folder| folder.exists())
        .collect()
}

/// A sandbox under one epoch.
pub(crate) struct Held {
    pub(crate) inner: Sandbox,
    pub(crate) epoch: Epoch,
    pub(crate) trace: TraceHeaders,
}

/// What a command came to.
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: v1::Exited,
}

impl Held {
    pub(crate) fn request(&self, argv: Argv) -> v1::ExecuteRequest {
        v1::ExecuteRequest {
            epoch: self.epoch.0,
            argv,
            env: vec!["PATH=/usr/bin:/bin".into()],
            work_dir: Bytes::new(),
            stdin: Bytes::new(),
            timeout_ms: 0,
            output_limit: 8 << 20,
        }
    }

    pub(crate) async fn run(&self, argv: Argv) -> Ran {
        self.execute(self.request(argv)).await
    }

    pub(crate) async fn execute(&self, request: v1::ExecuteRequest) -> Ran {
        let mut events = self.inner.execute(request, &self.trace).await.unwrap();
        self.collect(&mut events).await
    }

    pub(crate) async fn collect(&self, events: &mut Events) -> Ran {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let event = tokio::time::timeout(2 * LONG, events.next()).await;
            match event.unwrap().unwrap() {
                Event::Started(_) => {}
                Event::Stdout(data) => stdout.extend(data),
                Event::Stderr(data) => stderr.extend(data),
                Event::Exited(exit) => {
                    return Ran {
                        stdout,
                        stderr,
                        exit,
                    };
                }
            }
        }
    }

    /// A command that has printed something and runs on, and its process.
    pub(crate) async fn started(&self, request: v1::ExecuteRequest) -> (Events, i32) {
        let mut events = self.inner.execute(request, &self.trace).await.unwrap();
        let mut pid = 0;
        loop {
            let event = tokio::time::timeout(LONG, events.next()).await;
            match event.unwrap().unwrap() {
                Event::Started(started) => pid = started.pid,
                Event::Stdout(_) => return (events, pid),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn write(
        &self,
        path: &str,
        content: &[u8],
    ) -> Result<v1::WriteFileResponse, CallError> {
        let request = v1::WriteFileRequest {
            epoch: self.epoch.0,
            path: Bytes::copy_from_slice(path.as_bytes()),
            content: Bytes::copy_from_slice(content),
            mode: 0,
        };
        self.inner.write_file(request, &self.trace).await
    }

    pub(crate) async fn read(
        &self,
        path: &str,
        offset: u64,
        limit: u64,
    ) -> Result<v1::ReadFileResponse, CallError> {
        let request = v1::ReadFileRequest {
            epoch: self.epoch.0,
            path: Bytes::copy_from_slice(path.as_bytes()),
            offset,
            limit,
        };
        self.inner.read_file(request, &self.trace).await
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark::of(self.inner.pid())
    }

    pub(crate) async fn processes(&self) -> u32 {
        self.inner.health().await.unwrap().processes
    }

    /// Waits until nothing runs in it.
    pub(crate) async fn idle(&self) {
        eventually("idle sandbox", LONG, async || {
            match self.processes().await {
                0 => Ok(()),
                left => Err(format!("{left} processes")),
            }
        })
        .await
        .unwrap();
    }

    pub(crate) async fn destroy(self) {
        self.inner.destroy().await.unwrap();
    }
}
