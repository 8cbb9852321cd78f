//! Sandboxes in memory that run scripts instead of programs: for tests and simulation.
//!
//! `argv` is the script, read left to right: `fake:print TEXT`, `fake:error TEXT`, `fake:cat`,
//! `fake:env NAME`, `fake:pwd`, `fake:flood BYTES`, `fake:sleep MILLIS`, `fake:signal NUMBER`,
//! `fake:oom`, `fake:host-oom`, `fake:die`, `fake:hang` (and so does every call from then on),
//! `fake:garble` (as does every call), `fake:immortal` (outlives its time), `fake:exit CODE`. A script without an exit exits with 0, any other
//! program is not found. Calls behave as those of a sidecar: epochs, refusals, limits.

mod script;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use broker_schema::SandboxId;
use broker_schema::pool::Limits;
use bytes::Bytes;
use remuda_proto::v1::execute_event::Event;
use remuda_proto::{code, v1};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::CreateError;
use crate::sidecar_client::CallError;

/// Pieces of output under way per command.
const EVENTS_UNDER_WAY: usize = 8;
const MAX_READ: u64 = 1 << 20;
const LARGEST_SIGNAL: i32 = 64;

/// Makes fake sandboxes. Clones are the same backend.
#[derive(Debug, Clone, Default)]
pub struct FakeBackend(Arc<Knobs>);

#[derive(Debug, Default)]
struct Knobs {
    alive: AtomicU64,
    made: AtomicU64,
    executed: AtomicU64,
    broken: AtomicBool,
}

impl FakeBackend {
    /// Sandboxes that have not been destroyed.
    pub fn alive(&self) -> u64 {
        self.0.alive.load(Ordering::SeqCst)
    }

    /// Sandboxes that were ever made.
    pub fn made(&self) -> u64 {
        self.0.made.load(Ordering::SeqCst)
    }

    /// Commands that were ever started.
    pub fn executed(&self) -> u64 {
        self.0.executed.load(Ordering::SeqCst)
    }

    /// From now on no sandbox can be made, or it can again.
    pub fn set_broken(&self, broken: bool) {
        self.0.broken.store(broken, Ordering::SeqCst);
    }

    #[expect(clippy::unused_async, reason = "as the other backends have it")]
    pub(super) async fn create(
        &self,
        sandbox: SandboxId,
        limits: &Limits,
    ) -> Result<FakeSandbox, CreateError> {
        if self.0.broken.load(Ordering::SeqCst) {
            return Err(CreateError::Fake {
                sandbox,
                reason: "it was told to".to_owned(),
            });
        }
        self.0.alive.fetch_add(1, Ordering::SeqCst);
        self.0.made.fetch_add(1, Ordering::SeqCst);
        Ok(FakeSandbox {
            backend: self.clone(),
            shared: Arc::new(Shared {
                disk_bytes: limits.disk_bytes,
                ..Shared::default()
            }),
        })
    }
}

/// One fake sandbox.
#[derive(Debug)]
pub struct FakeSandbox {
    backend: FakeBackend,
    shared: Arc<Shared>,
}

/// What a running script and the handle share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    disk_bytes: u64,
    oom_kills: AtomicU64,
    limit_hits: AtomicU64,
    /// Calls get no answer.
    hung: AtomicBool,
    /// Calls get an answer that makes no sense.
    garbled: AtomicBool,
    died: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    max_epoch: u64,
    files: BTreeMap<String, Vec<u8>>,
    running: BTreeMap<i32, watch::Sender<i32>>,
    last_pid: i32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the sidecar's gate: lower epochs are refused, a higher one ends what runs.
    fn enter(&self, call: &'static str, epoch: u64) -> Result<MutexGuard<'_, State>, CallError> {
        if self.died.is_cancelled() {
            return Err(CallError::Lost {
                call,
                reason: "the fake sandbox has ended".to_owned(),
            });
        }
        if self.hung.load(Ordering::SeqCst) {
            // As a real one after its call's deadline, without the wait.
            return Err(CallError::Silent {
                call,
                within: Duration::from_secs(10),
            });
        }
        if self.garbled.load(Ordering::SeqCst) {
            return Err(CallError::Nonsense {
                call,
                reason: "the fake sandbox was told to".to_owned(),
            });
        }
        let mut state = self.lock();
        if epoch < state.max_epoch {
            let message = format!("epoch {epoch} is superseded by {}", state.max_epoch);
            return Err(refused(call, code::STALE_EPOCH, message));
        }
        if epoch > state.max_epoch {
            state.max_epoch = epoch;
            kill_all(&mut state);
        }
        Ok(state)
    }
}

fn kill_all(state: &mut State) -> u32 {
    let running = std::mem::take(&mut state.running);
    for command in running.values() {
        command.send_replace(9);
    }
    running.len() as u32
}

fn refused(call: &'static str, code: &str, message: impl Into<String>) -> CallError {
    CallError::Refused {
        call,
        code: code.to_owned(),
        message: message.into(),
    }
}

