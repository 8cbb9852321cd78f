//! Two dispatchers as processes of their own: killed, frozen and stopped under load. Every task
//! has one terminal, and somebody else takes over soon.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::pool::{BackendKind, PoolSpec};
use broker_schema::{DispatcherId, Outcome, PoolId, SessionOptions, Step, TaskId, Terminal};
use nix::sys::signal::Signal;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientOptions};
use remuda_lease::{Leader, LeaseOptions, LeaseStore};
use remuda_tests::binaries;
use remuda_tests::process::Process;
use remuda_tests::servers::{NatsServer, RedisServer};
use remuda_tests::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(60);
/// Generous: a machine with two busy cores. The promise is under 5 s.
const TAKEOVER: Duration = Duration::from_secs(10);
const POOL: &str = "py";

struct Scene {
    nats: NatsServer,
    redis: RedisServer,
    lease: LeaseStore,
    home: TempDir,
    worker: Option<Process>,
    dispatchers: Vec<Process>,
}

impl Scene {
    async fn start(dispatchers: usize) -> Self {
        let (nats, redis) = (
            NatsServer::start().await.unwrap(),
            RedisServer::start().await.unwrap(),
        );
        let options = LeaseOptions {
            url: redis.url(),
            ..LeaseOptions::default()
        };
        let mut scene = Self {
            lease: LeaseStore::connect(&options).await.unwrap(),
            nats,
            redis,
            home: tempfile::tempdir().unwrap(),
            worker: None,
            dispatchers: Vec::new(),
        };
        for _ in 0..dispatchers {
            scene.add_dispatcher();
        }
        let state = scene.home.path().join("worker");
        let worker = json!({
            "name": "w", "slots": 16, "backends": ["fake"], "state_dir": state,
        });
        scene.worker = Some(scene.daemon("remuda-worker", worker));
        for dispatcher in &scene.dispatchers {
            eventually("running dispatcher", PATIENCE, async || {
                let log = dispatcher.stderr().map_err(|error| error.to_string())?;
                let runs = log.contains("dispatcher runs");
                runs.then_some(()).ok_or_else(|| dispatcher.stderr_tail())
            })
            .await
            .unwrap();
        }
        scene.leader(POOL).await;
        scene.leader("_fleet").await;
        scene
    }

    fn logs(&self) -> String {
        let tails: Vec<_> = self.dispatchers.iter().map(Process::stderr_tail).collect();
        tails.join("\n")
    }

    fn add_dispatcher(&mut self) {
        let pool = PoolSpec {
            backend: BackendKind::Fake,
            warm: 8,
            max: 16,
            ..PoolSpec::named(POOL.parse().unwrap())
        };
        let dispatcher = self.daemon("remuda-dispatcher", json!({"pools": [pool]}));
        self.dispatchers.push(dispatcher);
    }

    fn daemon(&self, program: &str, mut config: Value) -> Process {
        config["nats"] = json!({"url": self.nats.url()});
        config["redis"] = json!({"url": self.redis.url()});
        let file = config_file(self.home.path(), program, &config);
        let mut command = Command::new(binaries::program(program).unwrap());
        command.arg("--config").arg(file);
        Process::spawn(command).unwrap()
    }

    /// Whoever leads a pool.
    async fn leader(&self, pool: &str) -> Leader {
        let pools: [PoolId; 1] = [pool.parse().unwrap()];
        eventually("leader", PATIENCE, async || {
            let leaders = self
                .lease
                .leaders(&pools)
                .await
                .map_err(|error| error.to_string())?;
            leaders.into_iter().next().ok_or_else(|| self.logs())
        })
        .await
        .unwrap()
    }

    async fn other_leader(&self, before: &Leader) -> Leader {
        let pools = std::slice::from_ref(&before.pool);
        eventually("other leader", TAKEOVER, async || {
            let leaders = self
                .lease
                .leaders(pools)
                .await
                .map_err(|error| error.to_string())?;
            let newer = leaders.iter().find(|leader| leader.term > before.term);
            newer
                .cloned()
                .ok_or_else(|| format!("{leaders:?}\n{}", self.logs()))
        })
        .await
        .unwrap()
    }

    /// The process that a leader is.
    fn process(&self, dispatcher: &DispatcherId) -> &Process {
        let is_it = |process: &&Process| {
            let pid = format!("-{}-", process.pid());
            dispatcher.as_str().contains(&pid)
        };
        self.dispatchers.iter().find(is_it).unwrap()
    }

