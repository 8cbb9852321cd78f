//! A worker on the fake backend between real servers, and what a dispatcher and a client do
//! around it.

#![allow(dead_code, reason = "every test file uses another part")]
#![expect(
    clippy::unwrap_used,
    reason = "what tests share, where clippy's own exception does not reach"
)]

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::pool::{BackendKind, PoolSpec};
use broker_schema::stream::Sizes;
use broker_schema::{
    ControlMessage, Frame, Placement, SandboxRef, SessionOptions, Step, TaskRequest, Terminal,
    Timestamp, WorkerId,
};
use futures::StreamExt as _;
use remuda_client::broker::{Broker, BrokerOptions, Outgoing};
use remuda_lease::{Claim, ClaimNonce, ClaimRequest, LeaseOptions, LeaseStore};
use remuda_telemetry::{Readiness, TaskGroup};
use remuda_tests::servers::{Nats, NatsServer, RedisServer};
use remuda_tests::wait::eventually;
use remuda_worker::backend::Backends;
use remuda_worker::backend::fake::FakeBackend;
use remuda_worker::{NatsOptions, READINESS, Timings, Worker, WorkerOptions};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) struct Fleet {
    // Dropped in this order: the worker first.
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskGroup,
    pub(crate) broker: Broker,
    pub(crate) leases: LeaseStore,
    pub(crate) fake: FakeBackend,
    pub(crate) worker: WorkerId,
    pub(crate) redis: RedisServer,
    pub(crate) nats: NatsServer,
    _config: TempDir,
}

impl Fleet {
    /// A worker with `warm` idle sandboxes of the pool `p`, offered.
    pub(crate) async fn start(warm: u32) -> Self {
        Box::pin(Self::with(warm, |_| {})).await
    }

    pub(crate) async fn with(warm: u32, change: impl FnOnce(&mut WorkerOptions)) -> Self {
        let config = tempfile::tempdir().unwrap();
        let file = config.path().join("nats.conf");
        std::fs::write(&file, "max_payload: 8388608\n").unwrap();
        let args = vec!["--config".to_owned(), file.to_str().unwrap().to_owned()];
        let nats = NatsServer::start_with(Nats {
            args,
            ..Nats::default()
        })
        .await
        .unwrap();
        let redis = RedisServer::start().await.unwrap();
        let broker = Broker::connect(&BrokerOptions {
            url: nats.url(),
            ..BrokerOptions::default()
        })
        .await
        .unwrap();
        let sizes = Sizes {
            requests_bytes: 64 << 20,
            results_bytes: 128 << 20,
            terminals_bytes: 64 << 20,
            ..Sizes::default()
        };
        broker.ensure_streams(&sizes).await.unwrap();
        let redis_options = LeaseOptions {
            url: redis.url(),
            ..LeaseOptions::default()
        };
        let leases = LeaseStore::connect(&redis_options).await.unwrap();
        let mut options = WorkerOptions {
            nats: NatsOptions {
                url: nats.url(),
                ..NatsOptions::default()
            },
            redis: redis_options,
            backends: vec![BackendKind::Fake],
            timings: Timings {
                renew: Duration::from_millis(200),
                heartbeat: Duration::from_millis(200),
                ..Timings::default()
            },
            ..WorkerOptions::default()
        };
        change(&mut options);
        let fake = FakeBackend::default();
        let backends = Backends {
            local: None,
            fake: Some(fake.clone()),
        };
        let worker = Worker::build_with(options, backends).await.unwrap();
        let id = worker.id().clone();
        let shutdown = CancellationToken::new();
        let tasks = TaskGroup::new();
        tasks.spawn(
            "worker",
            worker.run(Readiness::new(&READINESS), shutdown.clone()),
        );
        let pool = PoolSpec {
            backend: BackendKind::Fake,
            ..PoolSpec::named("p".parse().unwrap())
        };
        leases.set_pools(std::slice::from_ref(&pool)).await.unwrap();
        let targets = [(pool.name, warm, 32)];
        assert!(leases.set_targets(&id, &targets).await.unwrap());
        let fleet = Self {
            shutdown,
            tasks,
            broker,
            leases,
            fake,
            worker: id,
            redis,
            nats,
            _config: config,
        };
        fleet.hint(&ControlMessage::Pools).await;
        fleet.warm(u64::from(warm)).await;
        fleet
    }

