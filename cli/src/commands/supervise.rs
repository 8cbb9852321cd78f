//! `remuda supervise`: becomes another program that ends when `remuda up` does.
//! Inside, not for people.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The process that must be ours; when it is not, it has ended already
    #[arg(long)]
    parent: i32,
    /// A file that the program keeps locked for as long as it runs
    #[arg(long)]
    hold: Option<PathBuf>,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Returns only when it failed.
pub(crate) fn run(args: &Args) -> Result<Infallible, Failure> {
    set_pdeathsig(Signal::SIGTERM)
        .map_err(|error| Failure::because("cannot ask to end with the parent", &error))?;
    // The parent may have ended before the kernel was asked.
    if getppid().as_raw() != args.parent {
        return Err(Failure::new("the parent has ended"));
    }
    let _held = args.hold.as_ref().map(hold).transpose()?;
    let Some((program, rest)) = args.command.split_first() else {
        return Err(Failure::usage("no command was given"));
    };
    let error = Command::new(program).args(rest).exec();
    Err(Failure::because(
        format_args!("cannot start {}", program.display()),
        &error,
    ))
}

/// A shared lock that lives on in the program that we become.
fn hold(path: &PathBuf) -> Result<Flock<File>, Failure> {
    let cannot = |error: &(dyn std::error::Error + 'static)| {
        Failure::because(format_args!("cannot hold {}", path.display()), error)
    };
    let file = File::open(path).map_err(|error| cannot(&error))?;
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|error| cannot(&error))?;
    Flock::lock(file, FlockArg::LockSharedNonblock).map_err(|(_, error)| cannot(&error))
}
