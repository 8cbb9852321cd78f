//! Publishes the frames of one attempt: in order, a bounded number on their way, none lost.
//!
//! Where an acknowledgement fails, everything from there on is published again under the same
//! ids; the server drops what it has. While the window is full nothing is read from the sidecar,
//! which then lets the command wait: memory stays flat however much is printed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use broker_schema::codec::{self, EncodeError, Format};
use broker_schema::{ExitStatus, Frame, FrameKind, Placement, TaskId, TenantId};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use remuda_client::broker::{Broker, BrokerError, Outgoing, PubAck};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, TraceHeaders, failpoint};

use crate::coalesce::Coalescer;

/// Frames that may wait for their acknowledgement.
const WINDOW: usize = 128;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Frames that cannot be published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("a frame cannot be written")]
    Encode(#[source] EncodeError),
    #[error("frames cannot be published")]
    Refused(#[source] BrokerError),
    #[error("frames could not be published for {after:?}")]
    GaveUp {
        after: Duration,
        #[source]
        source: BrokerError,
    },
}

type Ack = BoxFuture<'static, Result<PubAck, BrokerError>>;

struct Sent {
    message: Outgoing,
    /// None where it is to be published again.
    ack: Option<Ack>,
}

/// The frames of one attempt.
pub(crate) struct Stream {
    broker: Broker,
    subject: String,
    tenant: TenantId,
    task: TaskId,
    attempt: u32,
    format: Format,
    trace: TraceHeaders,
    coalescer: Coalescer,
    window: VecDeque<Sent>,
    patience: Duration,
    pause: Duration,
    retry_at: Instant,
    failing_since: Option<Instant>,
    /// How often publishing has begun to fail.
    outages: u64,
}

impl Stream {
    pub(crate) fn new(
        broker: &Broker,
        placement: &Placement,
        format: Format,
        trace: TraceHeaders,
        patience: Duration,
    ) -> Self {
        let task = &placement.task;
        Self {
            broker: broker.clone(),
            subject: broker.subjects().result(&task.tenant, &task.run, task.id),
            tenant: task.tenant.clone(),
            task: task.id,
            attempt: placement.attempt,
            format,
            trace,
            coalescer: Coalescer::new(placement.attempt, placement.sandbox.epoch),
            window: VecDeque::new(),
            patience,
            pause: FIRST_PAUSE,
            retry_at: Instant::now(),
            failing_since: None,
            outages: 0,
        }
    }

    /// Frames that were made so far.
    pub(crate) fn frames(&self) -> u64 {
        self.coalescer.taken()
    }

    pub(crate) fn outages(&self) -> u64 {
        self.outages
    }

    /// Whether more output may be taken in.
    pub(crate) fn has_room(&self) -> bool {
        self.window.len() < WINDOW
    }

    /// Whether acknowledgements are awaited.
    pub(crate) fn waiting(&self) -> bool {
        !self.window.is_empty()
    }

    /// When [`Self::flush`] must be called, if nothing else happens.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.coalescer.due()
    }

    pub(crate) async fn push(&mut self, kind: FrameKind, data: &[u8]) -> Result<(), StreamError> {
        if self.coalescer.push(kind, data, Instant::now()) {
            self.flush().await?;
        }
        Ok(())
    }

    pub(crate) fn end_step(&mut self, exit: ExitStatus) {
        self.coalescer.end_step(exit, Instant::now());
    }

    /// Publishes what is held.
    pub(crate) async fn flush(&mut self) -> Result<(), StreamError> {
        let frames = self.coalescer.take();
        self.publish(&frames).await
    }

    /// Publishes the rest, where there are frames at all, and waits for every acknowledgement.
    pub(crate) async fn finish(&mut self) -> Result<(), StreamError> {
        let frames = self.coalescer.finish();
        self.publish(&frames).await?;
        while self.waiting() {
            self.acked().await?;
        }
        history::record(|| Event::FramesAcked {
            task: self.task.to_string(),
            attempt: self.attempt,
            frames: self.frames(),
        });
        failpoint::step(failpoint::worker::FRAMES_ACKED);
        Ok(())
    }

    async fn publish(&mut self, frames: &[Frame]) -> Result<(), StreamError> {
        // All are in the window before the first is sent: giving up in between loses none.
        let first = self.window.len();
        for frame in frames {
            let payload = codec::encode(frame, self.format).map_err(StreamError::Encode)?;
            let message = Outgoing {
                subject: self.subject.clone(),
                message_id: Some(frame.message_id(&self.tenant, self.task)),
                format: self.format,
                payload: payload.into(),
                trace: self.trace.clone(),
                headers: Vec::new(),
            };
            self.window.push_back(Sent { message, ack: None });
        }
        if self.failing_since.is_none() {
            self.send_from(first).await?;
        }
        Ok(())
    }

    /// Sends what has no acknowledgement under way, in order, until one cannot be sent.
    async fn send_from(&mut self, first: usize) -> Result<(), StreamError> {
        for index in first..self.window.len() {
            if self.window[index].ack.is_some() {
                continue;
            }
            let message = self.window[index].message.clone();
            if failpoint::is_on(failpoint::worker::FRAME_LOST) {
                let subject = message.subject;
                self.window[index].ack = Some(std::future::ready(Err(lost(subject))).boxed());
                continue;
            }
            match Box::pin(self.broker.publish_windowed(message)).await {
                Ok(pending) => self.window[index].ack = Some(pending.wait().boxed()),
                Err(error) => return self.failed(error),
            }
            failpoint::step(failpoint::worker::FRAME_SENT);
        }
        Ok(())
    }

    /// Waits for the next acknowledgement, or for the time to try again. Cancel-safe.
    pub(crate) async fn acked(&mut self) -> Result<(), StreamError> {
        if self.window.front().is_some_and(|sent| sent.ack.is_none()) {
            tokio::time::sleep_until(self.retry_at.into()).await;
            self.send_from(0).await?;
        }
        let Some(ack) = self.window.front_mut().and_then(|sent| sent.ack.as_mut()) else {
            return Ok(());
        };
        match ack.await {
            // As if nobody looked whether it is stored.
            Err(_) if failpoint::is_on(failpoint::worker::NO_FRAME_ACK) => {
                self.window.pop_front();
                Ok(())
            }
            Ok(_) => {
                self.window.pop_front();
                self.failing_since = None;
                self.pause = FIRST_PAUSE;
                Ok(())
            }
            Err(error) => self.failed(error),
        }
    }

    /// Goes back to the oldest that is not acknowledged, or gives up.
    fn failed(&mut self, error: BrokerError) -> Result<(), StreamError> {
        if !error.retryable() {
            return Err(StreamError::Refused(error));
        }
        let now = Instant::now();
        if self.failing_since.is_none() {
            self.outages += 1;
            tracing::warn!(error = %Chain(&error), "a frame was not acknowledged, going back");
        }
        let after = now - *self.failing_since.get_or_insert(now);
        if after >= self.patience {
            let source = error;
            return Err(StreamError::GaveUp { after, source });
        }
        for sent in &mut self.window {
            sent.ack = None;
        }
        self.retry_at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// What becomes of the acknowledgement of a frame that a test loses.
fn lost(subject: String) -> BrokerError {
    BrokerError::Publish {
        subject,
        waited: Duration::ZERO,
        source: "lost by a test".into(),
    }
}