    pub(crate) async fn hint(&self, message: &ControlMessage) {
        let payload = codec::encode(message, Format::MessagePack).unwrap();
        let subject = self.broker.subjects().control(&self.worker);
        self.broker
            .nats()
            .publish(subject, payload.into())
            .await
            .unwrap();
        self.broker.nats().flush().await.unwrap();
    }

    /// Waits until so many idle sandboxes are offered.
    pub(crate) async fn warm(&self, wanted: u64) {
        eventually("warm sandboxes", LONG, async || {
            let counts = self.leases.warm_counts().await;
            let counts = counts.map_err(|error| error.to_string())?;
            let found = counts.values().sum::<u64>();
            if found == wanted {
                Ok(())
            } else {
                Err(format!("{found} instead of {wanted}"))
            }
        })
        .await
        .unwrap();
    }

    /// What a dispatcher does: a claim, then the placement.
    pub(crate) async fn submit(&self, task: &TaskRequest) -> Placement {
        let placement = self.claim(task).await;
        self.publish(&placement, &placement.message_id()).await;
        placement
    }

    pub(crate) async fn claim(&self, task: &TaskRequest) -> Placement {
        let digest = sha256_hex(&codec::encode(task, Format::MessagePack).unwrap());
        let request = ClaimRequest {
            tenant: task.tenant.clone(),
            run: task.run.clone(),
            task: task.id,
            pool: task.pool.clone(),
            request_digest: digest.clone(),
            max_attempts: 4,
            nonce: ClaimNonce::new(),
            again: false,
            group: task.group.clone(),
            session: task.keep_alive.is_some(),
            quota: remuda_lease::Quota::default(),
        };
        let claim = self.leases.claim(&request).await.unwrap();
        let Claim::Granted { sandbox, attempt } = claim else {
            panic!("{claim:?}");
        };
        Placement {
            task: task.clone(),
            request_digest: digest,
            attempt,
            sandbox,
            dispatched_at: Timestamp::now(),
        }
    }

    pub(crate) async fn publish(&self, placement: &Placement, message_id: &str) {
        let subject = self.broker.subjects().placement(
            &placement.sandbox.worker,
            &placement.task.tenant,
            placement.sandbox.sandbox,
        );
        let payload = codec::encode(placement, Format::MessagePack).unwrap();
        self.publish_raw(subject, payload, message_id).await;
    }

    /// As a client that gives its messages no ids.
    pub(crate) async fn publish_nameless(&self, placement: &Placement) {
        let sandbox = &placement.sandbox;
        let tenant = &placement.task.tenant;
        let subjects = self.broker.subjects();
        let message = Outgoing {
            subject: subjects.placement(&sandbox.worker, tenant, sandbox.sandbox),
            payload: codec::encode(placement, Format::MessagePack)
                .unwrap()
                .into(),
            ..Outgoing::default()
        };
        self.broker.publish(message, LONG).await.unwrap();
    }

    pub(crate) async fn publish_raw(&self, subject: String, payload: Vec<u8>, message_id: &str) {
        let message = Outgoing {
            subject,
            message_id: Some(message_id.to_owned()),
            payload: payload.into(),
            ..Outgoing::default()
        };
        self.broker.publish(message, LONG).await.unwrap();
    }

    /// A session, opened.
    pub(crate) async fn open(&self, options: SessionOptions) -> SandboxRef {
        let mut open = task(&[]);
        open.keep_alive = Some(options);
        self.submit(&open).await;
        let opened = self.terminal(&open).await;
        assert!(opened.kept, "{}", opened.evidence);
        opened.sandbox.unwrap()
    }