    async fn client(&self, run: &str) -> Client {
        let options = ClientOptions::new("acme".parse().unwrap(), run.parse().unwrap());
        let broker = BrokerOptions {
            url: self.nats.url(),
            ..options.broker.clone()
        };
        Client::connect(ClientOptions { broker, ..options })
            .await
            .unwrap()
    }

    /// How long a task takes now that its pool has nobody, or somebody else.
    async fn probe(&self, run: &str, bound: Duration) -> Duration {
        let client = self.client(run).await;
        let began = Instant::now();
        let task = client.task(
            &POOL.parse().unwrap(),
            vec![Step::command(["fake:print", "x"])],
        );
        let terminal = tokio::time::timeout(bound, client.run(task))
            .await
            .unwrap_or_else(|_| panic!("no terminal of {run} in {bound:?}\n{}", self.logs()))
            .unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded);
        began.elapsed()
    }
}

fn config_file(home: &Path, program: &str, config: &Value) -> std::path::PathBuf {
    let file = home.join(format!("{program}-{}.yaml", TaskId::new()));
    std::fs::write(&file, config.to_string()).unwrap();
    file
}

/// Tasks that keep the fleet busy for a while, a few hundred of them.
struct Load {
    run: String,
    tasks: JoinSet<(TaskId, Terminal)>,
    count: usize,
}

