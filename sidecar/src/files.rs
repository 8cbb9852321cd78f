//! The file calls, as the sandbox's user and beneath the root.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::Uid;
use remuda_proto::v1::{ReadFileRequest, ReadFileResponse, WriteFileRequest};

use crate::args::Ids;
use crate::error::{Failure, shown};
use crate::path::FilePath;
use crate::user::AsUser;

/// Largest piece that one read returns.
const MOST_READ: u64 = 1024 * 1024;
const PERMISSIONS: u32 = 0o777;
const DEFAULT_MODE: u32 = 0o644;

/// Where the calls act, and as whom.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) root: OwnedFd,
    /// Relative to the root.
    pub(crate) workspace: Vec<u8>,
    pub(crate) user: Option<Ids>,
}

impl Files {
    /// Makes or replaces a file's content, and its folders where missing.
    pub(crate) fn write(&self, request: &WriteFileRequest) -> Result<u64, Failure> {
        if request.mode & !PERMISSIONS != 0 {
            return Err(Failure::invalid("mode", "has bits other than 0777"));
        }
        let path = FilePath::parse(&request.path, &self.workspace)?;
        let mode = if request.mode == 0 {
            DEFAULT_MODE
        } else {
            request.mode
        };
        let _user = AsUser::enter(self.user);
        let on_error = |operation| failure(operation, &request.path);
        // Not truncated by opening it: first see what it is.
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        let file = path
            .open(&self.root, flags, Mode::from_bits_truncate(mode), true)
            .map_err(on_error("open"))?;
        let file = self.regular(file, &request.path)?;
        let write = || {
            file.set_len(0)?;
            if request.mode != 0 {
                file.set_permissions(std::fs::Permissions::from_mode(request.mode))?;
            }
            file.write_all_at(&request.content, 0)
        };
        write().map_err(|error| on_error("write")(errno(&error)))?;
        Ok(request.content.len() as u64)
    }

    /// Reads one piece of a file.
    pub(crate) fn read(&self, request: &ReadFileRequest) -> Result<ReadFileResponse, Failure> {
        let path = FilePath::parse(&request.path, &self.workspace)?;
        let _user = AsUser::enter(self.user);
        let on_error = |operation| failure(operation, &request.path);
        let file = path
            .open(&self.root, OFlag::O_RDONLY, Mode::empty(), false)
            .map_err(on_error("open"))?;
        let file = self.regular(file, &request.path)?;
        let read = || {
            let size = file.metadata()?.len();
            let limit = if request.limit == 0 {
                MOST_READ
            } else {
                request.limit.min(MOST_READ)
            };
            let wanted = limit.min(size.saturating_sub(request.offset));
            let mut content = vec![0; wanted as usize];
            let mut filled = 0;
            while let Some(rest) = content.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                match file.read_at(rest, request.offset + filled as u64) {
                    // Cut short meanwhile.
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            content.truncate(filled);
            let eof =
                request.offset.saturating_add(filled as u64) >= size || filled < wanted as usize;
            Ok(ReadFileResponse {
                content: Bytes::from(content),
                size,
                eof,
            })
        };
        read().map_err(|error: std::io::Error| on_error("read")(errno(&error)))
    }

    /// Goes on only with a regular file, and not with another user's file that
    /// was linked to under a name of this user's choice.
    fn regular(&self, file: OwnedFd, path: &[u8]) -> Result<std::fs::File, Failure> {
        let file = std::fs::File::from(file);
        let about = file
            .metadata()
            .map_err(|error| failure("stat", path)(errno(&error)))?;
        if !about.is_file() {
            let what = "it is a folder, a pipe, a socket or a device";
            return Err(Failure::NotAFile {
                path: shown(path),
                what,
            });
        }
        let own = self
            .user
            .map_or_else(|| Uid::effective().as_raw(), |user| user.uid);
        if about.nlink() > 1 && about.uid() != own {
            return Err(failure("use the hard link", path)(Errno::EPERM));
        }
        Ok(file)
    }
}

fn failure(operation: &'static str, path: &[u8]) -> impl Fn(Errno) -> Failure {
    let path = shown(path);
    move |errno| match errno {
        // What O_NOFOLLOW answers; loops among the folders look the same.
        Errno::ELOOP => Failure::NotAFile {
            path: path.clone(),
            what: "it is a symbolic link",
        },
        errno => Failure::File {
            operation,
            path: path.clone(),
            errno,
        },
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
