//! The calls: each passes the epoch gate, then goes to the module that knows.

use std::pin::Pin;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{Pid, Uid};
use remuda_proto::v1::sidecar_server::Sidecar;
use remuda_proto::v1::{
    AdoptRequest, AdoptResponse, ExecuteEvent, ExecuteRequest, HealthRequest, HealthResponse,
    ReadFileRequest, ReadFileResponse, ResetRequest, ResetResponse, SignalRequest, SignalResponse,
    WriteFileRequest, WriteFileResponse,
};
use tokio::sync::{Mutex, MutexGuard, mpsc};
use tokio::task::yield_now;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use crate::command::Command;
use crate::epoch::{Decision, EpochGate};
use crate::error::{Failure, shown};
use crate::execute::{self, Surroundings};
use crate::files::Files;
use crate::history::{self, Entry};
use crate::path::open_folder;
use crate::sweep::{Progress, Sweep};
use crate::tree;
use crate::user::AsUser;

/// W3C trace context, handed back so that a caller sees that it arrived.
const TRACE_KEY: &str = "traceparent";
/// Pieces of output under way per command, 64 KiB each at most.
const EVENTS_UNDER_WAY: usize = 8;
/// How long the first event waits for company.
const TOGETHER: Duration = Duration::from_millis(10);
const KILL_SECONDS: u64 = 5;
const SWEEP_SECONDS: u64 = 5;
const SWEEP_PIECE: usize = 512;
const LARGEST_SIGNAL: i32 = 64;

/// The service of one sandbox.
#[derive(Debug)]
pub(crate) struct SidecarService {
    /// Held while a call decides and starts to act, so that no call of an old
    /// holder acts after the new one was let in.
    gate: Mutex<EpochGate>,
    pub(crate) around: Surroundings,
    pub(crate) files: Files,
    /// Where commands start that name no folder.
    pub(crate) workspace: Vec<u8>,
    /// What a reset empties, relative to the root.
    pub(crate) scratch: Vec<Vec<u8>>,
    started: Instant,
}

impl SidecarService {
    pub(crate) fn new(
        around: Surroundings,
        files: Files,
        workspace: Vec<u8>,
        scratch: Vec<Vec<u8>>,
    ) -> Self {
        let gate = Mutex::new(EpochGate::default());
        Self {
            gate,
            around,
            files,
            workspace,
            scratch,
            started: Instant::now(),
        }
    }

    /// Lets a call pass under its epoch, after ending what an older holder
    /// left running; tells how many processes that were.
    async fn enter(
        &self,
        call: &'static str,
        epoch: u64,
    ) -> Result<(MutexGuard<'_, EpochGate>, u32), Failure> {
        let mut gate = self.gate.lock().await;
        let highest = gate.highest();
        let (accepted, killed) = match gate.judge(epoch) {
            Decision::Current => (true, 0),
            Decision::Stale { .. } => (history::no_epoch_check(), 0),
            Decision::Adopt => {
                let killed = self.kill_everything().await?;
                gate.taken_over();
                (true, killed)
            }
        };
        history::entered(Entry {
            epoch,
            highest,
            call,
            accepted,
            killed,
        });
        if !accepted {
            return Err(Failure::StaleEpoch {
                given: epoch,
                highest,
            });
        }
        Ok((gate, killed))
    }

    /// Ends every process of the sandbox and waits until none is left.
    async fn kill_everything(&self) -> Result<u32, Failure> {
        let reaper = &self.around.reaper;
        if !reaper.reap() {
            return Ok(0);
        }
        let killed = tree::living().len() as u32;
        let deadline = Instant::now() + Duration::from_secs(KILL_SECONDS);
        // Every orphan becomes a child of this process: none left means that
        // nothing is left.
        loop {
            tree::kill_below_self();
            if !reaper.reap() {
                return Ok(killed);
            }
            if Instant::now() >= deadline {
                return Err(Failure::Kill {
                    seconds: KILL_SECONDS,
                });
            }
            // Past the wait it is tried again, against a fork just missed.
            let _elapsed = tokio::time::timeout(Duration::from_millis(5), reaper.changed()).await;
        }
    }

