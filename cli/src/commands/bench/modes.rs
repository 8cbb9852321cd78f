//! What is measured: one type for each kind of operation.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use broker_schema::pool::{ImageRef, Limits};
use broker_schema::{Command, SandboxId, SessionOptions, Step, StepKind, Terminal};
use futures::StreamExt as _;
use remuda_client::{Client, OutputEvent, Session};
use remuda_worker::backend::local::{LocalLauncher, LocalOptions};

use super::fleet::{Address, BenchFleet, pool, succeeded};
use super::load::{Operation, Phase};
use super::memory;
use super::report::Line;
use crate::quantile::Latencies;

const TRUE: [&str; 1] = ["/bin/true"];

/// Fork, exec and wait, with nothing around it.
#[derive(Debug)]
pub(super) struct Spawn;

impl Operation for Spawn {
    async fn run(&mut self) -> anyhow::Result<()> {
        let spawned = tokio::task::spawn_blocking(|| {
            let began = Instant::now();
            (
                std::process::Command::new(TRUE[0]).status(),
                began.elapsed(),
            )
        });
        let (status, _) = spawned.await?;
        ensure!(status?.success(), "true failed");
        Ok(())
    }
}

/// A core NATS request and its reply: two hops through the server.
#[derive(Debug)]
pub(super) struct Request(async_nats::Client);

const ECHO: &str = "remuda-bench.echo";

impl Request {
    /// Answers requests until it is dropped.
    pub(super) async fn answer(nats: &str) -> anyhow::Result<impl Drop> {
        let client = async_nats::connect(nats).await?;
        let mut requests = client.subscribe(ECHO).await?;
        client.flush().await?;
        let answering = remuda_telemetry::task::spawn("bench-echo", async move {
            while let Some(request) = requests.next().await {
                if let Some(reply) = request.reply {
                    let _ = client.publish(reply, request.payload).await;
                }
            }
        });
        Ok(AbortOnDrop(answering.abort_handle()))
    }

    pub(super) async fn connect(nats: String) -> anyhow::Result<Self> {
        Ok(Self(async_nats::connect(nats).await?))
    }
}

