//! Publishing to streams: a message counts once its PubAck came.

use std::future::IntoFuture as _;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::{HeaderValue, NATS_MESSAGE_ID};
use async_nats::jetstream::context::{PublishAckFuture, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use broker_schema::codec::Format;
use broker_schema::{HEADER_CONTENT_TYPE, HEADER_SCHEMA, SCHEMA_VERSION};
use bytes::Bytes;
use remuda_telemetry::TraceHeaders;
use tokio::time::Instant;

use super::error::{Cause, api_error};
use super::{Broker, BrokerError};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

const MESSAGE_TOO_LARGE: u64 = 10054;
const STORE_FAILED: u64 = 10077;
const RESOURCES_EXCEEDED: [u64; 3] = [10002, 10023, 10047];

/// A message for a stream.
#[derive(Debug, Clone, Default)]
pub struct Outgoing {
    pub subject: String,
    /// The server drops a repeat of this id. Without one a retry may store the
    /// message twice.
    pub message_id: Option<String>,
    pub format: Format,
    pub payload: Bytes,
    pub trace: TraceHeaders,
    pub headers: Vec<(&'static str, String)>,
}

/// The stream has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PubAck {
    pub sequence: u64,
    /// The stream had a message of this id already.
    pub duplicate: bool,
}

/// A message that was given up on.
#[derive(Debug)]
pub struct Unpublished {
    pub error: BrokerError,
    /// False where every try was refused: the stream does not have it.
    pub may_be_stored: bool,
}

/// An acknowledgement that is on its way.
#[must_use = "a message counts once its acknowledgement came"]
pub struct PendingAck {
    subject: String,
    size: usize,
    since: Instant,
    future: PublishAckFuture,
}

impl std::fmt::Debug for PendingAck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingAck")
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

impl PendingAck {
    /// Waits for it, at most as long as a request may take. An error leaves
    /// open whether the message was stored.
    pub async fn wait(self) -> Result<PubAck, BrokerError> {
        match self.future.into_future().await {
            Ok(ack) => Ok(PubAck {
                sequence: ack.sequence,
                duplicate: ack.duplicate,
            }),
            Err(error) => {
                Err(Fate::of(error).into_error(&self.subject, self.size, self.since.elapsed()))
            }
        }
    }
}

impl Broker {
    /// Publishes and waits for the PubAck. Faults of the transport, and a full
    /// stream, are tried again with the same id until `patience` runs out.
    pub async fn publish(
        &self,
        message: Outgoing,
        patience: Duration,
    ) -> Result<PubAck, BrokerError> {
        let published = self.publish_or_tell(message, patience).await;
        published.map_err(|unpublished| unpublished.error)
    }

    /// As [`Self::publish`]; tells of a message that was given up on whether the stream may
    /// have it all the same.
    pub async fn publish_or_tell(
        &self,
        message: Outgoing,
        patience: Duration,
    ) -> Result<PubAck, Unpublished> {
        let mut may_be_stored = false;
        let ready = Ready::of(&message).map_err(|error| Unpublished {
            error,
            may_be_stored,
        })?;
        let since = Instant::now();
        let deadline = since + patience;
        let mut pauses = Pauses::new(deadline);
        loop {
            let fate = match self.attempt(&ready, deadline).await {
                Ok(ack) => return Ok(ack),
                Err(fate) => fate,
            };
            may_be_stored |= !fate.is_refusal();
            if !fate.passes() || !pauses.pause().await {
                return Err(Unpublished {
                    error: self.failed(fate, &ready, since),
                    may_be_stored,
                });
            }
        }
    }

    /// The error of a message that was given up on.
    fn failed(&self, fate: Fate, ready: &Ready, since: Instant) -> BrokerError {
        let waited = since.elapsed();
        match fate {
            Fate::Again(source) if !self.connected() => BrokerError::Unreachable {
                url: self.url().to_owned(),
                subject: ready.subject.to_string(),
                waited,
                source,
            },
            fate => fate.into_error(&ready.subject, ready.payload.len(), waited),
        }
    }

    /// Sends without waiting: for a window of frames. Waits only while the
    /// connection has too many acknowledgements outstanding.
    pub async fn publish_windowed(&self, message: Outgoing) -> Result<PendingAck, BrokerError> {
        let ready = Ready::of(&message)?;
        let (since, size) = (Instant::now(), ready.payload.len());
        let subject = message.subject;
        match self
            .jetstream()
            .send_publish(ready.subject.clone(), ready.message())
            .await
        {
            Ok(future) => Ok(PendingAck {
                subject,
                size,
                since,
                future,
            }),
            Err(error) => Err(Fate::of(error).into_error(&subject, size, since.elapsed())),
        }
    }

    /// Tries once. An acknowledgement that was on its way when the connection
    /// broke will not come: that ends the try at once.
    pub(crate) async fn attempt(&self, ready: &Ready, deadline: Instant) -> Result<PubAck, Fate> {
        let mut link = self.link();
        let state = tokio::time::timeout_at(
            deadline,
            link.wait_for(|state| state.connected || state.closed),
        )
        .await
        .map_err(|elapsed| Fate::Again(elapsed.into()))?
        .map_or_else(|_| None, |state| Some(*state));
        let Some(state) = state.filter(|state| !state.closed) else {
            return Err(Fate::Closed);
        };
        let exchange = async {
            let acknowledged = self
                .jetstream()
                .send_publish(ready.subject.clone(), ready.message())
                .await
                .map_err(Fate::of)?;
            acknowledged.await.map_err(Fate::of)
        };
        tokio::select! {
            biased;
            outcome = tokio::time::timeout_at(deadline, exchange) => match outcome {
                Ok(Ok(ack)) => Ok(PubAck { sequence: ack.sequence, duplicate: ack.duplicate }),
                Ok(Err(fate)) => Err(fate),
                Err(elapsed) => Err(Fate::Again(elapsed.into())),
            },
            _ = link.wait_for(|now| now.generation != state.generation || now.closed) => {
                Err(Fate::Again("the connection was lost".into()))
            }
        }
    }
}

/// A message with its headers made, to be sent as often as it takes.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) subject: async_nats::Subject,
    pub(crate) payload: Bytes,
    headers: HeaderMap,
}