    /// Empties what the user could write to.
    async fn empty_scratch(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(SWEEP_SECONDS);
        let owner = self
            .files
            .user
            .map_or_else(|| Uid::effective().as_raw(), |user| user.uid);
        for folder in &self.scratch {
            let failed = |reason: &str| Failure::Reset {
                folder: shown(folder),
                reason: reason.to_owned(),
            };
            let opened = {
                let _user = AsUser::enter(self.files.user);
                open_folder(&self.files.root, folder)
            };
            let mut sweep = match opened {
                Ok(opened) => Sweep::start(opened, owner),
                // Not every image has all of them.
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(failed(errno.desc())),
            };
            loop {
                let progress = {
                    let _user = AsUser::enter(self.files.user);
                    sweep.step(SWEEP_PIECE)
                };
                match progress.map_err(|errno| failed(errno.desc()))? {
                    Progress::Done => break,
                    Progress::More if Instant::now() >= deadline => {
                        return Err(failed("it takes too long"));
                    }
                    Progress::More => yield_now().await,
                }
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Sidecar for SidecarService {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        // A takeover under way holds the gate; its epoch is not in force yet.
        let max_epoch = self.gate.lock().await.highest();
        Ok(Response::new(HealthResponse {
            max_epoch,
            processes: tree::living().len() as u32,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
        }))
    }

    async fn adopt(
        &self,
        request: Request<AdoptRequest>,
    ) -> Result<Response<AdoptResponse>, Status> {
        let (_gate, killed) = self.enter("adopt", request.into_inner().epoch).await?;
        Ok(Response::new(AdoptResponse { killed }))
    }

    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let trace = request.metadata().get(TRACE_KEY).cloned();
        let request = request.into_inner();
        let epoch = request.epoch;
        let (gate, _) = self.enter("execute", epoch).await?;
        history::before_execute();
        if history::garbage() {
            let nothing = tokio_stream::iter([Ok(ExecuteEvent { event: None })]);
            return Ok(Response::new(Box::pin(nothing)));
        }
        let running = {
            let command = {
                let _user = AsUser::enter(self.files.user);
                Command::prepare(request, &self.workspace)?
            };
            execute::start(epoch, command, &self.around)?
        };
        drop(gate);
        let (events, mut receiver) = mpsc::channel(EVENTS_UNDER_WAY);
        let started = running.started_event();
        follow(running, events);
        // Most commands are over in a moment: all that there is to tell of them
        // goes out at once, and wakes the worker once.
        let first = timeout(TOGETHER, receiver.recv()).await.ok().flatten();
        let beginning = [Some(Ok(started)), first].into_iter().flatten();
        let beginning = tokio_stream::iter(beginning.collect::<Vec<_>>());
        let events = beginning.chain(ReceiverStream::new(receiver));
        let mut response = Response::new(Box::pin(events) as Self::ExecuteStream);
        if let Some(trace) = trace {
            response.metadata_mut().insert(TRACE_KEY, trace);
        }
        Ok(response)
    }

    async fn write_file(
        &self,
        request: Request<WriteFileRequest>,
    ) -> Result<Response<WriteFileResponse>, Status> {
        let request = request.into_inner();
        let (_gate, _) = self.enter("write_file", request.epoch).await?;
        let bytes_written = self.files.write(&request)?;
        Ok(Response::new(WriteFileResponse { bytes_written }))
    }

    async fn read_file(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Result<Response<ReadFileResponse>, Status> {
        let request = request.into_inner();
        let (_gate, _) = self.enter("read_file", request.epoch).await?;
        Ok(Response::new(self.files.read(&request)?))
    }

    async fn signal(
        &self,
        request: Request<SignalRequest>,
    ) -> Result<Response<SignalResponse>, Status> {
        let request = request.into_inner();
        let (_gate, _) = self.enter("signal", request.epoch).await?;
        let SignalRequest {
            pid, signal, group, ..
        } = request;
        if !(1..=LARGEST_SIGNAL).contains(&signal) {
            return Err(Failure::invalid("signal", "must be 1 to 64").into());
        }
        // What has ended counts as gone even before its status was taken.
        let known = tree::living()
            .into_iter()
            .find(|process| process.pid == pid);
        let process = known.ok_or(Failure::NoSuchProcess { pid })?;
        let target = if group { -process.group } else { process.pid };
        if target == -1 || process.group == nix::unistd::getpgrp().as_raw() {
            return Err(Failure::NoSuchProcess { pid }.into());
        }
        crate::sys::send_signal(Pid::from_raw(target), signal)
            .map_err(|_| Failure::NoSuchProcess { pid })?;
        Ok(Response::new(SignalResponse {}))
    }

    async fn reset(
        &self,
        request: Request<ResetRequest>,
    ) -> Result<Response<ResetResponse>, Status> {
        let request = request.into_inner();
        let (_gate, adopted) = self.enter("reset", request.epoch).await?;
        let killed = adopted + self.kill_everything().await?;
        if !request.keep_files {
            self.empty_scratch().await?;
        }
        Ok(Response::new(ResetResponse { killed }))
    }
}

/// A command is followed by a task of its own, not by the call's stream: its
/// time-out must strike even while the caller does not read.
#[expect(
    clippy::disallowed_methods,
    reason = "the sidecar has neither spans nor telemetry"
)]
fn follow(running: execute::Running, events: crate::output::Events) {
    tokio::spawn(running.follow(events));
}