    /// Waits until a task went back to the dispatcher, without a terminal.
    pub(crate) async fn returned(&self, task: &TaskRequest) {
        let stream = self.broker.streams().requests.clone();
        eventually("returned request", LONG, async || {
            match self.unsettled(&stream).await {
                1.. => Ok(()),
                found => Err(format!("{found} requests; {:?}", self.stored(task).await)),
            }
        })
        .await
        .unwrap();
        assert!(self.stored(task).await.is_none(), "there is no result");
    }

    /// What a client does: a task straight to its session.
    pub(crate) async fn in_session(
        &self,
        session: &SandboxRef,
        mut task: TaskRequest,
    ) -> TaskRequest {
        task.session = Some(session.clone());
        let placement = Placement {
            request_digest: String::new(),
            attempt: 1,
            sandbox: session.clone(),
            dispatched_at: Timestamp::now(),
            task: task.clone(),
        };
        self.publish(&placement, &placement.message_id()).await;
        task
    }

    pub(crate) async fn terminal(&self, task: &TaskRequest) -> Terminal {
        eventually("terminal", LONG, async || {
            let found = self.stored(task).await;
            found.ok_or("there is none yet")
        })
        .await
        .unwrap()
    }

    pub(crate) async fn stored(&self, task: &TaskRequest) -> Option<Terminal> {
        self.broker
            .terminal_of(&task.tenant, &task.run, task.id)
            .await
            .unwrap()
    }

    /// All frames of a task whose terminal is stored.
    pub(crate) async fn frames(&self, task: &TaskRequest, count: u64) -> Vec<Frame> {
        let stream = self
            .broker
            .jetstream()
            .get_stream(&self.broker.streams().results)
            .await
            .unwrap();
        let consumer = stream
            .create_consumer(async_nats::jetstream::consumer::pull::OrderedConfig {
                filter_subject: self
                    .broker
                    .subjects()
                    .result(&task.tenant, &task.run, task.id),
                ..Default::default()
            })
            .await
            .unwrap();
        let mut messages = consumer.messages().await.unwrap();
        let mut frames = Vec::new();
        while (frames.len() as u64) < count {
            let message = tokio::time::timeout(LONG, messages.next()).await;
            let message = message.unwrap().unwrap().unwrap();
            frames.push(codec::decode(&message.payload, Format::MessagePack).unwrap());
        }
        frames
    }

    /// Messages that nobody has settled on the subjects.
    pub(crate) async fn unsettled(&self, stream: &str) -> u64 {
        let mut stream = self.broker.jetstream().get_stream(stream).await.unwrap();
        stream.info().await.unwrap().state.messages
    }

    pub(crate) async fn settled(&self) {
        let stream = self.broker.streams().placements.clone();
        eventually("settled placements", LONG, async || {
            match self.unsettled(&stream).await {
                0 => Ok(()),
                left => Err(format!("{left} are left")),
            }
        })
        .await
        .unwrap();
    }

    pub(crate) async fn leased(&self, wanted: usize) {
        eventually("leases", LONG, async || {
            let leases = self.leases.leases().await;
            let leases = leases.map_err(|error| error.to_string())?;
            if leases.len() == wanted {
                Ok(())
            } else {
                Err(format!("{leases:?}"))
            }
        })
        .await
        .unwrap();
    }

    pub(crate) async fn alive(&self, wanted: u64) {
        eventually("sandboxes", LONG, async || match self.fake.alive() {
            found if found == wanted => Ok(()),
            found => Err(format!("{found} instead of {wanted}")),
        })
        .await
        .unwrap();
    }
}

pub(crate) fn task(steps: &[&[&str]]) -> TaskRequest {
    TaskRequest::new(
        "t".parse().unwrap(),
        "r".parse().unwrap(),
        "p".parse().unwrap(),
        steps
            .iter()
            .map(|argv| Step::command(argv.iter()))
            .collect(),
    )
}