impl FakeSandbox {
    pub(super) fn execute(
        &self,
        request: v1::ExecuteRequest,
    ) -> Result<mpsc::Receiver<Result<Event, CallError>>, CallError> {
        let mut state = self.shared.enter("Execute", request.epoch)?;
        if request.argv.is_empty() {
            return Err(refused("Execute", code::INVALID_ARGUMENT, "argv: is empty"));
        }
        self.backend.0.executed.fetch_add(1, Ordering::SeqCst);
        state.last_pid += 1;
        let pid = state.last_pid;
        let (signal, signals) = watch::channel(0);
        state.running.insert(pid, signal);
        drop(state);
        let (events, receiver) = mpsc::channel(EVENTS_UNDER_WAY);
        let shared = self.shared.clone();
        remuda_telemetry::task::spawn("fake command", async move {
            let run = script::Run {
                pid,
                request,
                events,
                signals,
            };
            run.run(&shared).await;
            shared.lock().running.remove(&pid);
        });
        Ok(receiver)
    }

    pub(super) fn write_file(
        &self,
        request: &v1::WriteFileRequest,
    ) -> Result<v1::WriteFileResponse, CallError> {
        let mut state = self.shared.enter("WriteFile", request.epoch)?;
        let path = resolve("WriteFile", &request.path)?;
        let used: usize = state.files.values().map(Vec::len).sum();
        if (used + request.content.len()) as u64 > self.shared.disk_bytes {
            let message = format!("write {path}: no space left on device");
            return Err(refused("WriteFile", code::NO_SPACE, message));
        }
        state.files.insert(path, request.content.to_vec());
        Ok(v1::WriteFileResponse {
            bytes_written: request.content.len() as u64,
        })
    }

    pub(super) fn read_file(
        &self,
        request: &v1::ReadFileRequest,
    ) -> Result<v1::ReadFileResponse, CallError> {
        let state = self.shared.enter("ReadFile", request.epoch)?;
        let path = resolve("ReadFile", &request.path)?;
        let Some(content) = state.files.get(&path) else {
            let message = format!("open {path}: no such file");
            return Err(refused("ReadFile", code::NOT_FOUND, message));
        };
        let start = (request.offset.min(content.len() as u64)) as usize;
        let most = match request.limit {
            0 => MAX_READ,
            limit => limit.min(MAX_READ),
        };
        let end = (start + most as usize).min(content.len());
        Ok(v1::ReadFileResponse {
            content: Bytes::copy_from_slice(&content[start..end]),
            size: content.len() as u64,
            eof: end == content.len(),
        })
    }

    pub(super) fn signal(&self, request: &v1::SignalRequest) -> Result<(), CallError> {
        let state = self.shared.enter("Signal", request.epoch)?;
        if !(1..=LARGEST_SIGNAL).contains(&request.signal) {
            let message = "signal: must be 1 to 64";
            return Err(refused("Signal", code::INVALID_ARGUMENT, message));
        }
        let Some(command) = state.running.get(&request.pid) else {
            let message = format!("process {} is not one of this sandbox's", request.pid);
            return Err(refused("Signal", code::NO_SUCH_PROCESS, message));
        };
        command.send_replace(request.signal);
        Ok(())
    }

    pub(super) fn reset(&self, request: v1::ResetRequest) -> Result<u32, CallError> {
        let mut state = self.shared.enter("Reset", request.epoch)?;
        if !request.keep_files {
            state.files.clear();
        }
        Ok(kill_all(&mut state))
    }

    pub(super) fn health(&self) -> Result<v1::HealthResponse, CallError> {
        let epoch = self.shared.lock().max_epoch;
        let state = self.shared.enter("Health", epoch)?;
        Ok(v1::HealthResponse {
            max_epoch: state.max_epoch,
            processes: state.running.len() as u32,
            version: "fake".to_owned(),
            uptime_ms: 0,
        })
    }

    pub(super) async fn died(&self) {
        self.shared.died.cancelled().await;
    }

    pub(super) fn oom_kills(&self) -> u64 {
        self.shared.oom_kills.load(Ordering::SeqCst)
    }

    pub(super) fn limit_hits(&self) -> u64 {
        self.shared.limit_hits.load(Ordering::SeqCst)
    }
}

impl Drop for FakeSandbox {
    fn drop(&mut self) {
        self.shared.died.cancel();
        kill_all(&mut self.shared.lock());
        self.backend.0.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The absolute form of a path, which must stay beneath the root.
fn resolve(call: &'static str, path: &[u8]) -> Result<String, CallError> {
    let text = String::from_utf8_lossy(path);
    let mut parts: Vec<&str> = Vec::new();
    if !text.starts_with('/') {
        parts.push("workspace");
    }
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if parts.pop().is_none() {
                    let message = format!("path {text} leads out of the root");
                    return Err(refused(call, code::PATH_ESCAPES, message));
                }
            }
            name => parts.push(name),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}
