//! A `remuda up` of the demo's own.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::workspace::Workspace;

/// How long the fleet may take to end once it was asked to.
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// The fleet, and what it prints.
pub(crate) struct Fleet {
    child: Child,
    nats: String,
    /// Kept open, so that the fleet can go on printing.
    _output: BufReader<ChildStdout>,
}

impl Fleet {
    /// Starts the fleet and waits until it says that it is ready.
    pub(crate) fn start(workspace: &Workspace, folder: &Path) -> anyhow::Result<Self> {
        let mut child = super::remuda(workspace)?
            .args(["up", "--warm", "16", "--max", "32", "--data"])
            .arg(folder.join("fleet"))
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start `remuda up`")?;
        let stdout = child.stdout.take().context("`remuda up` has no stdout")?;
        let mut output = BufReader::new(stdout);
        let mut nats = None;
        loop {
            let mut line = String::new();
            if output
                .read_line(&mut line)
                .context("cannot read from `remuda up`")?
                == 0
            {
                let status = child.wait().context("cannot wait for `remuda up`")?;
                bail!("`remuda up` ended before it was ready: {status}");
            }
            print!("{line}");
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("nats"), Some(url)) => nats = Some(url.to_owned()),
                (Some("ready"), _) => break,
                _ => {}
            }
        }
        let nats = nats.context("`remuda up` did not say where NATS is")?;
        Ok(Self {
            child,
            nats,
            _output: output,
        })
    }

    pub(crate) fn nats(&self) -> &str {
        &self.nats
    }

    /// Asks the fleet to end, as Ctrl-C does, and waits for it.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        Command::new("kill")
            .args(["-INT", &self.child.id().to_string()])
            .status()
            .context("cannot signal `remuda up`")?;
        let asked = Instant::now();
        while asked.elapsed() < STOP_WITHIN {
            if let Some(status) = self
                .child
                .try_wait()
                .context("cannot wait for `remuda up`")?
            {
                if !status.success() {
                    bail!("`remuda up` ended with {status}");
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("`remuda up` did not end within {} s", STOP_WITHIN.as_secs())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Already ended, unless something above failed: then it ends cleanly
        // on the signal, and its own children with it.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = Command::new("kill")
                .args(["-TERM", &self.child.id().to_string()])
                .status();
            let _ = self.child.wait();
        }
    }
}