impl Load {
    async fn start(scene: &Scene, run: &str, count: usize) -> Self {
        let client = Arc::new(scene.client(run).await);
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let client = client.clone();
            tasks.spawn(async move {
                let steps = vec![Step::command(["fake:sleep", "50"])];
                let task = client.task(&POOL.parse().unwrap(), steps);
                let id = task.id;
                (id, client.run(task).await.unwrap())
            });
        }
        Self {
            run: run.to_owned(),
            tasks,
            count,
        }
    }

    /// Some have ended, most have not.
    async fn under_way(&mut self) {
        for _ in 0..self.count / 10 {
            self.tasks.join_next().await.unwrap().unwrap();
        }
    }

    async fn ended(mut self, scene: &Scene) {
        let rest = async {
            while let Some(ended) = self.tasks.join_next().await {
                let (task, terminal) = ended.unwrap();
                assert_eq!(terminal.task, task);
                assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
            }
        };
        tokio::time::timeout(PATIENCE, rest).await.unwrap();
        let client = scene.client(&self.run).await;
        let subjects = client.broker().subjects();
        let run = self.run.parse().unwrap();
        let filter = subjects.terminals_of_run(client.tenant(), &run);
        let stream = &client.broker().streams().terminals;
        let counts = client
            .broker()
            .subject_counts(stream, &filter)
            .await
            .unwrap();
        assert_eq!(counts.len(), self.count, "one subject for each task");
        assert!(
            counts.values().all(|stored| *stored == 1),
            "and one terminal"
        );
        let streams = client.broker().streams();
        for (stream, filter) in [
            (&streams.requests, subjects.requests()),
            (&streams.placements, subjects.placements()),
        ] {
            eventually("empty work queue", PATIENCE, async || {
                let left = client.broker().subject_counts(stream, &filter).await;
                match left {
                    Ok(left) if left.is_empty() => Ok(()),
                    left => Err(format!("{left:?}")),
                }
            })
            .await
            .unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_replaced_and_nothing_is_lost() {
    let scene = Scene::start(2).await;
    scene.probe("warm-up", PATIENCE).await;
    let mut load = Load::start(&scene, "killed", 300).await;
    load.under_way().await;
    let before = scene.leader(POOL).await;
    scene
        .process(&before.dispatcher)
        .signal(Signal::SIGKILL)
        .unwrap();
    let killed = Instant::now();
    let elected = async {
        let after = scene.other_leader(&before).await;
        (after, killed.elapsed())
    };
    let (probe, (after, elected)) = tokio::join!(scene.probe("after-kill", TAKEOVER), elected);
    assert_ne!(after.dispatcher, before.dispatcher);
    println!(
        "takeover after SIGKILL under load: elected after {elected:?}, a new task done after {probe:?}"
    );
    assert!(elected < TAKEOVER && probe < TAKEOVER);
    load.ended(&scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over_at_once() {
    let scene = Scene::start(2).await;
    scene.probe("warm-up", PATIENCE).await;
    let mut load = Load::start(&scene, "stopped", 300).await;
    load.under_way().await;
    let before = scene.leader(POOL).await;
    let process = scene.process(&before.dispatcher);
    process.signal(Signal::SIGTERM).unwrap();
    let told = Instant::now();
    scene.other_leader(&before).await;
    println!(
        "takeover after SIGTERM under load: elected after {:?}",
        told.elapsed()
    );
    assert!(process.wait_exit(PATIENCE).await.unwrap().success());
    load.ended(&scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_frozen_past_its_term_does_no_harm() {
    let scene = Scene::start(2).await;
    scene.probe("warm-up", PATIENCE).await;
    let mut load = Load::start(&scene, "frozen", 300).await;
    load.under_way().await;
    let before = scene.leader(POOL).await;
    let process = scene.process(&before.dispatcher);
    process.signal(Signal::SIGSTOP).unwrap();
    let frozen = Instant::now();
    let after = scene.other_leader(&before).await;
    println!(
        "takeover after SIGSTOP under load: elected after {:?}",
        frozen.elapsed()
    );
    process.signal(Signal::SIGCONT).unwrap();
    load.ended(&scene).await;
    // It is a dispatcher like any other again, and the lane is still the newer one's.
    assert!(process.try_exit().unwrap().is_none());
    assert_eq!(scene.leader(POOL).await.term, after.term);
    assert_ne!(after.dispatcher, before.dispatcher);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dispatcher_that_joins_gets_its_share_and_a_flush_costs_nobody_a_task() {
    let mut scene = Scene::start(1).await;
    scene.probe("warm-up", PATIENCE).await;
    let alone = scene.leader("_fleet").await;
    scene.add_dispatcher();
    let shared = eventually("shared leadership", PATIENCE, async || {
        let (fleet, pool) = (scene.leader("_fleet").await, scene.leader(POOL).await);
        let apart = fleet.dispatcher != pool.dispatcher;
        apart.then_some((fleet, pool)).ok_or("one has both")
    })
    .await
    .unwrap();
    assert!(shared.0.term > alone.term);
    let load = Load::start(&scene, "flushed", 200).await;
    let flushed = Instant::now();
    scene.redis.command(&["FLUSHALL"]).await.unwrap();
    let after = scene.other_leader(&shared.1).await;
    println!("leader after FLUSHALL: after {:?}", flushed.elapsed());
    assert!(after.term > shared.1.term);
    load.ended(&scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_placed_and_sessions_go_on_while_there_is_no_dispatcher() {
    let scene = Scene::start(1).await;
    scene.probe("warm-up", PATIENCE).await;
    let client = scene.client("alone").await;
    let pool: PoolId = POOL.parse().unwrap();
    let session = client
        .open_session(&pool, SessionOptions::default())
        .await
        .unwrap();
    let task = client.task(&pool, vec![Step::command(["fake:sleep", "1500"])]);
    let mut placed = client.submit(task).await.unwrap();
    let lease = &scene.lease;
    eventually("placed task", PATIENCE, async || {
        let leases = lease.leases().await.map_err(|error| error.to_string())?;
        let mine = leases.iter().any(|lease| lease.task == Some(placed.task()));
        mine.then_some(()).ok_or_else(|| format!("{leases:?}"))
    })
    .await
    .unwrap();
    let before = scene.leader(POOL).await;
    let killed = scene.process(&before.dispatcher);
    killed.signal(Signal::SIGKILL).unwrap();
    killed.wait_exit(PATIENCE).await.unwrap();

    for _ in 0..20 {
        let step = vec![Step::command(["fake:print", "on"])];
        let terminal = session.run(step).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
    }
    let terminal = placed.terminal().await.unwrap();
    assert_eq!(
        (terminal.outcome, terminal.attempt),
        (Outcome::Succeeded, 1)
    );
    eventually("end of the term", PATIENCE, async || {
        let leaders = lease.leaders(std::slice::from_ref(&pool)).await;
        match leaders {
            Ok(leaders) if leaders.is_empty() => Ok(()),
            leaders => Err(format!("{leaders:?}")),
        }
    })
    .await
    .unwrap();
    session.close().await.unwrap();
}
