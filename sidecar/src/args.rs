//! Command line: parsed by hand, because an argument parser would be a large
//! part of this binary.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// What the launcher asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) socket: RawFd,
    pub(crate) user: Option<Ids>,
    pub(crate) cgroups: Vec<RawFd>,
    pub(crate) workspace: Vec<u8>,
    pub(crate) root: Vec<u8>,
    pub(crate) open_files: Option<u64>,
    pub(crate) file_size: Option<u64>,
    pub(crate) seccomp: bool,
    pub(crate) watch: Watch,
}

/// What a test asked for beside it. Always nothing without the feature `failpoints`, whose
/// arguments are unknown then.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Watch {
    /// Where the history goes, and under which name.
    pub(crate) history: Option<RawFd>,
    pub(crate) name: String,
    pub(crate) failpoints: String,
}

/// Whom commands run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    #[error("{flag} needs a value")]
    MissingValue { flag: &'static str },
    #[error("{flag} {value:?} is not a number in its range")]
    NotANumber { flag: &'static str, value: OsString },
    #[error("{flag} {value:?} is not an absolute path")]
    NotAbsolute { flag: &'static str, value: OsString },
    #[error("--fd is missing: the number of the inherited socket")]
    NoSocket,
    #[error("--uid and --gid go together")]
    HalfUser,
    #[error("--uid and --gid must not be 0: commands would be the sidecar's equals")]
    RootUser,
    #[error("descriptor {0} is named twice")]
    FdTwice(RawFd),
    #[error("--workspace must be beneath --root")]
    WorkspaceOutside,
}

/// Reads the arguments that follow the program's name.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Settings, ArgsError> {
    let mut args = args;
    let mut socket = None;
    let (mut uid, mut gid) = (None, None);
    let mut settings = Settings {
        socket: -1,
        user: None,
        cgroups: Vec::new(),
        workspace: b"/workspace".to_vec(),
        root: b"/".to_vec(),
        open_files: None,
        file_size: None,
        seccomp: true,
        watch: Watch::default(),
    };
    while let Some(argument) = args.next() {
        match argument.as_bytes() {
            b"--fd" => socket = Some(number("--fd", args.next())?),
            b"--uid" => uid = Some(number("--uid", args.next())?),
            b"--gid" => gid = Some(number("--gid", args.next())?),
            b"--cgroup-fd" => settings.cgroups.push(number("--cgroup-fd", args.next())?),
            b"--workspace" => settings.workspace = absolute("--workspace", args.next())?,
            b"--root" => settings.root = absolute("--root", args.next())?,
            b"--open-files" => settings.open_files = Some(number("--open-files", args.next())?),
            b"--file-size" => settings.file_size = Some(number("--file-size", args.next())?),
            b"--no-seccomp" => settings.seccomp = false,
            #[cfg(feature = "failpoints")]
            b"--history-fd" => {
                settings.watch.history = Some(number("--history-fd", args.next())?);
            }
            #[cfg(feature = "failpoints")]
            b"--history-name" => settings.watch.name = text("--history-name", args.next())?,
            #[cfg(feature = "failpoints")]
            b"--failpoints" => settings.watch.failpoints = text("--failpoints", args.next())?,
            _ => return Err(ArgsError::Unknown(argument)),
        }
    }
    settings.socket = socket.ok_or(ArgsError::NoSocket)?;
    settings.user = match (uid, gid) {
        (None, None) => None,
        (Some(0), Some(_)) | (Some(_), Some(0)) => return Err(ArgsError::RootUser),
        (Some(uid), Some(gid)) => Some(Ids { uid, gid }),
        _ => return Err(ArgsError::HalfUser),
    };
    let mut seen = vec![settings.socket];
    for &fd in settings.cgroups.iter().chain(&settings.watch.history) {
        if seen.contains(&fd) {
            return Err(ArgsError::FdTwice(fd));
        }
        seen.push(fd);
    }
    settings.workspace_in_root()?;
    Ok(settings)
}

impl Settings {
    /// The workspace as the file calls see it: relative to the root.
    pub(crate) fn workspace_in_root(&self) -> Result<&[u8], ArgsError> {
        let root = self.root.strip_suffix(b"/").unwrap_or(&self.root);
        match self.workspace.strip_prefix(root) {
            Some(rest) if rest.first().is_none_or(|byte| *byte == b'/') => {
                Ok(rest.strip_prefix(b"/").unwrap_or(rest))
            }
            _ => Err(ArgsError::WorkspaceOutside),
        }
    }
}

fn number<T: std::str::FromStr>(
    flag: &'static str,
    value: Option<OsString>,
) -> Result<T, ArgsError> {
    let value = value.ok_or(ArgsError::MissingValue { flag })?;
    match value.to_str() {
        Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse().map_err(|_| ArgsError::NotANumber {
                flag,
                value: value.clone(),
            })
        }
        _ => Err(ArgsError::NotANumber { flag, value }),
    }
}

#[cfg(feature = "failpoints")]
fn text(flag: &'static str, value: Option<OsString>) -> Result<String, ArgsError> {
    let value = value.ok_or(ArgsError::MissingValue { flag })?;
    Ok(value.to_string_lossy().into_owned())
}

fn absolute(flag: &'static str, value: Option<OsString>) -> Result<Vec<u8>, ArgsError> {
    let value = value.ok_or(ArgsError::MissingValue { flag })?;
    if OsStr::as_bytes(&value).first() == Some(&b'/') {
        Ok(value.into_vec())
    } else {
        Err(ArgsError::NotAbsolute { flag, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(line: &str) -> Result<Settings, ArgsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn whole_line() {
        let settings = from(
            "--fd 3 --uid 1000 --gid 1001 --cgroup-fd 4 --cgroup-fd 5 --open-files 64 \
             --file-size 9 --root /r --workspace /r/w --no-seccomp",
        )
        .unwrap();
        assert_eq!(settings.socket, 3);
        assert_eq!(
            settings.user,
            Some(Ids {
                uid: 1000,
                gid: 1001
            })
        );
        assert_eq!(settings.cgroups, [4, 5]);
        assert_eq!(settings.workspace_in_root().unwrap(), b"w");
        assert_eq!(
            (settings.open_files, settings.file_size),
            (Some(64), Some(9))
        );
        assert!(!settings.seccomp);
        assert!(from("--fd 3").unwrap().seccomp);
    }

    #[test]
    fn refusals() {
        for (line, expected) in [
            ("", ArgsError::NoSocket),
            ("--fd", ArgsError::MissingValue { flag: "--fd" }),
            (
                "--fd -1",
                ArgsError::NotANumber {
                    flag: "--fd",
                    value: "-1".into(),
                },
            ),
            (
                "--fd 99999999999",
                ArgsError::NotANumber {
                    flag: "--fd",
                    value: "99999999999".into(),
                },
            ),
            ("--fd 3 --uid 1", ArgsError::HalfUser),
            ("--fd 3 --uid 0 --gid 5", ArgsError::RootUser),
            ("--fd 3 --cgroup-fd 3", ArgsError::FdTwice(3)),
            (
                "--fd 3 --root x",
                ArgsError::NotAbsolute {
                    flag: "--root",
                    value: "x".into(),
                },
            ),
            (
                "--fd 3 --root /a --workspace /ab",
                ArgsError::WorkspaceOutside,
            ),
            ("--fd 3 --what", ArgsError::Unknown("--what".into())),
        ] {
            assert_eq!(from(line), Err(expected), "{line}");
        }
    }
}
