//! The only unsafe code of the crate: thin wrappers of system calls that
//! `nix` does not offer, and the fork in [`spawn`].

pub(crate) mod spawn;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A child that ended, with what it and the descendants it waited for used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reaped {
    /// The raw wait status.
    pub(crate) status: i32,
    pub(crate) user_micros: u64,
    pub(crate) system_micros: u64,
    pub(crate) max_rss_bytes: u64,
}

/// What one look for ended children found.
#[derive(Debug)]
pub(crate) enum Waited {
    Ended(i32, Reaped),
    StillRunning,
    NoChildren,
}

/// Takes the status of one ended child, if there is one.
pub(crate) fn wait_any() -> Waited {
    loop {
        let mut status = 0;
        // SAFETY: `rusage` is plain old data, for which zeroes are a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live locals of the right types.
        let pid = unsafe {
            libc::wait4(
                -1,
                &raw mut status,
                libc::WNOHANG | libc::__WALL,
                &raw mut usage,
            )
        };
        match pid {
            0 => return Waited::StillRunning,
            1.. => {
                let micros =
                    |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
                let reaped = Reaped {
                    status,
                    user_micros: micros(usage.ru_utime),
                    system_micros: micros(usage.ru_stime),
                    max_rss_bytes: (usage.ru_maxrss.max(0) as u64).saturating_mul(1024),
                };
                return Waited::Ended(pid, reaped);
            }
            _ if Errno::last() == Errno::EINTR => {}
            _ => return Waited::NoChildren,
        }
    }
}

/// Bytes that wait in a pipe.
pub(crate) fn pending_bytes(pipe: &impl AsRawFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer to a live local.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 {
        usize::try_from(count).unwrap_or(0)
    } else {
        0
    }
}

/// Opens the null device on every standard descriptor that is closed, so that
/// nothing else ever gets one of their numbers.
pub(crate) fn fill_standard_descriptors() -> io::Result<()> {
    for fd in 0..=2 {
        // SAFETY: asks for flags only; a closed descriptor gives EBADF.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            put_null_on(fd)?;
        }
    }
    Ok(())
}

/// Takes ownership of a descriptor that the launcher named by number, moved
/// out of the standard ones' range, close-on-exec.
pub(crate) fn take_descriptor(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: duplicates a number that is checked by the kernel.
    let moved = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if moved == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `moved` was just made and belongs to nobody else.
    let moved = unsafe { OwnedFd::from_raw_fd(moved) };
    if fd <= 2 {
        put_null_on(fd)?;
    } else {
        // SAFETY: runs once per number before anything else owns descriptors;
        // the arguments were checked for repeats.
        unsafe { libc::close(fd) };
    }
    Ok(moved)
}

fn put_null_on(fd: RawFd) -> io::Result<()> {
    // SAFETY: a constant path; the result is checked.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
    if null == -1 {
        return Err(io::Error::last_os_error());
    }
    if null != fd {
        // SAFETY: replaces a standard descriptor, which no object owns, and
        // closes the one that was just made.
        unsafe {
            libc::dup2(null, fd);
            libc::close(null);
        }
    }
    Ok(())
}

/// Marks everything above the standard descriptors close-on-exec.
pub(crate) fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: changes descriptor flags only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives every signal but SIGPIPE its default action and unblocks all, so that
/// commands do not inherit what the launcher ignored.
pub(crate) fn default_signals() {
    // The kernel's own form: handler, flags, restorer, mask; all zeroes is the
    // default action. The library would leave out two signals that it uses.
    let default = [0_u64; 4];
    for signal in (1..=64).filter(|signal| *signal != libc::SIGPIPE) {
        // SAFETY: reads as many bytes as the kernel's form has; the signals
        // that cannot be changed give EINVAL, which is as good.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
    }
    // SAFETY: an empty set made by the library; the old mask is not asked for.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

const KEPT_CAPABILITIES: u32 = 1 << 5 /* KILL */ | 1 << 6 /* SETGID */ | 1 << 7 /* SETUID */;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Empties the bounding and ambient sets, then gives up every capability but
/// the three that running commands as another user takes.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: takes plain numbers.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if result == -1 {
            match Errno::last() {
                // The kernel knows no more of them.
                Errno::EINVAL => break,
                other => return Err(other.into()),
            }
        }
    }
    // SAFETY: takes plain numbers.
    let ambient = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    if ambient == -1 {
        return Err(io::Error::last_os_error());
    }
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let low = CapabilityData {
        effective: KEPT_CAPABILITIES,
        permitted: KEPT_CAPABILITIES,
        inheritable: 0,
    };
    let high = CapabilityData {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    };
    let data = [low, high];
    // SAFETY: version 3 reads a header and two data records of this layout.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends any signal, the real-time ones too, which `nix` has no names for.
pub(crate) fn send_signal(target: nix::unistd::Pid, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes plain numbers.
    Errno::result(unsafe { libc::kill(target.as_raw(), signal) }).map(drop)
}

/// Lets the runtime tell when a descriptor is ready.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open and the same until it is dropped,
    // and nothing here replaces one above the standard ones.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}
