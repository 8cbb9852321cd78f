//! Starting one command: fork, the few steps in between, exec.
//!
//! A plain fork and not a vfork: once the child has the user's uid, the user's
//! other processes may stop it, and a vforking parent would then hang for good.
//! For the same reason nobody waits for the exec; what failed is read from a
//! close-on-exec pipe when the child has ended. Everything is prepared before
//! the fork; the child only makes system calls.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

use crate::args::Ids;

/// Everything that the child needs.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// The files to try, in order.
    pub(crate) programs: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) work_dir: BorrowedFd<'a>,
    /// What becomes descriptors 0, 1 and 2; each is above them itself.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Open for writing; a `0` moves the writer in.
    pub(crate) cgroups: &'a [OwnedFd],
    pub(crate) user: Option<Ids>,
    pub(crate) limits: &'a [Limit],
    /// The writing end of the pipe that carries a [`ChildError`].
    pub(crate) errors: BorrowedFd<'a>,
}

/// A resource limit, soft and hard alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) resource: libc::__rlimit_resource_t,
    pub(crate) value: u64,
}

/// Where between fork and exec the child stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Session,
    Cgroup,
    Limits,
    Group,
    User,
    WorkDir,
    Stdio,
    Exec,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Session,
        Self::Cgroup,
        Self::Limits,
        Self::Group,
        Self::User,
        Self::WorkDir,
        Self::Stdio,
        Self::Exec,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Session => "setsid",
            Self::Cgroup => "join cgroup",
            Self::Limits => "set limits",
            Self::Group => "set gid",
            Self::User => "set uid",
            Self::WorkDir => "enter work_dir",
            Self::Stdio => "connect stdio",
            Self::Exec => "exec",
        }
    }
}

/// What the child reports instead of becoming the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChildError {
    pub(crate) step: Step,
    pub(crate) errno: Errno,
}

impl ChildError {
    pub(crate) const BYTES: usize = 5;

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&step, errno) = bytes.split_first()?;
        let errno = i32::from_ne_bytes(errno.try_into().ok()?);
        Some(Self {
            step: *Step::ALL.get(usize::from(step))?,
            errno: Errno::from_raw(errno),
        })
    }
}

/// Forks and returns the child's pid.
pub(crate) fn spawn(plan: &Plan<'_>) -> Result<i32, Errno> {
    let argv = pointers(plan.argv);
    let env = pointers(plan.env);
    // SAFETY: zeroes are a valid `sigset_t`, which the library then fills.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: both sets are live. Blocked, because a signal that reaches the
    // child early would run the parent's handler and be lost.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    // SAFETY: the process has one thread, and the child makes nothing but
    // system calls on memory that was prepared above.
    let pid = unsafe { libc::fork() };
    let failed = Errno::last();
    if pid == 0 {
        // SAFETY: in the child; the arrays end with null and outlive the call.
        unsafe { child(plan, &argv, &env) }
    }
    // SAFETY: `before` was filled by the first call.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    if pid == -1 { Err(failed) } else { Ok(pid) }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// The child's way to exec.
///
/// # Safety
/// Only in a child that was just forked; `argv` and `env` end with null.
unsafe fn child(plan: &Plan<'_>, argv: &[*const libc::c_char], env: &[*const libc::c_char]) -> ! {
    // SAFETY: system calls only, on what the plan holds.
    unsafe {
        let errors = plan.errors.as_raw_fd();
        must(errors, Step::Session, i64::from(libc::setsid()));
        // The sidecar may go before what it runs; giving that up is always allowed.
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        for cgroup in plan.cgroups {
            let written = libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1);
            must(errors, Step::Cgroup, written as i64);
        }
        for limit in plan.limits {
            let value = libc::rlimit {
                rlim_cur: limit.value,
                rlim_max: limit.value,
            };
            let set = libc::setrlimit(limit.resource, &raw const value);
            must(errors, Step::Limits, i64::from(set));
        }
        if let Some(Ids { uid, gid }) = plan.user {
            // The plain system calls: the library's own would signal threads.
            must(
                errors,
                Step::Group,
                libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            );
            must(
                errors,
                Step::User,
                libc::syscall(libc::SYS_setresuid, uid, uid, uid),
            );
        }
        must(
            errors,
            Step::WorkDir,
            i64::from(libc::fchdir(plan.work_dir.as_raw_fd())),
        );
        for (target, source) in (0..).zip(plan.stdio) {
            must(
                errors,
                Step::Stdio,
                i64::from(libc::dup2(source.as_raw_fd(), target)),
            );
        }
        for signal in [libc::SIGPIPE, libc::SIGCHLD, libc::SIGTERM] {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());

        let errno = exec(plan.programs, argv, env);
        fail(errors, Step::Exec, errno)
    }
}

/// Tries each file as a shell would: one that is missing or forbidden does not
/// end the search; forbidden is what counts in the end.
///
/// # Safety
/// Only in a child that was just forked; `argv` and `env` end with null.
unsafe fn exec(
    programs: &[CString],
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
) -> i32 {
    let mut outcome = libc::ENOENT;
    for program in programs {
        let program: &CStr = program;
        // SAFETY: null-terminated strings and arrays.
        unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
        match Errno::last_raw() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => outcome = libc::EACCES,
            other => return other,
        }
    }
    outcome
}

/// # Safety
/// Only in a child that was just forked.
unsafe fn must(errors: RawFd, step: Step, result: i64) {
    if result == -1 {
        // SAFETY: as the caller's.
        unsafe { fail(errors, step, Errno::last_raw()) }
    }
}

/// # Safety
/// Only in a child that was just forked.
unsafe fn fail(errors: RawFd, step: Step, errno: i32) -> ! {
    let [a, b, c, d] = errno.to_ne_bytes();
    let report = [step as u8, a, b, c, d];
    // SAFETY: a live buffer of that length; the process ends right after.
    unsafe {
        libc::write(errors, report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read_back() {
        for (index, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, index);
            let mut bytes = vec![index as u8];
            bytes.extend(libc::ENOENT.to_ne_bytes());
            assert_eq!(bytes.len(), ChildError::BYTES);
            let expected = ChildError {
                step,
                errno: Errno::ENOENT,
            };
            assert_eq!(ChildError::decode(&bytes), Some(expected));
        }
        for bytes in [&[][..], &[7], &[8, 0, 0, 0, 0], &[0, 0, 0, 0, 0, 0]] {
            assert_eq!(ChildError::decode(bytes), None);
        }
    }
}
