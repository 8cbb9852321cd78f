//! One of the fleet's daemons: started, hurt, started again.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::leftovers::{Seen, descendants};
use crate::process::Process;

/// How to start a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    /// `worker-0`.
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) config: PathBuf,
    /// Put before the program; must end by becoming it, so that the process
    /// stays the same.
    pub(crate) wrap: Vec<OsString>,
    pub(crate) envs: Vec<(String, String)>,
}

/// A daemon and every process that it has been.
#[derive(Debug)]
pub(crate) struct Daemon {
    recipe: Recipe,
    running: Option<Process>,
    /// Not reaped, so that their numbers stay theirs; their logs are here.
    past: Vec<Process>,
    /// What processes that were killed had started.
    orphans: Vec<Seen>,
}

impl Daemon {
    pub(crate) fn new(recipe: Recipe) -> Self {
        Self {
            recipe,
            running: None,
            past: Vec::new(),
            orphans: Vec::new(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.recipe.name
    }

    pub(crate) fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// For the next start.
    pub(crate) fn recipe_mut(&mut self) -> &mut Recipe {
        &mut self.recipe
    }

    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        if let Some(running) = self.running.take() {
            if running.try_exit()?.is_none() {
                self.running = Some(running);
                bail!("{} runs already", self.recipe.name);
            }
            self.past.push(running);
        }
        let mut words = self.recipe.wrap.iter().cloned();
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(&self.recipe.program);
                command
            }
            None => Command::new(&self.recipe.program),
        };
        command.env("RUST_BACKTRACE", "0");
        // What this user has set is not what is tested.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("REMUDA_") {
                command.env_remove(name);
            }
        }
        command
            .arg("--config")
            .arg(&self.recipe.config)
            .envs(self.recipe.envs.iter().map(|(name, value)| (name, value)));
        let process = Process::spawn(command)
            .with_context(|| format!("cannot start {}", self.recipe.name))?;
        self.running = Some(process);
        Ok(())
    }

    pub(crate) fn process(&self) -> anyhow::Result<&Process> {
        self.running
            .as_ref()
            .with_context(|| format!("{} does not run", self.recipe.name))
    }

    pub(crate) fn pid(&self) -> anyhow::Result<Pid> {
        Ok(self.process()?.pid())
    }

    /// Whether it runs now.
    pub(crate) fn runs(&self) -> bool {
        let exited = |process: &Process| process.try_exit().is_ok_and(|exit| exit.is_some());
        self.running
            .as_ref()
            .is_some_and(|process| !exited(process))
    }

    /// SIGKILL to the process alone, as the kernel does it; returns when it is
    /// dead.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        let Some(process) = self.running.take() else {
            return Ok(());
        };
        self.orphans.extend(descendants(process.pid())?);
        if process.try_exit()?.is_none() {
            process.signal(Signal::SIGKILL)?;
            process.wait_exit(Duration::from_secs(20)).await?;
        }
        self.past.push(process);
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process()?.signal(signal)
    }

    /// SIGTERM, and how it ended.
    pub(crate) async fn stop(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let Some(process) = self.running.take() else {
            bail!("{} does not run", self.recipe.name);
        };
        self.orphans.extend(descendants(process.pid())?);
        let ended = if let Some(status) = process.try_exit()? {
            Ok(status)
        } else {
            process.signal(Signal::SIGTERM)?;
            // One that was frozen hears it only then.
            process.signal(Signal::SIGCONT)?;
            process.wait_exit(patience).await
        };
        if ended.is_err() {
            process.signal(Signal::SIGKILL)?;
            process.wait_exit(Duration::from_secs(20)).await?;
        }
        self.past.push(process);
        ended
    }

    /// Everything that it has been, the last one included.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &Process> {
        self.past.iter().chain(&self.running)
    }

    /// What its processes left running.
    pub(crate) fn orphans(&self) -> Vec<i32> {
        let running = self.orphans.iter().filter(|seen| seen.runs());
        running.map(|seen| seen.pid).collect()
    }
}
