//! Where the fleet is: what `remuda up` writes down, and how other commands
//! find it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::signal::kill;
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::globals::Globals;

/// The file in the data folder, and the pointer's name.
pub(crate) const RECORD: &str = "remuda.json";
const POINTER: &str = "current.json";
/// Far more than a record has.
const MOST_BYTES: u64 = 64 * 1024;

/// What `remuda up` runs, as `remuda.json` holds it. Fields are only added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) nats: String,
    pub(crate) redis: String,
    pub(crate) prefix: String,
    pub(crate) data: PathBuf,
    pub(crate) metrics: Metrics,
    pub(crate) pids: Pids,
}

/// Where each daemon serves `/metrics`, `/healthz` and `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Metrics {
    pub(crate) dispatcher: String,
    pub(crate) worker: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pids {
    pub(crate) up: i32,
    #[serde(default)]
    pub(crate) nats: Option<i32>,
    #[serde(default)]
    pub(crate) redis: Option<i32>,
    #[serde(default)]
    pub(crate) dispatcher: Option<i32>,
    #[serde(default)]
    pub(crate) worker: Option<i32>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FleetError {
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} belongs to somebody else or is open to others: {why}")]
    Unsafe { path: PathBuf, why: String },
}

/// The addresses that a command works with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fleet {
    pub(crate) nats: String,
    pub(crate) redis: Option<String>,
    pub(crate) prefix: String,
    /// Whether `remuda up` runs it: a server that is gone comes back.
    pub(crate) supervised: bool,
}

impl Fleet {
    /// What the command line says, else what `remuda up` wrote down.
    pub(crate) fn locate(globals: &Globals) -> Result<Self, Failure> {
        let prefix = globals.prefix.clone();
        if let Some(nats) = &globals.nats {
            return Ok(Self {
                nats: nats.clone(),
                redis: globals.redis.clone(),
                prefix: prefix.unwrap_or_else(default_prefix),
                supervised: false,
            });
        }
        let record = record_files()
            .iter()
            .filter_map(|path| read_own(path).ok())
            .find(Record::is_running)
            .ok_or_else(none_running)?;
        Ok(Self {
            redis: globals.redis.clone().or(Some(record.redis)),
            nats: record.nats,
            prefix: prefix.unwrap_or(record.prefix),
            supervised: true,
        })
    }

    /// For commands that read the registry.
    pub(crate) fn redis(&self) -> Result<&str, Failure> {
        self.redis.as_deref().ok_or_else(|| {
            Failure::usage("this needs the fleet's Redis, and only --nats was given")
                .mend("give --redis URL or REMUDA_REDIS as well")
        })
    }
}

pub(crate) fn default_prefix() -> String {
    "remuda".to_owned()
}

fn none_running() -> Failure {
    Failure::new("no fleet is running here")
        .mend("start one with `remuda up`, or name one with --nats URL or REMUDA_NATS")
}

impl Record {
    fn is_running(&self) -> bool {
        self.pids.up > 0 && kill(Pid::from_raw(self.pids.up), None).is_ok()
    }

    /// Writes the record into the data folder and where other commands look.
    pub(crate) fn publish(&self) -> Result<(), FleetError> {
        write_whole(&self.data.join(RECORD), self)?;
        let folder = pointer_folder();
        own_folder(&folder)?;
        write_whole(&folder.join(POINTER), self)
    }

    /// Takes the record back, where it is still ours.
    pub(crate) fn withdraw(&self) {
        for path in [self.data.join(RECORD), pointer_folder().join(POINTER)] {
            if read_own(&path).is_ok_and(|there| there.pids.up == self.pids.up) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// `~/.local/state/remuda`, or where the desktop's rules put it.
pub(crate) fn default_data() -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".local/state")))
        .map(|folder| folder.join("remuda"))
}

/// One place for the writer and all readers: the login's runtime folder, or
/// where there is none, a folder of ours in `/tmp`.
fn pointer_folder() -> PathBuf {
    let uid = geteuid();
    let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let usual = || PathBuf::from(format!("/run/user/{uid}"));
    let runtime = given
        .filter(|path| path.is_absolute())
        .unwrap_or_else(usual);
    if runtime.is_dir() {
        runtime.join("remuda")
    } else {
        PathBuf::from(format!("/tmp/remuda-{uid}"))
    }
}

/// Where a record may be.
fn record_files() -> Vec<PathBuf> {
    let pointer = pointer_folder().join(POINTER);
    let data = default_data().map(|data| data.join(RECORD));
    [Some(pointer), data].into_iter().flatten().collect()
}

/// Makes a folder that nobody else can look into, or checks that it is one:
/// in `/tmp` somebody else may have made it first.
pub(crate) fn own_folder(path: &Path) -> Result<(), FleetError> {
    let write = |source| FleetError::Write {
        path: path.to_owned(),
        source,
    };
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(write(error)),
        _ => {}
    }
    let found = fs::symlink_metadata(path).map_err(write)?;
    let why = if !found.is_dir() {
        "it is no folder".to_owned()
    } else if found.uid() != geteuid().as_raw() {
        format!("its owner is user {}", found.uid())
    } else if found.mode() & 0o077 != 0 {
        format!("its mode is {:o}, expected 700", found.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(FleetError::Unsafe {
        path: path.to_owned(),
        why,
    })
}

/// Replaces a file at once, readable by us alone.
fn write_whole(path: &Path, record: &Record) -> Result<(), FleetError> {
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let write = || -> io::Result<()> {
        let text = serde_json::to_vec_pretty(record)?;
        private_file(&fresh)?.write_all(&text)?;
        fs::rename(&fresh, path)
    };
    write().map_err(|source| FleetError::Write {
        path: path.to_owned(),
        source,
    })
}

/// A new or emptied file that we alone can read, and no link to another.
pub(crate) fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path)
}

/// Reads a record that nobody else can have written.
fn read_own(path: &Path) -> io::Result<Record> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("not ours"));
    }
    let mut text = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn record(data: &Path, up: i32) -> Record {
        Record {
            nats: "nats://127.0.0.1:1".into(),
            redis: "redis://127.0.0.1:2".into(),
            prefix: default_prefix(),
            data: data.to_owned(),
            metrics: Metrics {
                dispatcher: "http://127.0.0.1:3/metrics".into(),
                worker: "http://127.0.0.1:4/metrics".into(),
            },
            pids: Pids {
                up,
                ..Pids::default()
            },
        }
    }

    #[test]
    fn a_record_survives_the_file_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECORD);
        let written = record(folder.path(), std::process::id() as i32);
        write_whole(&path, &written).unwrap();
        assert_eq!(read_own(&path).unwrap(), written);
        assert!(written.is_running());
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_record_of_a_dead_fleet_is_none() {
        assert!(!record(Path::new("/"), 0).is_running());
        assert!(!record(Path::new("/"), i32::MAX).is_running());
    }

    #[test]
    fn what_others_can_write_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECORD);
        write_whole(&path, &record(folder.path(), 1)).unwrap();
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(read_own(&link).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read_own(&path).is_err());
    }

    #[test]
    fn a_folder_that_is_open_or_a_link_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        own_folder(&own).unwrap();
        own_folder(&own).unwrap();
        let link = folder.path().join("link");
        symlink(&own, &link).unwrap();
        assert!(matches!(own_folder(&link), Err(FleetError::Unsafe { .. })));
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        let error = own_folder(&own).unwrap_err().to_string();
        assert!(error.contains("mode is 755"), "{error}");
    }
}
