//! Where things are: the workspace, its target directory, the private tools.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// The folders that tasks work in.
#[derive(Debug)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> anyhow::Result<Self> {
        let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest_dir
            .parent()
            .context("the xtask package has no parent folder")?
            .to_path_buf();
        ensure!(
            root.join("Cargo.lock").is_file(),
            "{} is not the workspace (no Cargo.lock): was it moved? run `cargo build -p xtask` in the new place",
            root.display()
        );
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// What setup installs, and nothing else, lives here. Not committed.
    pub(crate) fn private(&self) -> PathBuf {
        self.root.join(".remuda")
    }

    pub(crate) fn tools_bin(&self) -> PathBuf {
        self.private().join("tools/bin")
    }

    /// An older nats-server than the one that is used.
    pub(crate) fn old_nats(&self, version: &str) -> PathBuf {
        let folder = format!("tools/nats-server-{version}");
        self.private().join(folder).join("nats-server")
    }

    pub(crate) fn venv(&self) -> PathBuf {
        self.private().join("venv")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.private().join("data")
    }

    /// `PATH` with the private tools in front.
    pub(crate) fn path_variable(&self) -> anyhow::Result<OsString> {
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.tools_bin()).chain(std::env::split_paths(&inherited));
        std::env::join_paths(folders).context("a folder of PATH, or the workspace's, contains ':'")
    }
}
