//! Finding a file beneath the root, whatever the sandbox's user does to the
//! folders on the way meanwhile.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

use crate::error::{Failure, shown};

/// A request's path, checked by its letters alone: relative to the root, with
/// a last component that can name a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FilePath {
    folder: Vec<u8>,
    name: CString,
}

impl FilePath {
    /// Takes a path that is absolute (in the root) or relative to `workspace`.
    pub(crate) fn parse(path: &[u8], workspace: &[u8]) -> Result<Self, Failure> {
        const LONGEST: usize = 4095;
        if path.is_empty() {
            return Err(Failure::invalid("path", "must not be empty"));
        }
        if path.contains(&0) {
            return Err(Failure::invalid("path", "must not contain NUL"));
        }
        if path.len() > LONGEST {
            return Err(Failure::invalid("path", "is longer than 4095 bytes"));
        }
        let mut whole = Vec::new();
        if path.first() != Some(&b'/') {
            whole.extend_from_slice(workspace);
            whole.push(b'/');
        }
        whole.extend_from_slice(path);

        let mut depth = 0_usize;
        for part in whole.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    depth = depth
                        .checked_sub(1)
                        .ok_or_else(|| Failure::PathEscapes { path: shown(path) })?;
                }
                _ => depth += 1,
            }
        }
        let cut = whole
            .iter()
            .rposition(|byte| *byte == b'/')
            .map_or(0, |slash| slash + 1);
        let name = whole.split_off(cut);
        if matches!(name.as_slice(), b"" | b"." | b"..") {
            return Err(Failure::NotAFile {
                path: shown(path),
                what: "it names a folder",
            });
        }
        let name =
            CString::new(name).map_err(|_| Failure::invalid("path", "must not contain NUL"))?;
        Ok(Self {
            folder: whole,
            name,
        })
    }

    /// Opens the file itself, never through a link in its last component.
    pub(crate) fn open(
        &self,
        root: impl AsFd,
        flags: OFlag,
        mode: Mode,
        make_folders: bool,
    ) -> Result<OwnedFd, Errno> {
        let folder = if make_folders {
            make_folder(root, &self.folder)?
        } else {
            open_folder(root, &self.folder)?
        };
        let safe = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let how = OpenHow::new()
            .flags(flags | safe)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(folder, self.name.as_c_str(), how)
    }
}

/// Opens a folder beneath the root. Links on the way count from the root.
pub(crate) fn open_folder(root: impl AsFd, folder: &[u8]) -> Result<OwnedFd, Errno> {
    let folder: &[u8] = if folder.is_empty() { b"." } else { folder };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, folder, how)
}

/// Opens a folder and makes what is missing of it. Each step is looked up from
/// the root anew, because links count from there.
fn make_folder(root: impl AsFd, folder: &[u8]) -> Result<OwnedFd, Errno> {
    match open_folder(&root, folder) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let mut here = open_folder(&root, b"")?;
    let mut start = 0;
    while start < folder.len() {
        let end = folder
            .iter()
            .skip(start)
            .position(|byte| *byte == b'/')
            .map_or(folder.len(), |length| start + length);
        let (upto, part) = (&folder[..end], &folder[start..end]);
        start = end + 1;
        if part.is_empty() {
            continue;
        }
        here = match open_folder(&root, upto) {
            Err(Errno::ENOENT) => {
                match mkdirat(&here, part, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open_folder(&root, upto)?
            }
            other => other?,
        };
    }
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters() {
        let found = |folder: &[u8], name: &str| {
            Ok(FilePath {
                folder: folder.to_vec(),
                name: CString::new(name).unwrap(),
            })
        };
        let escapes = |path: &str| Err(Failure::PathEscapes { path: path.into() });
        let folder = |path: &str| {
            Err(Failure::NotAFile {
                path: path.into(),
                what: "it names a folder",
            })
        };
        for (path, expected) in [
            ("a", found(b"work/", "a")),
            ("a/b", found(b"work/a/", "b")),
            ("/a", found(b"/", "a")),
            ("../a", found(b"work/../", "a")),
            ("/x/../a", found(b"/x/../", "a")),
            ("../../a", escapes("../../a")),
            ("/../a", escapes("/../a")),
            ("/a/../../b", escapes("/a/../../b")),
            ("/a/../../../a/b/c", escapes("/a/../../../a/b/c")),
            ("a/", folder("a/")),
            ("/", folder("/")),
            (".", folder(".")),
            ("a/..", folder("a/..")),
            ("...", found(b"work/", "...")),
            ("", Err(Failure::invalid("path", "must not be empty"))),
            (
                "a\0b",
                Err(Failure::invalid("path", "must not contain NUL")),
            ),
        ] {
            assert_eq!(
                FilePath::parse(path.as_bytes(), b"work"),
                expected,
                "{path:?}"
            );
        }
        assert!(FilePath::parse(&[b'a'; 4096], b"work").is_err());
    }
}
