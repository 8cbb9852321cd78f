//! A whole fleet as people start it: `remuda up` on a data folder of its own.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries;
use crate::history::Log;
use crate::process::Process;
use crate::wait::eventually;

/// A machine with two busy cores is slow to start things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running fleet. Dropping it stops everything that it started.
#[derive(Debug)]
pub struct Fleet {
    up: Process,
    home: Arc<TempDir>,
    record: Value,
}

/// What is nowhere to be found once a fleet has ended as it should.
const PARTS: [&str; 4] = ["nats", "redis", "dispatcher", "worker"];

/// One fleet for those tests of a program that run at the same time. The last
/// of them stops it.
#[derive(Debug)]
pub struct SharedFleet(tokio::sync::Mutex<Weak<Fleet>>);

impl SharedFleet {
    #[expect(clippy::new_without_default, reason = "for statics")]
    pub const fn new() -> Self {
        Self(tokio::sync::Mutex::const_new(Weak::new()))
    }

    pub async fn get(&self, config: impl FnOnce() -> Value) -> anyhow::Result<Arc<Fleet>> {
        let mut fleet = self.0.lock().await;
        if let Some(running) = fleet.upgrade() {
            return Ok(running);
        }
        let started = Arc::new(Fleet::start_with(config()).await?);
        *fleet = Arc::downgrade(&started);
        Ok(started)
    }
}

/// One pool `default` of four warm sandboxes, with limits that tests can reach.
pub fn default_config() -> Value {
    json!({
        "pools": [{"name": "default", "warm": 4, "max": 16, "limits": {
            "memory_bytes": 256 << 20, "pids": 64, "disk_bytes": 64 << 20, "inodes": 4096,
        }}],
    })
}

