//! SIGTERM and SIGINT: the first asks the worker to leave, the second ends it.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The exit code after a second signal.
const AT_ONCE: i32 = 130;

/// Listens from now on; the future acts.
pub fn watch(shutdown: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if shutdown.is_cancelled() {
                tracing::warn!("second signal, ending at once");
                // The forker and every sandbox end with this process.
                std::process::exit(AT_ONCE);
            }
            tracing::info!("signal, leaving");
            shutdown.cancel();
        }
    })
}
