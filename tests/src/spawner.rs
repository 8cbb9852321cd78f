//! Starts children that die with this process, whatever kills it.
//!
//! Linux sends the death signal when the *thread* that started the child ends,
//! so one thread that never ends starts them all.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts the command in a process group of its own.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (command, reply) in jobs {
                // Nobody waits any more: the child is dropped, and dies with us.
                let _ = reply.send(spawn_here(command));
            }
        });
        Mutex::new(sender)
    });
    let (reply, answer) = mpsc::channel();
    let spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    let gone = || io::Error::other("the thread that starts children is gone");
    spawner.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[expect(
    unsafe_code,
    reason = "pre_exec is the only way to set the death signal"
)]
fn spawn_here(mut command: Command) -> io::Result<Child> {
    let parent = Pid::this();
    command.process_group(0);
    // SAFETY: between fork and exec the closure only makes system calls, which
    // are async-signal-safe; it neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the signal was set.
            if getppid() == parent {
                Ok(())
            } else {
                Err(Errno::ESRCH.into())
            }
        });
    }
    command.spawn()
}