impl Operation for Request {
    async fn run(&mut self) -> anyhow::Result<()> {
        self.0.request(ECHO, "ping".into()).await?;
        Ok(())
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where the time of a task went, by what its terminal says.
#[derive(Debug, Clone, Default)]
pub(super) struct Split(Arc<Mutex<[Latencies; 2]>>);

impl Split {
    fn add(&self, terminal: &Terminal) {
        let run = terminal.times.started.map_or(0, |started| {
            terminal.times.finished.since(started).as_micros() as u64
        });
        let step = terminal.steps.iter().map(|step| step.usage.wall_us).sum();
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts[0].add(run);
        parts[1].add(step);
    }

    /// Medians in milliseconds: in the worker, and in the sandbox.
    pub(super) fn medians(&self) -> [f64; 2] {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        [&parts[0], &parts[1]].map(|part| part.quantiles().map_or(0.0, |q| q.p50 as f64 / 1e3))
    }
}

/// A command in a sandbox that is kept.
#[derive(Debug)]
pub(super) struct SessionStep {
    session: Session,
    split: Split,
}

impl SessionStep {
    pub(super) async fn open(address: Address, split: Split) -> anyhow::Result<Self> {
        let client = address.connect().await?;
        let session = client
            .open_session(&pool()?, SessionOptions::default())
            .await?;
        Ok(Self { session, split })
    }
}

impl Operation for SessionStep {
    async fn run(&mut self) -> anyhow::Result<()> {
        let terminal = Box::pin(self.session.run(vec![Step::command(TRUE)])).await?;
        self.split.add(&terminal);
        succeeded(&terminal)
    }

    async fn close(self) {
        // What is left of it ends with the fleet.
        let _ = Box::pin(self.session.close()).await;
    }
}

/// A command in a sandbox of its own.
#[derive(Debug)]
pub(super) struct OneShot(Client);

impl OneShot {
    pub(super) async fn connect(address: Address) -> anyhow::Result<Self> {
        Ok(Self(address.connect().await?))
    }
}

impl Operation for OneShot {
    async fn run(&mut self) -> anyhow::Result<()> {
        let request = self.0.task(&pool()?, vec![Step::command(TRUE)]);
        succeeded(&Box::pin(self.0.run(request)).await?)
    }
}

/// Makes sandboxes by itself, without a fleet.
#[derive(Debug, Clone)]
pub(super) struct Maker {
    launcher: LocalLauncher,
    ready: Arc<Mutex<Latencies>>,
}

impl Maker {
    pub(super) async fn start(data: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let launcher = LocalLauncher::start(LocalOptions {
            sidecar: program.with_file_name("remuda-sidecar"),
            forker_exe: None,
            state_dir: data.join("bench-launcher"),
            allow_unenforced: false,
        })
        .await?;
        Ok(Self {
            launcher,
            ready: Arc::default(),
        })
    }

    pub(super) fn operation(&self) -> impl Future<Output = anyhow::Result<Self>> + Send + 'static {
        let maker = self.clone();
        async move { Ok(maker) }
    }

    /// From nothing to ready up to now, p50 and p90, in milliseconds.
    pub(super) fn ready_ms(&self) -> (f64, f64) {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready
            .quantiles()
            .map_or((0.0, 0.0), |q| (q.p50 as f64 / 1e3, q.p90 as f64 / 1e3))
    }
}

impl Operation for Maker {
    async fn run(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let sandbox = self
            .launcher
            .create(SandboxId::new(), &ImageRef::Host, &Limits::default())
            .await?;
        let took = began.elapsed();
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(took.as_micros() as u64);
        sandbox.destroy().await?;
        Ok(())
    }
}

/// How often a stream is measured.
const STREAMS: usize = 3;

/// Streams output from a sandbox to this process, checked byte for byte by its
/// digest, and watches the worker's memory.
pub(super) async fn stream(fleet: &BenchFleet, mib: u64) -> anyhow::Result<Line> {
    let client = fleet.address().connect().await?;
    let worker = fleet.worker_pid().context("the fleet has no worker")?;
    let bytes = mib << 20;
    let before = memory::resident_mib(worker)?;
    let mut highest = before;
    let mut phase = Phase::default();
    let began = Instant::now();
    for _ in 0..STREAMS {
        let mut request = client.task(
            &pool()?,
            vec![Step {
                name: String::new(),
                action: StepKind::Command(Command {
                    argv: vec![
                        "head".into(),
                        "-c".into(),
                        bytes.to_string().as_str().into(),
                        "/dev/zero".into(),
                    ],
                    output_limit: Some(bytes),
                    ..Command::default()
                }),
            }],
        );
        request.timeout_ms = Some(120_000);
        let one = Instant::now();
        let mut output = Box::pin(client.stream(request)).await?;
        let mut seen = 0_u64;
        let mut looked = Instant::now();
        let terminal = loop {
            match output.next().await.context("the stream ended early")?? {
                OutputEvent::Output { bytes, .. } => seen += bytes.len() as u64,
                OutputEvent::Done(terminal) => break terminal,
                OutputEvent::Reset { .. } => seen = 0,
                OutputEvent::StepExit { .. } => {}
            }
            if looked.elapsed() > Duration::from_millis(50) {
                highest = highest.max(memory::resident_mib(worker)?);
                looked = Instant::now();
            }
        };
        succeeded(&terminal)?;
        ensure!(seen == bytes, "{seen} of {bytes} bytes came");
        phase.latencies.push(one.elapsed());
    }
    phase.wall = began.elapsed();
    let rate = (bytes * STREAMS as u64) as f64 / 1e6 / phase.wall.as_secs_f64();
    let mut line = Line::new("stdout streamed", "namespaces", true, &[(1, phase)]);
    line.more.insert("mib", mib as f64);
    line.more.insert("mb_per_s", (rate * 10.0).round() / 10.0);
    line.more.insert("worker_mib_before", before.round());
    line.more.insert("worker_mib_highest", highest.round());
    Ok(line)
}
