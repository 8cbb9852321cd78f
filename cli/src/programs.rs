//! The server programs that `remuda up` starts: where they are, which version.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// `major.minor.patch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A server that the fleet needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Server {
    pub(crate) program: &'static str,
    /// Older ones break promises.
    pub(crate) floor: Version,
    pub(crate) mend: &'static str,
}

pub(crate) const NATS: Server = Server {
    program: "nats-server",
    floor: Version(2, 10, 27),
    mend: "put a newer nats-server into PATH (https://github.com/nats-io/nats-server/releases), \
           or give --nats URL",
};

pub(crate) const REDIS: Server = Server {
    program: "redis-server",
    floor: Version(7, 0, 0),
    mend: "install Redis 7 or newer (`apt-get install redis-server`), or give --redis URL",
};

/// A program that was found, and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
}

/// Why a server cannot be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("no {program} was found in {places}")]
    Missing {
        program: &'static str,
        places: String,
    },
    #[error("{} is version {}, at least {floor} is needed", found.path.display(), found.version)]
    TooOld { found: Found, floor: Version },
    #[error("{} does not tell its version: {answer:?}", path.display())]
    NoVersion { path: PathBuf, answer: String },
}

impl Server {
    /// The first that is new enough.
    pub(crate) fn find(&self) -> Result<Found, ProgramError> {
        let folders = folders();
        let mut first_problem = None;
        for folder in &folders {
            let path = folder.join(self.program);
            if !is_executable(&path) {
                continue;
            }
            let answer = version_answer(&path);
            let problem = match first_version(&answer) {
                Some(version) if version >= self.floor => return Ok(Found { path, version }),
                Some(version) => ProgramError::TooOld {
                    found: Found { path, version },
                    floor: self.floor,
                },
                None => ProgramError::NoVersion { path, answer },
            };
            first_problem.get_or_insert(problem);
        }
        Err(first_problem.unwrap_or_else(|| ProgramError::Missing {
            program: self.program,
            places: "PATH, beside this program or .remuda/tools/bin".to_owned(),
        }))
    }
}

/// `PATH`, beside this program, and where `cargo xtask setup` installs.
fn folders() -> Vec<PathBuf> {
    const INSTALLED: &str = ".remuda/tools/bin";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = std::env::current_exe().ok();
    let beside = beside.as_deref().and_then(Path::parent);
    // From `target/<profile>` to the workspace.
    let workspace = beside.and_then(Path::parent).and_then(Path::parent);
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .chain(beside.map(Path::to_path_buf))
        .chain(workspace.map(|folder| folder.join(INSTALLED)))
        .chain(std::env::current_dir().map(|folder| folder.join(INSTALLED)))
        .collect()
}

pub(crate) fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn version_answer(path: &Path) -> String {
    let output = Command::new(path)
        .arg(OsStr::new("--version"))
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Err(error) => error.to_string(),
    }
}

/// The first `N.N` or `N.N.N` in a text.
pub(crate) fn first_version(text: &str) -> Option<Version> {
    text.split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .find_map(|word| {
            let mut numbers = word.split('.').map(str::parse);
            let major = numbers.next()?.ok()?;
            let minor = numbers.next()?.ok()?;
            let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
            Some(Version(major, minor, patch))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_servers_say_them() {
        for (text, version) in [
            ("nats-server: v2.15.1", Some(Version(2, 15, 1))),
            (
                "Redis server v=7.0.15 sha=0000:0 malloc=jemalloc-5.3",
                Some(Version(7, 0, 15)),
            ),
            ("v8.2", Some(Version(8, 2, 0))),
            ("no idea", None),
        ] {
            assert_eq!(first_version(text), version, "{text}");
        }
    }

    #[test]
    fn a_missing_program_says_where_it_was_looked_for() {
        let server = Server {
            program: "no-such-server",
            ..REDIS
        };
        assert_eq!(
            server.find().unwrap_err().to_string(),
            "no no-such-server was found in PATH, beside this program or .remuda/tools/bin"
        );
    }
}
