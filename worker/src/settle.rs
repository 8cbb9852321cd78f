//! Acknowledges what has ended, a few at a time.
//!
//! Nobody waits for an acknowledgement: the terminal is stored, and a placement that comes again
//! is recognised. Sent one by one, each would cost the server a wake-up and the removal of a file
//! just when a session's next step is on its way.

use std::time::Duration;

use remuda_client::broker::Delivery;
use remuda_telemetry::Chain;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How long an acknowledgement may wait for others.
const GATHER: Duration = Duration::from_millis(10);
/// How many go out at once at the latest; `stream::worker_consumer` leaves room for them.
const MOST: usize = 32;

/// Runs until `stop`, and then until everything is acknowledged that was settled.
pub(crate) async fn run(mut settled: mpsc::UnboundedReceiver<Delivery>, stop: CancellationToken) {
    let mut batch = Vec::with_capacity(MOST);
    loop {
        tokio::select! {
            () = stop.cancelled() => settled.close(),
            count = settled.recv_many(&mut batch, MOST) => if count == 0 { return },
        }
        let full =
            async { while batch.len() < MOST && settled.recv_many(&mut batch, MOST).await > 0 {} };
        // Whether it became full or the time is over: what is there goes out.
        let _over = tokio::time::timeout(GATHER, full).await;
        for delivery in batch.drain(..) {
            if let Err(error) = delivery.ack_soon().await {
                tracing::debug!(
                    error = %Chain(&error), "a placement was not acknowledged and comes again"
                );
            }
        }
    }
}
