//! One message that a consumer delivered, and what may be said to it.

use std::time::Duration;

use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::{HeaderMap, Message, Request, RequestErrorKind, Subject};
use broker_schema::codec::Format;
use broker_schema::{ErrorInfo, HEADER_CONTENT_TYPE, HEADER_TRACEPARENT, HEADER_TRACESTATE};
use bytes::Bytes;
use remuda_telemetry::TraceHeaders;
use tokio::time::Instant;

use super::connect::REQUEST_TIMEOUT;
use super::error::Cause;
use super::publish::Pauses;
use super::{Broker, BrokerError};

/// How long to wait for a consumer that nobody answers for: it is gone, or its
/// server is just coming up.
const ABSENT: Duration = Duration::from_secs(1);

/// A delivered message. The server delivers it again when nothing is said to
/// it within the consumer's `ack_wait`.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub subject: String,
    pub payload: Bytes,
    pub headers: Option<HeaderMap>,
    pub stream_sequence: u64,
    pub consumer_sequence: u64,
    /// When the server stored it, in nanoseconds: with the sequence it names the
    /// message, also where a server lost its storage and counts anew.
    pub stored: u64,
    /// Counts from 1. May go back after a crash of the server: never count
    /// attempts by it.
    pub delivered: u64,
    /// Messages that the consumer has yet to deliver.
    pub pending: u64,
    broker: Broker,
    /// Of the connection that it came by.
    generation: u64,
    reply: Subject,
}

impl Delivery {
    /// Takes a message apart; `None` where its reply subject is not JetStream's.
    pub(crate) fn of(message: Message, broker: &Broker) -> Option<Self> {
        let reply = message.reply?;
        let parsed = AckSubject::parse(&reply)?;
        Some(Self {
            subject: message.subject.to_string(),
            payload: message.payload,
            headers: message.headers,
            stream_sequence: parsed.stream_sequence,
            consumer_sequence: parsed.consumer_sequence,
            stored: parsed.stored,
            delivered: parsed.delivered,
            pending: parsed.pending,
            broker: broker.clone(),
            generation: broker.link().borrow().generation,
            reply,
        })
    }

    pub fn format(&self) -> Result<Format, ErrorInfo> {
        format_of(self.headers.as_ref())
    }

    pub fn trace(&self) -> TraceHeaders {
        trace_of(self.headers.as_ref())
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        header(self.headers.as_ref(), name)
    }

    /// Done: waits until the server has taken note, at most as long as a
    /// request may take. Proves receipt, not ownership. After a crash the
    /// server ignores acks of what it does not remember to have delivered, and
    /// delivers it again: an error here means just that.
    pub async fn ack(&self) -> Result<(), BrokerError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let mut absent = Pauses::new(Instant::now() + ABSENT);
        let mut link = self.broker.link();
        loop {
            if self.is_forgotten().await? {
                return Ok(());
            }
            let generation = link.borrow_and_update().generation;
            let request = Request::new()
                .payload(Bytes::from_static(b"+ACK"))
                .timeout(Some(deadline.saturating_duration_since(Instant::now())));
            let asked = self.broker.nats().send_request(self.reply.clone(), request);
            let (failure, nobody): (Cause, bool) = tokio::select! {
                biased;
                answered = asked => match answered {
                    Ok(_) => return Ok(()),
                    Err(error) => {
                        let nobody = error.kind() == RequestErrorKind::NoResponders;
                        (error.into(), nobody)
                    }
                },
                // The answer went with the connection; an ack may be repeated.
                _ = link.wait_for(|now| now.generation != generation || now.closed) => {
                    ("the connection was lost".into(), false)
                }
            };
            if nobody && !Box::pin(absent.pause()).await {
                return Err(self.failed(failure));
            }
            let closed = link.borrow().closed;
            if closed || Instant::now() >= deadline {
                return Err(self.failed(failure));
            }
        }
    }

    /// Done, without waiting: a repeat must be harmless.
    pub async fn ack_soon(&self) -> Result<(), BrokerError> {
        self.say(Bytes::from_static(b"+ACK")).await
    }

    /// Deliver it again after `delay`.
    pub async fn nak(&self, delay: Duration) -> Result<(), BrokerError> {
        let text = format!("-NAK {{\"delay\": {}}}", delay.as_nanos());
        self.say(text.into()).await
    }

    /// Still at it: starts `ack_wait` anew.
    pub async fn progress(&self) -> Result<(), BrokerError> {
        self.publish(Bytes::from_static(b"+WPI")).await
    }

    /// Never deliver it again.
    pub async fn term(&self) -> Result<(), BrokerError> {
        self.say(Bytes::from_static(b"+TERM")).await
    }

    async fn say(&self, payload: Bytes) -> Result<(), BrokerError> {
        if self.is_forgotten().await? {
            return Ok(());
        }
        self.publish(payload).await
    }

    /// Whether the server does not have this message any more, or another one
    /// in its place. An answer names no more than the place, and a server that
    /// came back without its storage counts anew: the answer would settle a
    /// message that nobody has seen. Asked only where the connection was lost
    /// since the delivery.
    async fn is_forgotten(&self) -> Result<bool, BrokerError> {
        if self.broker.link().borrow().generation == self.generation {
            return Ok(false);
        }
        let Some(stream) = AckSubject::stream(&self.reply) else {
            return Ok(false);
        };
        let found = self
            .broker
            .jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| self.failed(error.into()))?
            .direct_get(self.stream_sequence)
            .await;
        match found {
            Ok(message) => Ok(message.time.unix_timestamp_nanos() != i128::from(self.stored)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(true),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    async fn publish(&self, payload: Bytes) -> Result<(), BrokerError> {
        self.broker
            .nats()
            .publish(self.reply.clone(), payload)
            .await
            .map_err(|error| self.failed(error.into()))
    }

    fn failed(&self, source: Cause) -> BrokerError {
        BrokerError::Acknowledge {
            subject: self.subject.clone(),
            sequence: self.stream_sequence,
            source,
        }
    }
}

pub(crate) fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(async_nats::HeaderValue::as_str)
}