/// What a command came to.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Finished {
    /// The exit code, 128 + n where signal n ended it.
    pub fn code(&self) -> i32 {
        let signal = || 128 + self.status.signal().unwrap_or_default();
        self.status.code().unwrap_or_else(signal)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Fleet {
    /// A fleet from [`default_config`].
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(default_config()).await
    }

    /// A fleet from what `remuda up --config` takes.
    pub async fn start_with(config: Value) -> anyhow::Result<Self> {
        Self::start_in(home()?, config).await
    }

    /// A fleet on what an earlier one left in its home.
    pub async fn start_in(home: Arc<TempDir>, mut config: Value) -> anyhow::Result<Self> {
        if config["worker"]["sidecar"].is_null() {
            // The one beside the programs may be a dynamic build of the tests'.
            config["worker"]["sidecar"] = json!(binaries::sidecar()?);
        }
        let file = home.path().join("fleet.json");
        std::fs::write(&file, config.to_string()).context("cannot write the configuration")?;
        let up = Process::spawn(up_command(home.path())?)?;
        let ready = eventually("ready fleet", PATIENCE, async || {
            let printed = up.stdout().map_err(|error| format!("{error:#}"))?;
            let printed = String::from_utf8_lossy(&printed).into_owned();
            match up.try_exit() {
                _ if printed.lines().any(|line| line.starts_with("ready")) => Ok(Ok(())),
                Ok(Some(status)) => Ok(Err(status)),
                _ => Err(format!("{printed} {}", up.stderr_tail())),
            }
        });
        if let Err(status) = ready.await? {
            bail!("`remuda up` ended with {status}; {}", up.stderr_tail());
        }
        let record = read_record(home.path())?;
        Ok(Self { up, home, record })
    }

    pub fn nats(&self) -> &str {
        self.record["nats"].as_str().unwrap_or_default()
    }

    pub fn redis(&self) -> &str {
        self.record["redis"].as_str().unwrap_or_default()
    }

    /// What the fleet wrote down about itself.
    pub fn record(&self) -> &Value {
        &self.record
    }

    /// The same as it is now: ports change when a part is started again.
    pub fn record_now(&self) -> anyhow::Result<Value> {
        read_record(self.home.path())
    }

    /// The folder that holds the fleet's data folder, and is the test's.
    pub fn data(&self) -> &Path {
        self.home.path()
    }

    /// Keeps the folder beyond the fleet.
    pub fn home(&self) -> Arc<TempDir> {
        Arc::clone(&self.home)
    }

    /// The process of a part right now: `nats`, `redis`, `dispatcher`, `worker`.
    pub fn pid(&self, part: &str) -> anyhow::Result<Pid> {
        let record = read_record(self.home.path())?;
        let pid = record["pids"][part].as_i64();
        let pid = pid.with_context(|| format!("no {part} is running"))?;
        Ok(Pid::from_raw(i32::try_from(pid)?))
    }

    /// SIGKILLs a part.
    pub fn kill(&self, part: &str) -> anyhow::Result<Pid> {
        let pid = self.pid(part)?;
        kill(pid, Signal::SIGKILL).with_context(|| format!("cannot kill the {part}"))?;
        Ok(pid)
    }

    /// Waits until a part runs as another process than `before`.
    pub async fn started_again(&self, part: &str, before: Pid) -> anyhow::Result<Pid> {
        eventually("part that was started again", PATIENCE, async || {
            let pid = self.pid(part)?;
            ensure!(pid != before, "the {part} is still {pid}");
            Ok(pid)
        })
        .await
    }

    /// A client of this fleet for the tenant `default`.
    pub async fn client(&self, run: &str) -> anyhow::Result<Client> {
        let options = ClientOptions::new("default".parse()?, run.parse()?);
        let broker = BrokerOptions {
            url: self.nats().to_owned(),
            ..options.broker.clone()
        };
        Client::connect(ClientOptions { broker, ..options })
            .await
            .context("cannot connect a client")
    }

    /// The same, and what it does is recorded.
    pub async fn recorded_client(&self, run: &str, log: &Log) -> anyhow::Result<Client> {
        let client = self.client(run).await?;
        let options = ClientOptions {
            history: log.client(),
            ..ClientOptions::new(client.tenant().clone(), client.run_id().clone())
        };
        Ok(Client::over(client.broker().clone(), options))
    }

    /// The command that would start a second fleet on the same data.
    pub fn second(&self) -> anyhow::Result<Command> {
        up_command(self.home.path())
    }

    /// The processes that it is made of.
    pub fn parts(&self) -> anyhow::Result<Vec<Pid>> {
        PARTS.iter().map(|part| self.pid(part)).collect()
    }

    pub fn up(&self) -> &Process {
        &self.up
    }

    /// The `remuda` command, pointed at this fleet.
    pub fn command<A: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Command> {
        let mut command = remuda()?;
        command
            .env("REMUDA_NATS", self.nats())
            .env("REMUDA_REDIS", self.redis())
            .args(args);
        Ok(command)
    }

    /// Runs `remuda ARGS…` to its end.
    pub async fn remuda<A: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Finished> {
        finish(self.command(args)?).await
    }

    /// Runs `remuda run -- COMMAND…` to its end.
    pub async fn run<A: AsRef<str>>(
        &self,
        command: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Finished> {
        let words = command.into_iter().map(|word| word.as_ref().to_owned());
        self.remuda(["run", "--"].map(str::to_owned).into_iter().chain(words))
            .await
    }

    /// Runs a Python program in a sandbox.
    pub async fn python(&self, program: &str) -> anyhow::Result<Finished> {
        self.run(["python3", "-c", program]).await
    }

    /// Ends the fleet as Ctrl-C does; its exit status.
    pub async fn stop(self) -> anyhow::Result<ExitStatus> {
        self.up.signal(Signal::SIGINT)?;
        self.up.wait_exit(PATIENCE).await
    }

    /// Kills `remuda up` alone, as the kernel or a person may.
    pub async fn kill_up(&self) -> anyhow::Result<()> {
        self.up.signal(Signal::SIGKILL)?;
        self.up.wait_exit(PATIENCE).await.map(drop)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // What is killed leaves cgroups behind: it is asked first.
        if matches!(self.up.try_exit(), Ok(None)) && self.up.signal(Signal::SIGINT).is_ok() {
            self.up.block_until_exit(PATIENCE);
        }
    }
}

/// A folder for a fleet.
pub fn home() -> anyhow::Result<Arc<TempDir>> {
    tempfile::Builder::new()
        .prefix("remuda-test-fleet-")
        .tempdir()
        .map(Arc::new)
        .context("cannot make a folder for the fleet")
}

fn up_command(home: &Path) -> anyhow::Result<Command> {
    let mut command = remuda()?;
    command
        .arg("up")
        .arg("--data")
        .arg(data_of(home))
        .arg("--config")
        .arg(home.join("fleet.json"))
        // Its pointer must not lead other commands of this user here.
        .env("XDG_RUNTIME_DIR", home);
    Ok(command)
}

fn data_of(home: &Path) -> PathBuf {
    home.join("data")
}

fn read_record(home: &Path) -> anyhow::Result<Value> {
    let record =
        std::fs::read(data_of(home).join("remuda.json")).context("`remuda up` left no record")?;
    serde_json::from_slice(&record).context("the record is no JSON")
}

/// Runs a command to its end.
pub async fn finish(command: Command) -> anyhow::Result<Finished> {
    let process = Process::spawn(command)?;
    let status = process.wait_exit(PATIENCE).await?;
    Ok(Finished {
        status,
        stdout: process.stdout()?,
        stderr: process.stderr()?,
    })
}

/// The `remuda` command, pointed at no fleet.
pub fn remuda() -> anyhow::Result<Command> {
    let mut command = Command::new(binaries::program("remuda")?);
    let tools = binaries::tool("nats-server")?;
    let folder = tools.parent().context("nats-server is in no folder")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [folder.to_path_buf()]
        .into_iter()
        .chain(std::env::split_paths(&path));
    command.env(
        "PATH",
        std::env::join_paths(folders).context("PATH cannot be joined")?,
    );
    // What this user has set is not what is tested.
    for name in [
        "REMUDA_NATS",
        "REMUDA_REDIS",
        "REMUDA_PREFIX",
        "REMUDA_TENANT",
        "REMUDA_POOL",
    ] {
        command.env_remove(name);
    }
    Ok(command)
}
