//! A Redis of the test's own, on a socket in a folder of its own, and short names for ids.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![allow(dead_code, reason = "every test file uses another part")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use broker_schema::pool::{BackendKind, PoolSpec};
use broker_schema::{PoolId, SandboxId, SandboxRef, TaskId, TenantId, WorkerId};
use remuda_lease::{
    Claim, ClaimNonce, ClaimRequest, LeaseOptions, LeaseStore, Offered, WorkerRecord,
};

pub(crate) struct Redis {
    child: Child,
    dir: tempfile::TempDir,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = launch(dir.path(), "no");
        Self { child, dir }
    }

    /// One that finds its data again.
    pub(crate) fn start_kept() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = launch(dir.path(), "yes");
        Self { child, dir }
    }

    /// Ends it as a crash would, and starts it again with its data.
    pub(crate) fn restart_kept(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = launch(self.dir.path(), "yes");
    }

    pub(crate) fn options(&self) -> LeaseOptions {
        LeaseOptions {
            url: format!("unix://{}", self.dir.path().join("redis.sock").display()),
            timeout: Duration::from_secs(10),
            ttl: Duration::from_secs(600),
            ..LeaseOptions::default()
        }
    }

    pub(crate) async fn store(&self, options: &LeaseOptions) -> LeaseStore {
        until("redis answers", async || {
            let store = LeaseStore::connect(options).await.ok()?;
            // One that still reads its data answers too, and refuses.
            store.workers().await.ok()?;
            Some(store)
        })
        .await
    }

    /// Runs one command beside the store: what another program could do.
    pub(crate) async fn command(&self, args: &[&str]) -> redis::Value {
        let client = redis::Client::open(self.options().url).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(args[0]);
        command.arg(&args[1..]);
        command.query_async(&mut connection).await.unwrap()
    }
}

fn launch(dir: &Path, kept: &str) -> Child {
    Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", kept])
        .arg("--unixsocket")
        .arg(dir.join("redis.sock"))
        .arg("--dir")
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is installed")
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again until there is an answer; fails after a while.
pub(crate) async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn worker(name: &str) -> WorkerId {
    name.parse().unwrap()
}

pub(crate) fn pool() -> PoolId {
    "py".parse().unwrap()
}

pub(crate) fn tenant() -> TenantId {
    "acme".parse().unwrap()
}

pub(crate) fn record(name: &str, incarnation: u32) -> WorkerRecord {
    WorkerRecord {
        worker: worker(name),
        incarnation,
        schema: 1,
        backends: vec![BackendKind::Fake],
        slots: 8,
        pools: std::collections::BTreeMap::default(),
        host: "test".into(),
        pid: 1,
        started_at: broker_schema::Timestamp::now(),
    }
}

/// A store with incarnation 1, one pool, and one worker.
pub(crate) async fn fleet(redis: &Redis) -> LeaseStore {
    let store = redis.store(&redis.options()).await;
    assert_eq!(store.install_incarnation(1).await.unwrap(), 1);
    store.set_pools(&[PoolSpec::named(pool())]).await.unwrap();
    store.register(&record("w1", 1)).await.unwrap();
    store
}

pub(crate) async fn offer(store: &LeaseStore, name: &str, count: usize) -> Vec<SandboxId> {
    let ids: Vec<SandboxId> = (0..count).map(|_| SandboxId::new()).collect();
    let offered = store.offer(&worker(name), 1, &pool(), &ids).await.unwrap();
    assert_eq!(
        offered,
        Offered::Taken {
            fresh: count as u32
        }
    );
    ids
}

pub(crate) fn request(task: TaskId) -> ClaimRequest {
    ClaimRequest {
        tenant: tenant(),
        run: "run".parse().unwrap(),
        task,
        pool: pool(),
        request_digest: "d1".into(),
        max_attempts: 4,
        nonce: ClaimNonce::new(),
        again: false,
        group: None,
        session: false,
        quota: remuda_lease::Quota::default(),
    }
}

pub(crate) fn granted(claim: Claim) -> (SandboxRef, u32) {
    match claim {
        Claim::Granted { sandbox, attempt } => (sandbox, attempt),
        other => panic!("not granted: {other:?}"),
    }
}
