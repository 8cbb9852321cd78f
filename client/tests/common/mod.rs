//! A nats-server of one's own, and what tests send through it.
#![allow(dead_code, reason = "each test binary uses its part of this")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use broker_schema::stream::Sizes;
use broker_schema::{
    Attribution, ExitStatus, Outcome, Output, Placement, StepResult, TaskId, Terminal, Times,
    Timestamp, Usage,
};
use remuda_client::broker::{Broker, BrokerOptions};
use remuda_client::{Client, ClientOptions};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// Long enough for a loaded machine; nothing waits for it when all is well.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Nats {
    child: Child,
    port: u16,
    store: TempDir,
    args: Vec<String>,
}

impl Nats {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    pub(crate) async fn with(args: &[&str]) -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let store = TempDir::new().unwrap();
        let config = store.path().join("nats.conf");
        std::fs::write(&config, "max_payload: 8388608\n").unwrap();
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let child = launch(port, &store, &args);
        let mut server = Self {
            child,
            port,
            store,
            args,
        };
        server.ready().await;
        server
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// On the same port and store.
    pub(crate) async fn restart(&mut self) {
        self.child = launch(self.port, &self.store, &self.args);
        self.ready().await;
    }

    /// What is left of a server whose disk was lost. Only after it was killed.
    pub(crate) fn wipe(&self) {
        std::fs::remove_dir_all(self.store.path().join("jetstream")).unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn options(&self) -> BrokerOptions {
        BrokerOptions {
            url: self.url(),
            ..BrokerOptions::default()
        }
    }

    pub(crate) async fn broker(&self) -> Broker {
        let broker = Broker::connect(&self.options()).await.unwrap();
        broker.ensure_streams(&sizes()).await.unwrap();
        broker
    }

    pub(crate) async fn client(&self) -> Client {
        let options = ClientOptions {
            broker: self.options(),
            ..ClientOptions::new("acme".parse().unwrap(), "run-1".parse().unwrap())
        };
        let client = Client::connect(options).await.unwrap();
        client.broker().ensure_streams(&sizes()).await.unwrap();
        client
    }

    async fn ready(&mut self) {
        let greeted = async {
            loop {
                if let Ok(stream) =
                    tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await
                {
                    let mut line = String::new();
                    if BufReader::new(stream).read_line(&mut line).await.is_ok()
                        && line.contains("\"jetstream\":true")
                    {
                        return;
                    }
                }
                if let Some(status) = self.child.try_wait().unwrap() {
                    panic!("nats-server ended: {status}");
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, greeted).await.unwrap();
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(port: u16, store: &TempDir, args: &[String]) -> Child {
    Command::new(find("nats-server"))
        .args([
            "--addr",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--jetstream",
        ])
        .arg("--store_dir")
        .arg(store.path())
        .arg("--config")
        .arg(store.path().join("nats.conf"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[expect(
    clippy::disallowed_methods,
    reason = "where the tools are is the environment's to say"
)]
fn find(tool: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.remuda/tools/bin");
    std::env::var("REMUDA_TOOLS")
        .into_iter()
        .map(PathBuf::from)
        .chain(std::env::split_paths(&path))
        .chain([workspace])
        .map(|folder| folder.join(tool))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{tool} is not in REMUDA_TOOLS, PATH or .remuda/tools/bin"))
}

pub(crate) fn sizes() -> Sizes {
    Sizes {
        requests_bytes: 64 << 20,
        results_bytes: 64 << 20,
        terminals_bytes: 64 << 20,
        ..Sizes::default()
    }
}

/// A terminal that says `text` on stdout, all of it in its head.
pub(crate) fn terminal(task: TaskId, text: &str) -> Terminal {
    Terminal {
        task,
        tenant: "acme".parse().unwrap(),
        run: "run-1".parse().unwrap(),
        pool: "py".parse().unwrap(),
        group: None,
        request_digest: String::new(),
        attempt: 1,
        outcome: Outcome::Succeeded,
        attribution: Attribution::Policy,
        evidence: String::new(),
        exit: Some(ExitStatus::code(0)),
        error: None,
        steps: vec![StepResult {
            stdout: output(text.as_bytes()),
            ..StepResult::default()
        }],
        frames: 0,
        usage: Usage::default(),
        times: Times {
            finished: Timestamp::now(),
            ..Times::default()
        },
        sandbox: None,
        kept: false,
    }
}

pub(crate) fn output(bytes: &[u8]) -> Output {
    let mut sum = broker_schema::digest::Running::default();
    sum.update(bytes);
    Output {
        bytes: bytes.len() as u64,
        sha256: sum.finish(),
        head: bytes.into(),
        ..Output::default()
    }
}

/// What a worker would answer to a placement.
pub(crate) fn answer(placement: &Placement, text: &str) -> Terminal {
    Terminal {
        run: placement.task.run.clone(),
        pool: placement.task.pool.clone(),
        request_digest: placement.request_digest.clone(),
        sandbox: Some(placement.sandbox.clone()),
        ..terminal(placement.task.id, text)
    }
}
