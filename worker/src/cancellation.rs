//! The end of a task that somebody asks for, and why.

use std::sync::{Arc, OnceLock};

use broker_schema::CancelCause;
use tokio_util::sync::CancellationToken;

/// Cancelled once, for the reason that came first. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancellation {
    token: CancellationToken,
    cause: Arc<OnceLock<CancelCause>>,
}

impl Cancellation {
    pub(crate) fn cancel(&self, cause: CancelCause) {
        // The reason first: who sees the token cancelled asks for it.
        let _ = self.cause.set(cause);
        self.token.cancel();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    pub(crate) fn cause(&self) -> CancelCause {
        self.cause.get().copied().unwrap_or_default()
    }

    /// Resolves with the reason once it is cancelled.
    pub(crate) async fn cancelled(&self) -> CancelCause {
        self.token.cancelled().await;
        self.cause()
    }
}
