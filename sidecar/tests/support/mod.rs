//! Runs the real binary as an ordinary process over a socketpair.

#![allow(clippy::unwrap_used, reason = "what tests share panics as they do")]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test crate uses its own part"
)]
#![allow(
    missing_debug_implementations,
    reason = "tests print outcomes, not sidecars"
)]

use std::future::Future;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use remuda_proto::ERROR_CODE_KEY;
use remuda_proto::v1::sidecar_client::SidecarClient;
use remuda_proto::v1::{ExecuteEvent, ExecuteRequest, Exited, execute_event::Event};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// Examples are given another one.
const BINARY: Option<&str> = option_env!("CARGO_BIN_EXE_remuda-sidecar");

pub const EPOCH: u64 = 7;
/// Past this a wait has failed; nothing takes this long.
pub const LONG: Duration = Duration::from_secs(20);

/// A sidecar that runs, with a root folder of its own. Killed when dropped.
pub struct Sidecar {
    pub client: SidecarClient<Channel>,
    pub process: Child,
    pub root: TempDir,
}

impl Sidecar {
    pub fn start() -> Self {
        Self::start_with(&[], Stdio::null())
    }

    /// Starts with further arguments; `stdout` may carry a descriptor that one
    /// of them names as number 1.
    pub fn start_with(arguments: &[&str], stdout: Stdio) -> Self {
        Self::start_binary(BINARY.unwrap(), arguments, stdout)
    }

    pub fn start_binary(binary: &str, arguments: &[&str], stdout: Stdio) -> Self {
        let root = tempfile::tempdir().unwrap();
        let workspace = root.path().join("workspace");
        std::fs::create_dir(&workspace).unwrap();
        if nix::unistd::geteuid().is_root() {
            for path in [root.path(), &workspace] {
                std::os::unix::fs::chown(path, Some(1000), Some(1000)).unwrap();
            }
        }
        let (near, far) = StdUnixStream::pair().unwrap();
        let process = Command::new(binary)
            .args(["--fd", "0", "--root"])
            .arg(root.path())
            .arg("--workspace")
            .arg(&workspace)
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(far)))
            .stdout(stdout)
            .spawn()
            .unwrap();
        near.set_read_timeout(Some(LONG)).unwrap();
        let mut ready = [0];
        (&near).read_exact(&mut ready).unwrap();
        assert_eq!(&ready, b"R");
        near.set_nonblocking(true).unwrap();
        let mut near = Some(UnixStream::from_std(near).unwrap());
        let channel = Endpoint::from_static("http://sidecar").connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let near = near.take().map(TokioIo::new);
                async move { near.ok_or_else(|| std::io::Error::other("one connection only")) }
            }),
        );
        let client = SidecarClient::new(channel)
            .max_decoding_message_size(remuda_proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(remuda_proto::MAX_MESSAGE_BYTES);
        Self {
            client,
            process,
            root,
        }
    }

    pub fn workspace(&self) -> std::path::PathBuf {
        self.root.path().join("workspace")
    }

    pub async fn execute(&self, request: ExecuteRequest) -> Outcome {
        let stream = self
            .client
            .clone()
            .execute(request)
            .await
            .unwrap()
            .into_inner();
        within(collect(stream)).await
    }

    pub async fn shell(&self, script: &str) -> Outcome {
        self.execute(shell(script)).await
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _gone = self.process.kill();
        let _gone = self.process.wait();
    }
}

/// What one command gave.
#[derive(Debug, Default)]
pub struct Outcome {
    pub pid: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: Exited,
}

pub async fn collect(mut stream: Streaming<ExecuteEvent>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut ends = 0;
    while let Some(event) = stream.message().await.unwrap() {
        assert_eq!(ends, 0, "something came after the end");
        match event.event.unwrap() {
            Event::Started(started) => outcome.pid = started.pid,
            Event::Stdout(bytes) => outcome.stdout.extend_from_slice(&bytes),
            Event::Stderr(bytes) => outcome.stderr.extend_from_slice(&bytes),
            Event::Exited(exited) => {
                outcome.exited = exited;
                ends += 1;
            }
        }
    }
    assert_eq!(ends, 1);
    outcome
}

pub fn command(argv: &[&str]) -> ExecuteRequest {
    ExecuteRequest {
        epoch: EPOCH,
        argv: argv
            .iter()
            .map(|argument| argument.as_bytes().to_vec().into())
            .collect(),
        output_limit: 64 << 20,
        ..ExecuteRequest::default()
    }
}

pub fn shell(script: &str) -> ExecuteRequest {
    command(&["/bin/sh", "-c", script])
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("took too long")
}

/// Waits for a condition that another process brings about.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(started.elapsed() < LONG, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Whether a process is there and not just waiting to be reaped.
pub fn lives(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().starts_with(" Z"))
}

pub fn code(status: &Status) -> &str {
    status
        .metadata()
        .get(ERROR_CODE_KEY)
        .map_or("none", |code| code.to_str().unwrap())
}

/// Says why a test that only root can run does nothing.
pub fn root_or_skip(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped {test}: it needs root to run commands as another user");
    }
    root
}
