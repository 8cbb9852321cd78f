//! A wall clock that can be set forward and back for one process: a library
//! that is loaded before the others, built from `clock.c` beside this.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::namespace::which;

const SOURCE: &str = include_str!("clock.c");

/// Why there can be none.
pub(crate) fn lacking() -> Option<String> {
    let compiler = which("cc").is_none();
    compiler.then(|| "no C compiler (cc) in PATH to build a clock with".to_owned())
}

/// How far one process's wall clock is ahead of the true time.
#[derive(Debug)]
pub(crate) struct Clock {
    library: PathBuf,
    offset: PathBuf,
}

impl Clock {
    /// Builds it in a folder.
    pub(crate) fn new(folder: &Path) -> anyhow::Result<Self> {
        let source = folder.join("clock.c");
        let library = folder.join("clock.so");
        std::fs::write(&source, SOURCE)
            .with_context(|| format!("cannot write {}", source.display()))?;
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .output()
            .context("cannot start cc")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cc cannot build a clock: {said}");
        let clock = Self {
            library,
            offset: folder.join("clock.offset"),
        };
        std::fs::write(&clock.offset, 0_i64.to_ne_bytes())
            .with_context(|| format!("cannot write {}", clock.offset.display()))?;
        Ok(clock)
    }

    /// What a process needs in its environment to go by this clock.
    pub(crate) fn envs(&self) -> Vec<(String, String)> {
        let set = |name: &str, path: &Path| (name.to_owned(), path.display().to_string());
        vec![
            set("LD_PRELOAD", &self.library),
            set("FAULTS_CLOCK", &self.offset),
        ]
    }

    /// Seconds that it is ahead; less than zero for behind.
    pub(crate) fn set(&self, seconds: i64) -> anyhow::Result<()> {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&self.offset)
            .with_context(|| format!("cannot open {}", self.offset.display()))?;
        // In place: processes have it mapped.
        file.write_all_at(&seconds.to_ne_bytes(), 0)
            .with_context(|| format!("cannot write {}", self.offset.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_goes_by_its_own_clock() {
        if let Some(why) = lacking() {
            panic!("{why}");
        }
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::new(folder.path()).unwrap();
        let now = |envs: Vec<(String, String)>| -> i64 {
            let mut command = Command::new("date");
            let output = command.arg("+%s").envs(envs).output().unwrap();
            String::from_utf8(output.stdout)
                .unwrap()
                .trim()
                .parse()
                .unwrap()
        };
        for offset in [3600, -3600, 0] {
            clock.set(offset).unwrap();
            let ahead = now(clock.envs()) - now(Vec::new());
            assert!((ahead - offset).abs() < 60, "{ahead} instead of {offset}");
        }
    }
}
