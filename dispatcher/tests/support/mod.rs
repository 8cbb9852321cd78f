//! A nats-server and a Redis of the test's own, a dispatcher between them, and a worker that
//! only says what a worker says.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![allow(dead_code, reason = "every test file uses another part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use broker_schema::codec::{self, Format};
use broker_schema::event::OfferHint;
use broker_schema::pool::{BackendKind, PoolSpec};
use broker_schema::stream::worker_consumer;
use broker_schema::{
    Placement, SandboxId, Step, TaskId, TaskRequest, Terminal, Timestamp, WorkerId,
};
use remuda_client::broker::{Broker, BrokerOptions, Delivery, Outgoing, Puller};
use remuda_dispatcher::{DispatcherError, DispatcherOptions, readiness, run_with};
use remuda_lease::{LeaseOptions, LeaseStore, Offered, WorkerRecord};
use remuda_telemetry::{Readiness, TaskGroup};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(40);

/// Ends its server with the test.
#[derive(Debug)]
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Fleet {
    pub(crate) broker: Broker,
    pub(crate) lease: LeaseStore,
    pub(crate) readiness: Readiness,
    pub(crate) options: DispatcherOptions,
    shutdown: CancellationToken,
    dispatcher: Option<JoinHandle<Result<(), DispatcherError>>>,
    group: TaskGroup,
    nats: Option<Server>,
    redis: Option<Server>,
    dir: tempfile::TempDir,
}

impl Fleet {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("redis.sock");
        let nats = Command::new(nats_server())
            .args([
                "--addr",
                "127.0.0.1",
                "--port",
                "-1",
                "--jetstream",
                "--store_dir",
            ])
            .arg(dir.path().join("jetstream"))
            .arg("--ports_file_dir")
            .arg(dir.path())
            .arg("--config")
            .arg(config(dir.path()))
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server starts");
        let nats = Server(nats);
        let redis = redis_server(dir.path());
        let url = until("nats-server says its port", async || ports(dir.path())).await;

