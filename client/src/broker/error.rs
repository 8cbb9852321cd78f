//! What can go wrong between us and nats-server.

use std::error::Error;
use std::time::Duration;

use async_nats::jetstream;
use broker_schema::{ErrorCode, ErrorInfo};

/// What the library below said. Boxed: its types differ by operation, and
/// nobody decides on them above this module.
pub type Cause = Box<dyn Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    #[error("{what} {value:?} is not valid: {mend}")]
    Option {
        what: &'static str,
        value: String,
        mend: String,
    },
    #[error("cannot connect to nats-server at {url}: {mend}")]
    Connect {
        url: String,
        mend: &'static str,
        #[source]
        source: Cause,
    },
    #[error(
        "nats-server {name:?} at {url} has version {found:?}, at least {} is needed: upgrade nats-server",
        super::VERSION_FLOOR
    )]
    TooOld {
        name: String,
        url: String,
        found: String,
    },
    #[error(
        "nats-server {name:?} at {url} has no JetStream for this account: start it with -js or a jetstream block"
    )]
    NoJetStream {
        name: String,
        url: String,
        #[source]
        source: Cause,
    },
    #[error(
        "stream {stream} has {setting} {found}, expected {expected}: it was made by something else, remove it or use another prefix"
    )]
    StreamMismatch {
        stream: String,
        setting: &'static str,
        expected: String,
        found: String,
    },
    #[error(
        "consumer {consumer} has {setting} {found}, expected {expected}: it was made by something else, remove it"
    )]
    ConsumerMismatch {
        consumer: String,
        setting: &'static str,
        expected: String,
        found: String,
    },
    #[error(
        "consumer {consumer} cannot be made: another one of stream {stream} has messages of {filter}"
    )]
    ConsumerTaken {
        stream: String,
        consumer: String,
        filter: String,
    },
    #[error("consumer {consumer} of stream {stream} is gone")]
    ConsumerGone { stream: String, consumer: String },
    #[error("stream {stream} does not exist")]
    StreamMissing { stream: String },
    #[error("cannot {operation} stream {stream}")]
    Stream {
        operation: &'static str,
        stream: String,
        #[source]
        source: Cause,
    },
    #[error("cannot {operation} consumer {consumer} of stream {stream}")]
    Consumer {
        operation: &'static str,
        stream: String,
        consumer: String,
        #[source]
        source: Cause,
    },
    #[error("no acknowledgement of the message to {subject} within {waited:?}")]
    Publish {
        subject: String,
        waited: Duration,
        #[source]
        source: Cause,
    },
    #[error(
        "nats-server at {url} could not be reached for {waited:?}, the message to {subject} may not be stored: start it, or mend the network"
    )]
    Unreachable {
        url: String,
        subject: String,
        waited: Duration,
        #[source]
        source: Cause,
    },
    #[error("the message to {subject} has {size} bytes, more than the stream or server takes")]
    TooLarge { subject: String, size: usize },
    #[error("the stream behind {subject} is full: {detail}")]
    Full { subject: String, detail: String },
    #[error("nats-server refused the message to {subject}")]
    Refused {
        subject: String,
        #[source]
        source: Cause,
    },
    #[error("cannot encode the message to {subject}")]
    Encode {
        subject: String,
        #[source]
        source: broker_schema::codec::EncodeError,
    },
    #[error("cannot read {subject} from stream {stream}")]
    Read {
        stream: String,
        subject: String,
        #[source]
        source: Cause,
    },
    #[error(
        "stream {stream} has nothing before {first} any more, {wanted} was to be read: results are kept for as long as the fleet is told to; go on from {first}"
    )]
    Removed {
        stream: String,
        wanted: u64,
        first: u64,
    },
    #[error(
        "stream {stream} ends at {last}, {wanted} was to be read: it was lost or made anew since; read from the beginning"
    )]
    StreamReset {
        stream: String,
        wanted: u64,
        last: u64,
    },
    #[error(
        "stream {stream} is not the one in which {wanted} was to be read next: it was lost and made anew; read from the beginning"
    )]
    StreamRemade { stream: String, wanted: u64 },
    #[error("what is stored under {subject} cannot be read: {info}")]
    Unreadable { subject: String, info: ErrorInfo },
    #[error("cannot acknowledge the message {sequence} of {subject}")]
    Acknowledge {
        subject: String,
        sequence: u64,
        #[source]
        source: Cause,
    },
    #[error("cannot subscribe to {subject}")]
    Subscribe {
        subject: String,
        #[source]
        source: Cause,
    },
    #[error("the incarnation stream is at {sequence}, beyond what an epoch can carry")]
    IncarnationsExhausted { sequence: u64 },
    #[error("the connection to nats-server is closed")]
    Closed,
}

impl BrokerError {
    /// The stable code under which a person finds this in the documentation.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Option { .. } => ErrorCode::InvalidField,
            Self::Connect { .. }
            | Self::NoJetStream { .. }
            | Self::Stream { .. }
            | Self::Consumer { .. }
            | Self::Publish { .. }
            | Self::Unreachable { .. }
            | Self::Read { .. }
            | Self::Acknowledge { .. }
            | Self::Subscribe { .. }
            | Self::Closed => ErrorCode::NatsUnreachable,
            Self::TooOld { .. } => ErrorCode::NatsTooOld,
            Self::StreamMismatch { .. }
            | Self::ConsumerMismatch { .. }
            | Self::ConsumerTaken { .. }
            | Self::ConsumerGone { .. }
            | Self::StreamMissing { .. } => ErrorCode::StreamMismatch,
            Self::Removed { .. } | Self::StreamReset { .. } | Self::StreamRemade { .. } => {
                ErrorCode::ResultsRemoved
            }
            Self::TooLarge { .. } => ErrorCode::RequestTooLarge,
            Self::Full { .. } => ErrorCode::ResultsFull,
            Self::Refused { .. }
            | Self::Encode { .. }
            | Self::Unreadable { .. }
            | Self::IncarnationsExhausted { .. } => ErrorCode::Internal,
        }
    }

    /// Whether the same call may succeed later without anybody's doing.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. }
                | Self::Stream { .. }
                | Self::Consumer { .. }
                | Self::ConsumerTaken { .. }
                | Self::ConsumerGone { .. }
                | Self::Publish { .. }
                | Self::Unreachable { .. }
                | Self::Read { .. }
                | Self::Acknowledge { .. }
                | Self::Subscribe { .. }
                | Self::Full { .. }
        )
    }

    /// For a terminal or a reply: code and whole chain of causes.
    pub fn info(&self) -> ErrorInfo {
        ErrorInfo::new(self.code(), remuda_telemetry::Chain(self).to_string())
    }
}

/// JetStream's own answer behind an error of the library, where there is one.
pub(crate) fn api_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a jetstream::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<jetstream::Error>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