pub(crate) fn format_of(headers: Option<&HeaderMap>) -> Result<Format, ErrorInfo> {
    Format::from_content_type(header(headers, HEADER_CONTENT_TYPE))
}

pub(crate) fn trace_of(headers: Option<&HeaderMap>) -> TraceHeaders {
    TraceHeaders::incoming(
        header(headers, HEADER_TRACEPARENT),
        header(headers, HEADER_TRACESTATE),
    )
}

/// What a reply subject of JetStream says. Two forms are about:
/// `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`
/// and, with a domain, an account hash before them and maybe a token after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AckSubject {
    delivered: u64,
    stream_sequence: u64,
    consumer_sequence: u64,
    stored: u64,
    pending: u64,
}

impl AckSubject {
    fn stream(reply: &str) -> Option<&str> {
        let rest = reply.strip_prefix("$JS.ACK.")?;
        match rest.split('.').count() {
            7 => rest.split('.').next(),
            9.. => rest.split('.').nth(2),
            _ => None,
        }
    }

    fn parse(reply: &str) -> Option<Self> {
        let rest = reply.strip_prefix("$JS.ACK.")?;
        let tokens = rest.split('.').count();
        let before = match tokens {
            7 => 2,
            9.. => 4,
            _ => return None,
        };
        let mut numbers = rest.split('.').skip(before);
        let mut number = || numbers.next()?.parse::<u64>().ok();
        let delivered = number()?;
        let stream_sequence = number()?;
        let consumer_sequence = number()?;
        let stored = number()?;
        let pending = number()?;
        Some(Self {
            delivered,
            stream_sequence,
            consumer_sequence,
            stored,
            pending,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_reply_subject() {
        let expected = AckSubject {
            delivered: 2,
            stream_sequence: 15,
            consumer_sequence: 11,
            stored: 1_700_000_000_000_000_000,
            pending: 3,
        };
        for reply in [
            "$JS.ACK.REMUDA_REQ.lane-a-b.2.15.11.1700000000000000000.3",
            "$JS.ACK._.ACCHASH.REMUDA_REQ.lane-a-b.2.15.11.1700000000000000000.3",
            "$JS.ACK.hub.ACCHASH.REMUDA_REQ.lane-a-b.2.15.11.1700000000000000000.3.xYz9",
        ] {
            assert_eq!(AckSubject::parse(reply), Some(expected), "{reply}");
            assert_eq!(AckSubject::stream(reply), Some("REMUDA_REQ"), "{reply}");
        }
    }

    #[test]
    fn anything_else_is_no_delivery() {
        for reply in [
            "",
            "_INBOX.a.b",
            "$JS.ACK",
            "$JS.ACK.",
            "$JS.ACK.S.C.1.2.3.4",
            "$JS.ACK.S.C.1.2.3.4.5.6",
            "$JS.ACK.S.C.x.2.3.4.5",
            "$JS.ACK.S.C.1.-2.3.4.5",
            "$JS.ACK.S.C.1.2.3.99999999999999999999999.5",
        ] {
            assert_eq!(AckSubject::parse(reply), None, "{reply}");
        }
    }
}