        let mut options = DispatcherOptions {
            pools: vec![PoolSpec {
                backend: BackendKind::Fake,
                ..PoolSpec::named("py".parse().unwrap())
            }],
            redis: LeaseOptions {
                url: format!("unix://{}", socket.display()),
                ttl: Duration::from_secs(2),
                timeout: Duration::from_secs(2),
                ..LeaseOptions::default()
            },
            ..DispatcherOptions::default()
        };
        options.nats.url.clone_from(&url);
        options.timings.tick = Duration::from_millis(100);
        options.timings.publish = Duration::from_secs(1);
        let broker = until("nats-server answers", async || {
            Broker::connect(&BrokerOptions {
                url: url.clone(),
                ..BrokerOptions::default()
            })
            .await
            .ok()
        })
        .await;
        let lease = until("redis answers", async || {
            LeaseStore::connect(&options.redis).await.ok()
        })
        .await;
        let mut fleet = Self {
            broker,
            lease,
            readiness: readiness(),
            options,
            shutdown: CancellationToken::new(),
            dispatcher: None,
            group: TaskGroup::new(),
            nats: Some(nats),
            redis: Some(redis),
            dir,
        };
        fleet.start_dispatcher().await;
        fleet
    }

    pub(crate) async fn start_dispatcher(&mut self) {
        self.shutdown = CancellationToken::new();
        let running = run_with(
            self.options.clone(),
            self.shutdown.clone(),
            self.readiness.clone(),
        );
        self.dispatcher = Some(self.group.spawn("dispatcher", running));
        until("the dispatcher is ready", async || {
            self.readiness.is_ready().then_some(())
        })
        .await;
    }

    /// Another one with the same configuration, until the token is cancelled.
    pub(crate) async fn second_dispatcher(&self) -> CancellationToken {
        let (shutdown, second) = (CancellationToken::new(), readiness());
        let running = run_with(self.options.clone(), shutdown.clone(), second.clone());
        self.group.spawn("second dispatcher", running);
        until("the second dispatcher is ready", async || {
            second.is_ready().then_some(())
        })
        .await;
        shutdown
    }

    pub(crate) async fn stop_dispatcher(&mut self) {
        self.shutdown.cancel();
        let running = self.dispatcher.take().unwrap();
        tokio::time::timeout(LONG, running)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    pub(crate) fn kill_nats(&mut self) {
        self.nats = None;
    }

    pub(crate) fn stop_redis(&mut self) {
        self.redis = None;
    }

    pub(crate) fn start_redis(&mut self) {
        self.redis = Some(redis_server(self.dir.path()));
    }

    pub(crate) async fn flush_redis(&self) {
        let url = format!("unix://{}", self.dir.path().join("redis.sock").display());
        let client = redis::Client::open(url).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let _: String = redis::cmd("FLUSHALL")
            .query_async(&mut connection)
            .await
            .unwrap();
    }

    pub(crate) async fn publish(
        &self,
        subject: &str,
        id: Option<String>,
        format: Format,
        payload: Vec<u8>,
    ) {
        let outgoing = Outgoing {
            subject: subject.to_owned(),
            message_id: id,
            format,
            payload: payload.into(),
            ..Outgoing::default()
        };
        self.broker.publish(outgoing, LONG).await.unwrap();
    }

    pub(crate) async fn submit(&self, task: &TaskRequest) {
        let subject = self.broker.subjects().request(&task.tenant, &task.pool);
        let payload = codec::encode(task, Format::MessagePack).unwrap();
        self.publish(
            &subject,
            Some(task.message_id()),
            Format::MessagePack,
            payload,
        )
        .await;
    }

    pub(crate) async fn terminal(&self, run: &str, task: TaskId) -> Terminal {
        let (tenant, run) = ("acme".parse().unwrap(), run.parse().unwrap());
        until("a terminal", async || {
            self.broker.terminal_of(&tenant, &run, task).await.unwrap()
        })
        .await
    }

    /// How many messages are stored under `filter`.
    pub(crate) async fn stored(&self, stream: &str, filter: &str) -> usize {
        let counts = self.broker.subject_counts(stream, filter).await.unwrap();
        counts.values().sum()
    }

    pub(crate) async fn requests_settled(&self) {
        let subjects = self.broker.subjects();
        until("requests are settled", async || {
            let stream = &self.broker.streams().requests;
            let left = self.stored(stream, &subjects.requests()).await;
            (left == 0).then_some(())
        })
        .await;
    }
}

/// A worker as the dispatcher sees one.
pub(crate) struct FakeWorker {
    pub(crate) id: WorkerId,
    pub(crate) incarnation: u32,
    puller: Puller,
}

impl FakeWorker {
    pub(crate) async fn join(fleet: &Fleet, name: &str) -> Self {
        let id: WorkerId = name.parse().unwrap();
        let incarnation = until("an incarnation", async || {
            fleet.lease.incarnation().await.unwrap()
        })
        .await;
        let reply = fleet
            .lease
            .register(&record(&id, incarnation))
            .await
            .unwrap();
        assert_eq!(reply.incarnation, Some(incarnation));
        let def = worker_consumer(fleet.broker.subjects(), &id, 4);
        let puller = fleet.broker.puller(&def).await.unwrap();
        Self {
            id,
            incarnation,
            puller,
        }
    }

    pub(crate) async fn beat(&self, fleet: &Fleet) {
        let record = record(&self.id, self.incarnation);
        fleet.lease.heartbeat(&record).await.unwrap();
    }

