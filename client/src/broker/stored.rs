//! Messages as streams hold them: read by their place, deleted.

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{DeleteMessageErrorKind, DirectGetErrorKind, Stream};
use broker_schema::codec::Format;
use broker_schema::{ErrorInfo, Timestamp};
use bytes::Bytes;
use remuda_telemetry::TraceHeaders;

use super::delivery::{format_of, header, trace_of};
use super::error::Cause;
use super::{Broker, BrokerError};

/// A message in a stream.
#[derive(Debug, Clone)]
pub struct StoredMessage {
    pub sequence: u64,
    pub subject: String,
    pub headers: HeaderMap,
    pub payload: Bytes,
    /// When the server took it.
    pub time: Timestamp,
}

impl StoredMessage {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(Some(&self.headers), name)
    }

    pub fn format(&self) -> Result<Format, ErrorInfo> {
        format_of(Some(&self.headers))
    }

    pub fn trace(&self) -> TraceHeaders {
        trace_of(Some(&self.headers))
    }
}

impl From<StreamMessage> for StoredMessage {
    fn from(message: StreamMessage) -> Self {
        let micros = message.time.unix_timestamp_nanos() / 1000;
        Self {
            sequence: message.sequence,
            subject: message.subject.to_string(),
            headers: message.headers,
            payload: message.payload,
            time: Timestamp(u64::try_from(micros).unwrap_or_default()),
        }
    }
}

impl Broker {
    /// The message of this sequence, where it is still there.
    pub async fn stored_message(
        &self,
        stream: &str,
        sequence: u64,
    ) -> Result<Option<StoredMessage>, BrokerError> {
        let got = self.stream(stream).await?.direct_get(sequence).await;
        read(stream, &sequence.to_string(), got)
    }

    /// The first message from `sequence` on whose subject `filter` covers.
    pub async fn next_stored(
        &self,
        stream: &str,
        filter: &str,
        sequence: u64,
    ) -> Result<Option<StoredMessage>, BrokerError> {
        let got = self
            .stream(stream)
            .await?
            .direct_get_next_for_subject(filter, Some(sequence.max(1)))
            .await;
        read(stream, filter, got)
    }

    /// Takes a message out of a stream, whoever consumes it; false where it was gone.
    pub async fn delete_stored(&self, stream: &str, sequence: u64) -> Result<bool, BrokerError> {
        let Err(error) = self.stream(stream).await?.delete_message(sequence).await else {
            return Ok(true);
        };
        // The server has one code for all that can go wrong here.
        let refused = matches!(error.kind(), DeleteMessageErrorKind::JetStream(_));
        if refused && self.stored_message(stream, sequence).await?.is_none() {
            return Ok(false);
        }
        Err(BrokerError::Stream {
            operation: "delete a message of",
            stream: stream.to_owned(),
            source: error.into(),
        })
    }

    pub(super) async fn stream(&self, name: &str) -> Result<Stream<()>, BrokerError> {
        self.jetstream()
            .get_stream_no_info(name)
            .await
            .map_err(|error| BrokerError::Stream {
                operation: "look up",
                stream: name.to_owned(),
                source: error.into(),
            })
    }
}

fn read(
    stream: &str,
    what: &str,
    got: Result<StreamMessage, async_nats::jetstream::stream::DirectGetError>,
) -> Result<Option<StoredMessage>, BrokerError> {
    match got {
        Ok(message) => Ok(Some(message.into())),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
        Err(error) => Err(BrokerError::Read {
            stream: stream.to_owned(),
            subject: what.to_owned(),
            source: Cause::from(error),
        }),
    }
}
