//! What is on this machine: looks, changes nothing.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{answer, is_executable, which};
use crate::workspace::Workspace;

/// `major.minor.patch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// The first `N.N` or `N.N.N` in a program's answer to `--version`.
    pub(crate) fn first_in(text: &str) -> Option<Self> {
        text.split(|c: char| !(c.is_ascii_digit() || c == '.'))
            .find_map(|word| {
                let mut numbers = word.split('.').map(str::parse::<u32>);
                let major = numbers.next()?.ok()?;
                let minor = numbers.next()?.ok()?;
                let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
                Some(Self(major, minor, patch))
            })
    }
}

/// A program that was found, and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
}

/// Older ones lose settings silently and hang on a full disk.
pub(crate) const NATS_FLOOR: Version = Version(2, 10, 27);
pub(crate) const REDIS_FLOOR: Version = Version(7, 0, 0);
pub(crate) const PYTHON_FLOOR: Version = Version(3, 9, 0);

/// The sandboxes see the host's `/usr`, so Python has to be there.
pub(crate) const SYSTEM_PYTHON: &str = "/usr/bin/python3";

/// What setup bases its plan on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) nats_server: Option<Found>,
    pub(crate) redis_server: Option<Found>,
    pub(crate) system_python: Option<Found>,
    /// A Python that can make a virtual environment with pip in it.
    pub(crate) venv_maker: Option<PathBuf>,
    pub(crate) venv_ready: bool,
    pub(crate) linker: Option<PathBuf>,
    pub(crate) static_libc: bool,
}

impl Facts {
    pub(crate) fn gather(workspace: &Workspace) -> Self {
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let path: Vec<PathBuf> = std::env::split_paths(&inherited).collect();
        let mut with_tools = vec![workspace.tools_bin()];
        with_tools.extend(path.iter().cloned());

        let system_python = probe(Path::new(SYSTEM_PYTHON));
        let venv_ready = crate::python::is_ready(workspace);
        Self {
            nats_server: find("nats-server", &with_tools),
            redis_server: find("redis-server", &with_tools),
            // Looking costs a Python start each; not needed once it is made.
            venv_maker: if venv_ready {
                None
            } else {
                venv_maker(system_python.as_ref(), &path)
            },
            system_python,
            venv_ready,
            static_libc: has_static_libc(),
            linker: which("cc", &path),
        }
    }
}

fn find(name: &str, folders: &[PathBuf]) -> Option<Found> {
    probe(&which(name, folders)?)
}

fn probe(program: &Path) -> Option<Found> {
    if !is_executable(program) {
        return None;
    }
    let text = answer(Command::new(program).arg("--version"))?;
    Some(Found {
        path: program.to_path_buf(),
        version: Version::first_in(&text)?,
    })
}

fn venv_maker(system: Option<&Found>, path: &[PathBuf]) -> Option<PathBuf> {
    let system = system.map(|found| found.path.clone());
    let candidates = system.into_iter().chain(which("python3", path));
    candidates.into_iter().find(|python| {
        probe(python).is_some_and(|found| found.version >= PYTHON_FLOOR)
            && answer(Command::new(python).args(["-c", "import venv, ensurepip"])).is_some()
    })
}

/// The sidecar is linked statically, so `libc.a` has to be there. A compiler
/// answers with the bare name when it has none.
fn has_static_libc() -> bool {
    answer(Command::new("cc").arg("-print-file-name=libc.a"))
        .is_some_and(|path| Path::new(path.trim()).is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_programs_answer() {
        let cases = [
            ("nats-server: v2.15.1\n", Some(Version(2, 15, 1))),
            (
                "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64",
                Some(Version(7, 0, 15)),
            ),
            ("Python 3.11.2", Some(Version(3, 11, 2))),
            ("v2.11.0-beta.1", Some(Version(2, 11, 0))),
            ("tool 3.1", Some(Version(3, 1, 0))),
            ("version unknown", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(Version::first_in(text), expected, "{text}");
        }
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(Version(2, 10, 27) > Version(2, 9, 99));
        assert!(Version(2, 10, 26) < NATS_FLOOR);
        assert!(Version(10, 0, 0) > REDIS_FLOOR);
    }
}
