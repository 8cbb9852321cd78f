//! An OS thread with a runtime of its own, for work that must go on whatever the data path does.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Stops when it is told to or dropped.
#[derive(Debug)]
pub(crate) struct RuntimeThread {
    handle: Handle,
    stop: DropGuard,
    ended: oneshot::Receiver<()>,
}

impl RuntimeThread {
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let token = CancellationToken::new();
        let (ended_sender, ended) = oneshot::channel();
        let until = token.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                runtime.block_on(until.cancelled());
                drop(runtime);
                // Nobody listening means that nobody waits for the end.
                let _ = ended_sender.send(());
            })?;
        Ok(Self {
            handle,
            stop: token.drop_guard(),
            ended,
        })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the thread with everything on it, and waits for that at most `bound`.
    pub(crate) async fn stop(self, bound: Duration) {
        drop(self.stop);
        let _ = tokio::time::timeout(bound, self.ended).await;
    }
}
