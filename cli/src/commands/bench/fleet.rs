//! A fleet of the benchmark's own: `remuda up` on a temporary data folder.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use broker_schema::{Step, TenantId, Terminal};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientOptions};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::fleet::{RECORD, Record};
use crate::globals::Globals;

const POOL: &str = "default";
/// Enough for 64 sessions and as many one-shot tasks at once.
const WARM: &str = "16";
const MAX: &str = "160";
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// How an operation finds the fleet: everything that a connection needs.
#[derive(Debug, Clone)]
pub(super) struct Address {
    nats: String,
    prefix: String,
    tenant: TenantId,
}

impl Address {
    /// A connection of its own.
    pub(super) async fn connect(&self) -> anyhow::Result<Client> {
        let broker = BrokerOptions {
            url: self.nats.clone(),
            prefix: self.prefix.clone(),
            name: "remuda bench".to_owned(),
            ..BrokerOptions::default()
        };
        let run = format!("bench-{}", broker_schema::TaskId::new()).parse()?;
        Ok(Client::connect(ClientOptions {
            broker,
            ..ClientOptions::new(self.tenant.clone(), run)
        })
        .await?)
    }
}

/// The pool that everything is measured with.
pub(super) fn pool() -> anyhow::Result<broker_schema::PoolId> {
    Ok(POOL.parse()?)
}

/// Fails unless the task succeeded.
pub(super) fn succeeded(terminal: &Terminal) -> anyhow::Result<()> {
    ensure!(
        terminal.outcome == broker_schema::Outcome::Succeeded,
        "{}: {}",
        terminal.outcome,
        terminal.evidence
    );
    Ok(())
}

#[derive(Debug)]
pub(super) struct BenchFleet {
    up: Child,
    /// Kept open, so that the fleet can go on printing.
    _output: BufReader<ChildStdout>,
    data: TempDir,
    record: Record,
    tenant: TenantId,
}

impl BenchFleet {
    pub(super) async fn start(globals: &Globals) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new()
            .prefix("remuda-bench-")
            .tempdir()
            .context("cannot make a data folder")?;
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let mut up = Command::new(program)
            .args(["up", "--pool", POOL, "--warm", WARM, "--max", MAX, "--data"])
            .arg(data.path())
            // The pointer for other commands must not lead to this fleet.
            .env("XDG_RUNTIME_DIR", data.path())
            .env_remove("REMUDA_NATS")
            .env_remove("REMUDA_REDIS")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start `remuda up`")?;
        let stdout = up.stdout.take().context("`remuda up` has no stdout")?;
        let mut output = BufReader::new(stdout);
        let mut line = String::new();
        while !line.starts_with("ready") {
            line.clear();
            if output.read_line(&mut line).await? == 0 {
                bail!(
                    "`remuda up` ended before it was ready: {}",
                    up.wait().await?
                );
            }
        }
        let record = tokio::fs::read(data.path().join(RECORD)).await?;
        Ok(Self {
            up,
            _output: output,
            record: serde_json::from_slice(&record).context("the fleet's record is no JSON")?,
            data,
            tenant: globals.tenant.clone(),
        })
    }

    pub(super) fn nats(&self) -> &str {
        &self.record.nats
    }

    pub(super) fn data(&self) -> &Path {
        self.data.path()
    }

    pub(super) fn worker_pid(&self) -> Option<i32> {
        self.record.pids.worker
    }

    pub(super) fn address(&self) -> Address {
        Address {
            nats: self.record.nats.clone(),
            prefix: self.record.prefix.clone(),
            tenant: self.tenant.clone(),
        }
    }

    /// What is measured must do what it says, or its speed says nothing: it
    /// runs, it reports a failure, and it is not in our namespaces.
    pub(super) async fn check(&self) -> anyhow::Result<()> {
        let client = self.address().connect().await?;
        let run = async |argv: &[&str]| -> anyhow::Result<Terminal> {
            Ok(client
                .run(client.task(&pool()?, vec![Step::command(argv)]))
                .await?)
        };
        let said = run(&["/bin/echo", "hello"]).await?;
        succeeded(&said)?;
        ensure!(
            said.steps
                .first()
                .is_some_and(|step| step.stdout.head.as_slice() == b"hello\n"),
            "echo did not echo"
        );
        let failed = run(&["/bin/false"]).await?;
        ensure!(
            failed.exit.is_some_and(|exit| exit.code == 1),
            "false did not fail"
        );
        for kind in ["pid", "mnt", "net", "user", "ipc", "uts"] {
            let path = format!("/proc/self/ns/{kind}");
            let ours = tokio::fs::read_link(&path).await?;
            let theirs = run(&["/usr/bin/readlink", &path]).await?;
            succeeded(&theirs)?;
            let theirs = theirs
                .steps
                .first()
                .map(|step| step.stdout.head.text().into_owned());
            ensure!(
                theirs.as_deref().map(str::trim) != Some(&*ours.to_string_lossy()),
                "the sandbox shares our {kind} namespace"
            );
        }
        Ok(())
    }

    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = self.up.id().context("`remuda up` has ended by itself")?;
        kill(Pid::from_raw(pid as i32), Signal::SIGINT)?;
        let status = tokio::time::timeout(STOP_WITHIN, self.up.wait())
            .await
            .context("`remuda up` did not end")??;
        ensure!(status.success(), "`remuda up` ended with {status}");
        Ok(())
    }
}