    pub(crate) async fn offer(&self, fleet: &Fleet, count: u32) -> Vec<SandboxId> {
        let ids: Vec<SandboxId> = (0..count).map(|_| SandboxId::new()).collect();
        let pool = "py".parse().unwrap();
        self.beat(fleet).await;
        let offered = fleet
            .lease
            .offer(&self.id, self.incarnation, &pool, &ids)
            .await;
        assert_eq!(offered.unwrap(), Offered::Taken { fresh: count });
        let hint = codec::encode(&OfferHint { pool }, Format::MessagePack).unwrap();
        let subject = fleet.broker.subjects().offer_hint();
        fleet
            .broker
            .nats()
            .publish(subject, hint.into())
            .await
            .unwrap();
        ids
    }

    /// What comes within a moment.
    pub(crate) async fn asks_for_more(&mut self) -> Option<Delivery> {
        self.puller.want(1);
        let moment = Duration::from_millis(50);
        let came = tokio::time::timeout(moment, self.puller.next()).await;
        came.ok().map(Result::unwrap)
    }

    pub(crate) async fn placement(&mut self, fleet: &Fleet) -> (Placement, Delivery) {
        self.puller.want(1);
        let deadline = tokio::time::Instant::now() + LONG;
        loop {
            tokio::select! {
                delivery = self.puller.next() => {
                    let delivery = delivery.unwrap();
                    let format = delivery.format().unwrap();
                    return (codec::decode(&delivery.payload, format).unwrap(), delivery);
                }
                () = tokio::time::sleep(Duration::from_millis(300)) => {
                    let record = record(&self.id, self.incarnation);
                    let _ = fleet.lease.heartbeat(&record).await;
                }
                () = tokio::time::sleep_until(deadline) => panic!("no placement came"),
            }
        }
    }
}

fn record(worker: &WorkerId, incarnation: u32) -> WorkerRecord {
    WorkerRecord {
        worker: worker.clone(),
        incarnation,
        schema: 1,
        backends: vec![BackendKind::Fake],
        slots: 4,
        pools: std::collections::BTreeMap::default(),
        host: "test".into(),
        pid: 1,
        started_at: Timestamp::now(),
    }
}

pub(crate) fn task() -> TaskRequest {
    TaskRequest::new(
        "acme".parse().unwrap(),
        "r1".parse().unwrap(),
        "py".parse().unwrap(),
        vec![Step::command(["true"])],
    )
}

/// Asks again until there is an answer; fails after a while.
pub(crate) async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < LONG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn redis_server(dir: &Path) -> Server {
    let child = Command::new("redis-server")
        .args([
            "--port",
            "0",
            "--save",
            "",
            "--appendonly",
            "yes",
            "--unixsocket",
        ])
        .arg(dir.join("redis.sock"))
        .arg("--dir")
        .arg(dir)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed");
    Server(child)
}

fn config(dir: &Path) -> PathBuf {
    let path = dir.join("nats.conf");
    let max = broker_schema::stream::MAX_PAYLOAD_BYTES;
    std::fs::write(
        &path,
        format!("max_payload: {max}\njetstream {{ max_file_store: 40G, max_memory_store: 64M }}\n"),
    )
    .unwrap();
    path
}

/// Where `nats-server` says where it listens, once it does.
fn ports(dir: &Path) -> Option<String> {
    let file = std::fs::read_dir(dir)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "ports"))?;
    let text = std::fs::read_to_string(file).ok()?;
    let ports: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(ports["nats"][0].as_str()?.to_owned())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test finds its tools by the environment"
)]
fn nats_server() -> PathBuf {
    let name = "nats-server";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.remuda/tools/bin");
    let path = std::env::var("PATH").unwrap_or_default();
    std::env::var("REMUDA_TOOLS")
        .ok()
        .map(PathBuf::from)
        .into_iter()
        .flat_map(|dir| [dir.join("bin"), dir])
        .chain(std::env::split_paths(&path))
        .chain([root])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .expect(
            "nats-server is in REMUDA_TOOLS, PATH or .remuda/tools/bin: run `cargo xtask setup`",
        )
}
