//! Pools: templates for sandboxes, and how many stay warm.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::PoolId;

/// A template for sandboxes and how many of them stay warm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    pub name: PoolId,
    #[serde(default)]
    pub backend: BackendKind,
    #[serde(default)]
    pub image: ImageRef,
    /// Idle sandboxes that the whole fleet keeps ready.
    #[serde(default = "default_warm")]
    pub warm: u32,
    /// Sandboxes of this pool that may exist at once, idle and leased.
    #[serde(default = "default_max")]
    pub max: u32,
    #[serde(default)]
    pub limits: Limits,
    /// Environment of every command; a task's and a step's entries win.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

fn default_warm() -> u32 {
    4
}

fn default_max() -> u32 {
    64
}

impl PoolSpec {
    /// A pool with the default everything.
    pub fn named(name: PoolId) -> Self {
        Self {
            name,
            backend: BackendKind::default(),
            image: ImageRef::default(),
            warm: default_warm(),
            max: default_max(),
            limits: Limits::default(),
            env: BTreeMap::new(),
        }
    }
}

/// What makes the sandboxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// Our launcher: namespaces, overlayfs, cgroups, seccomp.
    #[default]
    Local,
    /// In memory and scripted, for tests. Runs nothing.
    Fake,
}

/// What a sandbox's root is made from: `host`, or `rootfs:/path/to/folder`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, JsonSchema)]
#[schemars(with = "String")]
pub enum ImageRef {
    /// The host's system folders, read-only, with a cleaned `/etc`.
    #[default]
    Host,
    /// An unpacked root file system.
    Rootfs(PathBuf),
}

impl Serialize for ImageRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Host => serializer.serialize_str("host"),
            Self::Rootfs(path) => {
                serializer.collect_str(&format_args!("rootfs:{}", path.display()))
            }
        }
    }
}

impl<'de> Deserialize<'de> for ImageRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.strip_prefix("rootfs:") {
            Some(path) if path.starts_with('/') => Ok(Self::Rootfs(path.into())),
            None if text == "host" => Ok(Self::Host),
            _ => Err(serde::de::Error::custom(format_args!(
                "image {text:?} is neither \"host\" nor \"rootfs:/absolute/folder\""
            ))),
        }
    }
}

/// What one sandbox may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory of everything that runs in the sandbox, its files in memory
    /// included, in bytes.
    pub memory_bytes: u64,
    /// Cores, e.g. 0.5; none for no quota.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: u32,
    /// Bytes that the sandbox may write to its file system.
    pub disk_bytes: u64,
    /// Files and folders that the sandbox may make.
    pub inodes: u64,
    /// Open files per process.
    pub open_files: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            cpus: None,
            pids: 256,
            disk_bytes: 512 << 20,
            inodes: 65_536,
            open_files: 1024,
        }
    }
}