impl Ready {
    pub(crate) fn of(message: &Outgoing) -> Result<Self, BrokerError> {
        Ok(Self {
            subject: message.subject.as_str().into(),
            payload: message.payload.clone(),
            headers: headers(message)?,
        })
    }

    fn message(&self) -> PublishMessage {
        PublishMessage::build()
            .payload(self.payload.clone())
            .headers(self.headers.clone())
    }
}

fn headers(message: &Outgoing) -> Result<HeaderMap, BrokerError> {
    let mut headers = HeaderMap::new();
    headers.insert(HEADER_SCHEMA, HeaderValue::from(SCHEMA_VERSION));
    headers.insert(HEADER_CONTENT_TYPE, message.format.content_type());
    let id = message
        .message_id
        .as_deref()
        .map(|id| (NATS_MESSAGE_ID.as_ref(), id));
    let rest = message
        .headers
        .iter()
        .map(|(name, value)| (*name, value.as_str()));
    for (name, value) in id.into_iter().chain(rest) {
        let parsed: HeaderValue = value.parse().map_err(|_| BrokerError::Option {
            what: "header",
            value: format!("{name}: {value}"),
            mend: "must be one line".to_owned(),
        })?;
        headers.insert(name, parsed);
    }
    message.trace.inject(|name, value| {
        if let Ok(value) = value.parse::<HeaderValue>() {
            headers.insert(name, value);
        }
    });
    Ok(headers)
}

/// What became of a try that was not acknowledged.
#[derive(Debug)]
pub(crate) enum Fate {
    /// May be stored or not; the same may be sent again.
    Again(Cause),
    /// The stream, or the subject, takes no more.
    Full(String),
    TooLarge,
    Refused(Cause),
    Closed,
}

impl Fate {
    fn of(error: PublishError) -> Self {
        if error.kind() == PublishErrorKind::MaxPayloadExceeded {
            return Self::TooLarge;
        }
        match api_error(&error) {
            None => Self::Again(error.into()),
            Some(api) => match api.error_code().0 {
                MESSAGE_TOO_LARGE => Self::TooLarge,
                STORE_FAILED => Self::Full(api.to_string()),
                code if RESOURCES_EXCEEDED.contains(&code) => Self::Full(api.to_string()),
                // The server is not ready, or is still at the first copy.
                _ if matches!(api.code(), 503 | 409) => Self::Again(error.into()),
                _ => Self::Refused(error.into()),
            },
        }
    }

    /// Whether time alone may mend it.
    pub(crate) fn passes(&self) -> bool {
        matches!(self, Self::Again(_) | Self::Full(_))
    }

    /// Whether the server, or this side of it, said no: then nothing was stored.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Full(_) | Self::TooLarge | Self::Refused(_) => true,
            // Nobody listens for the stream: it has no leader.
            Self::Again(source) => source
                .downcast_ref::<PublishError>()
                .is_some_and(|error| error.kind() == PublishErrorKind::StreamNotFound),
            Self::Closed => false,
        }
    }

    pub(crate) fn into_error(self, subject: &str, size: usize, waited: Duration) -> BrokerError {
        let subject = subject.to_owned();
        match self {
            Self::Again(source) => BrokerError::Publish {
                subject,
                waited,
                source,
            },
            Self::Full(detail) => BrokerError::Full { subject, detail },
            Self::TooLarge => BrokerError::TooLarge { subject, size },
            Self::Refused(source) => BrokerError::Refused { subject, source },
            Self::Closed => BrokerError::Closed,
        }
    }
}

/// Doubling pauses up to a deadline.
#[derive(Debug)]
pub(crate) struct Pauses {
    next: Duration,
    deadline: Instant,
}

impl Pauses {
    pub(crate) fn new(deadline: Instant) -> Self {
        Self {
            next: FIRST_PAUSE,
            deadline,
        }
    }

    /// Waits for the next try; false, at once, where the deadline comes first.
    pub(crate) async fn pause(&mut self) -> bool {
        let until = Instant::now() + self.next;
        if until >= self.deadline {
            return false;
        }
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        tokio::time::sleep_until(until).await;
        true
    }
}
