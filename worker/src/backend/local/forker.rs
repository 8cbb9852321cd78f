//! The forker: a process with one thread that starts sandboxes, so that the async worker never
//! forks. It keeps no list of them; the kernel reaps, and the worker holds the pidfds.
//!
//! It ends with its socket, and every sandbox ends with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use super::child::{Child, RESERVED_FDS};
use super::protocol::{self, MAX_MESSAGE, Outcome, Reply, Request, SETUP, SandboxSpec};
use super::sys::{self, Cloned};
use super::template::Templates;

/// The hidden first argument that makes the worker's binary a forker.
pub(crate) const FORKER_ARGUMENT: &str = "sandbox-forker";

/// Was this process started as a forker? Then `main` must do nothing but call [`forker_main`].
pub fn is_forker_invocation() -> bool {
    std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == FORKER_ARGUMENT)
}

/// Runs the forker until its worker has gone.
pub fn forker_main() -> ExitCode {
    // A child that panics must not unwind into a second copy of the loop.
    std::panic::set_hook(Box::new(|panic| {
        complain(&panic.to_string());
        std::process::abort();
    }));
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// The forker's standard error is its worker's; there is no subscriber in here.
fn complain(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(io::stderr(), "sandbox forker: {text}");
}

const CREATE_STEP: &str = "start a process in new namespaces";

const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

struct Failure {
    step: String,
    source: io::Error,
}

fn at(step: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure {
        step: step.to_owned(),
        source,
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed {
            step: failure.step,
            errno: failure.source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

fn serve() -> io::Result<()> {
    sys::close_inherited()?;
    let socket = sys::duplicate_from(io::stdin().as_fd(), RESERVED_FDS)?;
    // The worker's own end of life is also seen as the end of the socket; this is the second way.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    sys::reap_children_automatically()?;
    sys::ignore_stop_signals()?;
    // Out of the worker's process group, where a terminal's Ctrl-C would reach it.
    nix::unistd::setsid()?;

    let mut buffer = vec![0; MAX_MESSAGE];
    let Some((Request::Setup { mount_point }, fds)) = protocol::receive(&socket, &mut buffer)?
    else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first message is not a setup",
        ));
    };
    let answer = |id, outcome, fds: &[BorrowedFd<'_>]| {
        protocol::send(socket.as_fd(), &Reply { id, outcome }, fds)
    };
    let mut forker = match Forker::new(&mount_point, fds) {
        Ok(forker) => forker,
        Err(failure) => return answer(SETUP, failure.into(), &[]),
    };
    answer(SETUP, Outcome::Ready, &[])?;

    while let Some((request, fds)) = protocol::receive::<Request>(&socket, &mut buffer)? {
        match request {
            Request::Setup { .. } => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a second setup arrived",
                ));
            }
            Request::Prepare { id, image } => {
                let outcome = match forker.templates.prepare(&image) {
                    Ok(template) => Outcome::Prepared(template),
                    Err(source) => at("prepare the image")(source).into(),
                };
                answer(id, outcome, &[])?;
            }
            Request::Create { id, sandbox } => match forker.create(&sandbox, fds) {
                Ok(started) => {
                    let fds = [started.pidfd.as_fd(), started.socket.as_fd()];
                    answer(id, Outcome::Created { pid: started.pid }, &fds)?;
                }
                Err(failure) => answer(id, failure.into(), &[])?,
            },
        }
    }
    Ok(())
}

struct Forker {
    templates: Templates,
    sidecar: OwnedFd,
}

struct Started {
    pid: i32,
    pidfd: OwnedFd,
    /// The worker's end.
    socket: UnixStream,
}

impl Forker {
    fn new(mount_point: &Path, fds: Vec<OwnedFd>) -> Result<Self, Failure> {
        let [sidecar] = <[OwnedFd; 1]>::try_from(fds)
            .map_err(|_| at("receive the sidecar")(io::Error::from_raw_os_error(libc::EPROTO)))?;
        let sidecar = sealed_copy(sidecar.into()).map_err(at("copy the sidecar"))?;
        let templates = Templates::new(mount_point).map_err(|(step, source)| at(step)(source))?;
        Ok(Self { templates, sidecar })
    }

    fn create(&self, spec: &SandboxSpec, cgroups: Vec<OwnedFd>) -> Result<Started, Failure> {
        let template = self
            .templates
            .get(spec.template)
            .ok_or_else(|| at("find the template")(io::Error::from_raw_os_error(libc::ENOENT)))?;
        let (ours, theirs) = UnixStream::pair().map_err(at("make the sidecar's socket"))?;
        match sys::clone3(NAMESPACES).map_err(at(CREATE_STEP))? {
            Cloned::Parent { pid, pidfd } => Ok(Started {
                pid,
                pidfd,
                socket: ours,
            }),
            Cloned::Child => {
                // Held here, it would hide the worker's end from the sandbox.
                drop(ours);
                Child {
                    spec,
                    templates: &self.templates,
                    template,
                    sidecar: self.sidecar.as_fd(),
                    socket: theirs,
                    cgroups,
                }
                .run()
            }
        }
    }
}

/// Copies the sidecar into sealed memory: all sandboxes share its pages, and nobody, not even
/// who can write the file it came from, can change what they run.
fn sealed_copy(mut file: File) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag and need none.
    let executable = MFdFlags::from_bits_retain(libc::MFD_EXEC);
    let memory = memfd_create("remuda-sidecar", flags | executable)
        .or_else(|_| memfd_create("remuda-sidecar", flags))?;
    let mut memory = File::from(memory);
    io::copy(&mut file, &mut memory)?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    // A descriptor that is open for writing cannot be executed; the copy is read-only.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    let read_only = File::open(path)?;
    sys::duplicate_from(read_only.as_fd(), RESERVED_FDS)
}
