//! One connection, served to its end. Its end is the sandbox's end.

use std::io::{self, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use remuda_proto::MAX_MESSAGE_BYTES;
use remuda_proto::v1::sidecar_server::SidecarServer;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{ArgsError, Settings};
use crate::execute::Surroundings;
use crate::files::Files;
use crate::harden::Inherited;
use crate::reaper::Reaper;
use crate::service::SidecarService;
use crate::sys::spawn::Limit;
use crate::tree;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("cannot use the inherited socket")]
    Socket { source: io::Error },
    #[error("cannot listen to signals")]
    Signals { source: io::Error },
    #[error("cannot open the null device")]
    Null { source: io::Error },
    #[error("cannot open the root folder")]
    Root { source: io::Error },
    #[error(transparent)]
    Args(#[from] ArgsError),
}

/// Says that it is ready (`R`, before any HTTP/2), then serves until the
/// connection ends or SIGTERM comes.
pub(crate) async fn serve(settings: Settings, inherited: Inherited) -> Result<(), ServeError> {
    let on_socket = |source| ServeError::Socket { source };
    let mut ended = signal(SignalKind::child()).map_err(|source| ServeError::Signals { source })?;
    let mut stop =
        signal(SignalKind::terminate()).map_err(|source| ServeError::Signals { source })?;
    let reaper = Arc::new(Reaper::default());
    let service = service(&settings, inherited.cgroups, Arc::clone(&reaper))?;

    let mut socket = StdUnixStream::from(inherited.socket);
    socket.write_all(b"R").map_err(on_socket)?;
    socket.set_nonblocking(true).map_err(on_socket)?;
    let socket = UnixStream::from_std(socket).map_err(on_socket)?;

    let service = SidecarServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut connection = std::pin::pin!(
        http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .max_frame_size(1 << 18)
            .max_concurrent_streams(1024)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(socket), TowerToHyperService::new(service))
    );
    loop {
        tokio::select! {
            _ = ended.recv() => {
                reaper.reap();
            }
            // However it ended: the worker is gone, and with it the sandbox.
            _ended = &mut connection => return Ok(()),
            _ = stop.recv() => return Ok(()),
        }
    }
}

fn service(
    settings: &Settings,
    cgroups: Vec<std::os::fd::OwnedFd>,
    reaper: Arc<Reaper>,
) -> Result<SidecarService, ServeError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root =
        open(settings.root.as_slice(), flags, Mode::empty()).map_err(|errno| ServeError::Root {
            source: errno.into(),
        })?;
    let workspace_in_root = settings.workspace_in_root()?.to_vec();
    let mut scratch = vec![workspace_in_root.clone()];
    if tree::is_init() {
        // Outside a sandbox these are everybody's.
        scratch.extend([&b"tmp"[..], b"var/tmp", b"dev/shm"].map(<[u8]>::to_vec));
    }
    // One byte and not none: a core file's pipe handler still starts at none.
    let mut limits = vec![Limit {
        resource: libc::RLIMIT_CORE,
        value: 1,
    }];
    for (resource, value) in [
        (libc::RLIMIT_NOFILE, settings.open_files),
        (libc::RLIMIT_FSIZE, settings.file_size),
    ] {
        limits.extend(value.map(|value| Limit { resource, value }));
    }
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let null = open("/dev/null", flags, Mode::empty()).map_err(|errno| ServeError::Null {
        source: errno.into(),
    })?;
    let around = Surroundings {
        user: settings.user,
        null,
        cgroups,
        limits,
        reaper,
    };
    let files = Files {
        root,
        workspace: workspace_in_root,
        user: settings.user,
    };
    Ok(SidecarService::new(
        around,
        files,
        settings.workspace.clone(),
        scratch,
    ))
}
