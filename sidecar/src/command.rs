//! From an Execute request to what a fork needs: every field checked, every
//! string terminated, the program's candidates laid out.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use remuda_proto::v1::ExecuteRequest;

use crate::error::{Failure, shown};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A request that can be carried out.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    /// The files to try, in order.
    pub(crate) programs: Vec<CString>,
    pub(crate) work_dir: OwnedFd,
    pub(crate) stdin: Bytes,
    pub(crate) timeout: Option<Duration>,
    pub(crate) output_limit: u64,
}

impl Command {
    /// Checks a request. The working directory is opened here, as the user.
    pub(crate) fn prepare(request: ExecuteRequest, workspace: &[u8]) -> Result<Self, Failure> {
        if request.argv.is_empty() {
            return Err(Failure::invalid("argv", "must not be empty"));
        }
        let argv = strings("argv", &request.argv)?;
        for (index, entry) in request.env.iter().enumerate() {
            if !entry.iter().skip(1).any(|byte| *byte == b'=') {
                return Err(Failure::invalid(
                    format!("env[{index}]"),
                    "must be NAME=value",
                ));
            }
        }
        let env = strings("env", &request.env)?;
        let programs = programs(&request.argv[0], search_path(&request.env))?;
        let work_dir = if request.work_dir.is_empty() {
            workspace
        } else {
            &request.work_dir
        };
        Ok(Self {
            argv,
            env,
            programs,
            work_dir: open_work_dir(work_dir)?,
            stdin: request.stdin,
            timeout: (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms)),
            output_limit: request.output_limit,
        })
    }
}

fn strings(field: &str, values: &[Bytes]) -> Result<Vec<CString>, Failure> {
    let terminated = |(index, value): (usize, &Bytes)| {
        CString::new(&value[..])
            .map_err(|_| Failure::invalid(format!("{field}[{index}]"), "must not contain NUL"))
    };
    values.iter().enumerate().map(terminated).collect()
}

fn search_path(env: &[Bytes]) -> &[u8] {
    env.iter()
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH)
}

/// A name with a slash is the file itself; any other is looked for along the
/// path, where an empty entry means the working directory.
fn programs(name: &[u8], path: &[u8]) -> Result<Vec<CString>, Failure> {
    let nul = |_| Failure::invalid("argv[0]", "must not contain NUL");
    if name.is_empty() {
        return Ok(Vec::new());
    }
    if name.contains(&b'/') {
        return Ok(vec![CString::new(name).map_err(nul)?]);
    }
    path.split(|byte| *byte == b':')
        .map(|folder| {
            let mut file = folder.to_vec();
            if !file.is_empty() {
                file.push(b'/');
            }
            file.extend_from_slice(name);
            CString::new(file).map_err(nul)
        })
        .collect()
}

fn open_work_dir(path: &[u8]) -> Result<OwnedFd, Failure> {
    if path.first() != Some(&b'/') {
        return Err(Failure::invalid("work_dir", "must be an absolute path"));
    }
    if path.contains(&0) {
        return Err(Failure::invalid("work_dir", "must not contain NUL"));
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM => Failure::Spawn {
            step: "open work_dir",
            errno,
        },
        errno => Failure::WorkDirMissing {
            path: shown(path),
            errno,
        },
    })
}

/// How a shell would number a program that could not be started.
pub(crate) fn exec_failure_code(errno: Errno) -> i32 {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => 127,
        _ => 126,
    }
}

/// Why the program could not be started, for people.
pub(crate) fn exec_failure_text(name: &[u8], errno: Errno) -> String {
    let name = shown(name);
    match errno {
        Errno::ENOENT => format!("{name}: not found, or its interpreter is not"),
        Errno::E2BIG => format!("{name}: E2BIG: the arguments and environment are too long"),
        Errno::ENOEXEC => format!("{name}: not a program that this system runs"),
        errno => format!("{name}: {}", errno.desc()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(argv: &[&'static str], env: &[&'static str]) -> ExecuteRequest {
        let bytes = |values: &[&'static str]| {
            values
                .iter()
                .map(|value| Bytes::from_static(value.as_bytes()))
                .collect()
        };
        ExecuteRequest {
            argv: bytes(argv),
            env: bytes(env),
            ..ExecuteRequest::default()
        }
    }

    #[test]
    fn refusals_name_the_field() {
        for (argv, env, work_dir, expected) in [
            (&[][..], &[][..], "/", "argv: must not be empty"),
            (&["a", "b\0"], &[], "/", "argv[1]: must not contain NUL"),
            (&["a\0"], &[], "/", "argv[0]: must not contain NUL"),
            (&["a"], &["X=1", "Y"], "/", "env[1]: must be NAME=value"),
            (&["a"], &["=x"], "/", "env[0]: must be NAME=value"),
            (&["a"], &["X=\0"], "/", "env[0]: must not contain NUL"),
            (&["a"], &["PATH=\0"], "/", "env[0]: must not contain NUL"),
            (&["a"], &[], "tmp", "work_dir: must be an absolute path"),
            (&["a"], &[], "/\0", "work_dir: must not contain NUL"),
            (
                &["a"],
                &[],
                "/no\nsuch",
                "work_dir /no\\nsuch: No such file or directory",
            ),
            (
                &["a"],
                &[],
                "/etc/passwd",
                "work_dir /etc/passwd: Not a directory",
            ),
        ] {
            let mut request = request(argv, env);
            request.work_dir = Bytes::from_static(work_dir.as_bytes());
            let failure = Command::prepare(request, b"/").unwrap_err();
            assert_eq!(failure.to_string(), expected);
        }
    }

    #[test]
    fn candidates() {
        for (name, env, expected) in [
            ("a/b", &["PATH=/x"][..], &["a/b"][..]),
            ("a", &["PATH=/x:/y/"], &["/x/a", "/y//a"]),
            ("a", &["PATH=:/x:"], &["a", "/x/a", "a"]),
            ("a", &["XPATH=/n", "PATH=/x", "PATH=/y"], &["/x/a"]),
            ("", &[], &[]),
        ] {
            let command = Command::prepare(request(&[name], env), b"/").unwrap();
            let found: Vec<_> = command
                .programs
                .iter()
                .map(|program| program.to_str().unwrap())
                .collect();
            assert_eq!(found, expected, "{name}");
        }
        assert_eq!(
            Command::prepare(request(&["a"], &[]), b"/")
                .unwrap()
                .programs
                .len(),
            6
        );
    }
}
