//! A whole fleet as people start it: `remuda up` on a data folder of its own.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries;
use crate::process::Process;
use crate::wait::eventually;

/// A machine with two busy cores is slow to start things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running fleet. Dropping it kills everything that it started.
#[derive(Debug)]
pub struct Fleet {
    up: Process,
    data: TempDir,
    record: Value,
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
    /// A fleet with one pool `default` of four warm sandboxes.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(json!({
            "pools": [{"name": "default", "warm": 4, "max": 16, "limits": {
                "memory_bytes": 256 << 20, "pids": 64, "disk_bytes": 64 << 20, "inodes": 4096,
            }}],
        }))
        .await
    }

    /// A fleet from what `remuda up --config` takes.
    pub async fn start_with(mut config: Value) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new()
            .prefix("remuda-test-fleet-")
            .tempdir()
            .context("cannot make a data folder")?;
        // The one beside the programs may be a dynamic build of the tests'.
        config["worker"]["sidecar"] = json!(binaries::sidecar()?);
        let file = data.path().join("fleet.json");
        std::fs::write(&file, config.to_string()).context("cannot write the configuration")?;

        let mut command = remuda()?;
        command
            .arg("up")
            .arg("--data")
            .arg(data.path().join("data"))
            .arg("--config")
            .arg(&file)
            // Its pointer must not lead other commands of this user here.
            .env("XDG_RUNTIME_DIR", data.path());
        let up = Process::spawn(command)?;
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
        let record = std::fs::read(data.path().join("data/remuda.json"))
            .context("`remuda up` left no record")?;
        let record = serde_json::from_slice(&record).context("the record is no JSON")?;
        Ok(Self { up, data, record })
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

    pub fn data(&self) -> &Path {
        self.data.path()
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

fn remuda() -> anyhow::Result<Command> {
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
    Ok(command)
}
