//! Reading what is stored under a subject in the order of the stream, each message once, from any
//! place on, across restarts of the server.
//!
//! The library's ordered consumer notices what it misses and begins anew; what it does not know is
//! where its reader wanted to begin, nor that the server has forgotten it before a heartbeat fails
//! to come. This keeps the place itself.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use broker_schema::codec;
use bytes::Bytes;
use futures::StreamExt as _;
use remuda_telemetry::Chain;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::broker::{Broker, BrokerError, Cause, LinkState, format_of};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Failures in a row after which somebody who waits for an end is told; about ten seconds.
const PATIENCE: u32 = 10;

/// When a reader is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// When it has read what was stored when it got there.
    CaughtUp,
    /// Never: it waits for more.
    Dropped,
}

/// A stored message as a reader gets it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) sequence: u64,
    subject: String,
    headers: Option<async_nats::HeaderMap>,
    payload: Bytes,
}

impl Stored {
    pub(crate) fn decode<T: DeserializeOwned>(&self) -> Result<T, BrokerError> {
        format_of(self.headers.as_ref())
            .and_then(|format| codec::decode(&self.payload, format))
            .map_err(|info| BrokerError::Unreadable {
                subject: self.subject.clone(),
                info,
            })
    }
}

/// Where to begin, and what to say of what is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    First,
    /// This sequence, or what comes after it.
    Sequence(u64),
    /// The same; that something before it may have been removed is an error.
    Complete(u64),
}

pub(crate) struct Reader {
    broker: Broker,
    stream: String,
    filter: String,
    until: Until,
    place: Place,
    messages: Option<Box<pull::Ordered>>,
    link: watch::Receiver<LinkState>,
    generation: u64,
    failures: u32,
    done: bool,
}

impl Reader {
    pub(crate) fn new(
        broker: Broker,
        stream: String,
        filter: String,
        place: Place,
        until: Until,
    ) -> Self {
        let mut link = broker.link();
        let generation = link.borrow_and_update().generation;
        Self {
            broker,
            stream,
            filter,
            until,
            place,
            messages: None,
            link,
            generation,
            failures: 0,
            done: false,
        }
    }

    /// The next message; `None` after the last. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<Result<Stored, BrokerError>> {
        while !self.done {
            match self.step().await {
                Ok(Some(stored)) => return Some(Ok(stored)),
                Ok(None) => {}
                Err(error) if self.goes_on(&error) => {
                    tracing::debug!(stream = self.stream, error = %Chain(&error), "reading again");
                    self.messages = None;
                    let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(8));
                    self.failures = self.failures.saturating_add(1);
                    tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
                }
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    fn goes_on(&self, error: &BrokerError) -> bool {
        error.retryable() && (self.until == Until::Dropped || self.failures < PATIENCE)
    }

    /// A message, or nothing yet.
    async fn step(&mut self) -> Result<Option<Stored>, BrokerError> {
        let Some(messages) = &mut self.messages else {
            self.open().await?;
            return Ok(None);
        };
        let message = tokio::select! {
            biased;
            changed = self.link.changed() => {
                let state = *self.link.borrow_and_update();
                if state.closed || changed.is_err() {
                    return Err(BrokerError::Closed);
                }
                // The server may have been started again, and have forgotten its consumers.
                if state.connected && state.generation != self.generation {
                    self.generation = state.generation;
                    self.messages = None;
                }
                return Ok(None);
            }
            message = messages.next() => message,
        };
        let message = match message {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(self.failed(error.into())),
            None => return Err(self.failed("the consumer has ended".into())),
        };
        let (sequence, pending) = place(&message).map_err(|source| self.failed(source))?;
        self.failures = 0;
        self.done = self.until == Until::CaughtUp && pending == 0;
        // A consumer that was made anew before its first message begins at the first of all.
        if self.place.is_before(sequence) {
            return Ok(None);
        }
        self.place = Place::Sequence(sequence + 1);
        let (message, _) = message.split();
        Ok(Some(Stored {
            sequence,
            subject: message.subject.to_string(),
            headers: message.headers,
            payload: message.payload,
        }))
    }

    async fn open(&mut self) -> Result<(), BrokerError> {
        self.check_place().await?;
        self.generation = self.link.borrow_and_update().generation;
        let config = pull::OrderedConfig {
            filter_subject: self.filter.clone(),
            deliver_policy: match self.place {
                Place::First => DeliverPolicy::All,
                // The server takes no sequence below 1.
                Place::Sequence(sequence) | Place::Complete(sequence) => {
                    DeliverPolicy::ByStartSequence {
                        start_sequence: sequence.max(1),
                    }
                }
            },
            ..pull::OrderedConfig::default()
        };
        let consumer = self
            .broker
            .jetstream()
            .create_consumer_on_stream(config, self.stream.as_str())
            .await
            .map_err(|error| self.failed(error.into()))?;
        if self.until == Until::CaughtUp && consumer.cached_info().num_pending == 0 {
            self.done = true;
            return Ok(());
        }
        let messages = consumer.messages().await;
        self.messages = Some(Box::new(
            messages.map_err(|error| self.failed(error.into()))?,
        ));
        Ok(())
    }

    /// Whether the stream still has what the place counts on.
    async fn check_place(&mut self) -> Result<(), BrokerError> {
        let (Place::Sequence(wanted) | Place::Complete(wanted)) = self.place else {
            return Ok(());
        };
        let state = self
            .broker
            .jetstream()
            .get_stream(&self.stream)
            .await
            .map_err(|error| self.failed(error.into()))?
            .cached_info()
            .state
            .clone();
        let (first, last) = (state.first_sequence, state.last_sequence);
        if wanted > last + 1 {
            return Err(BrokerError::StreamReset {
                stream: self.stream.clone(),
                wanted,
                last,
            });
        }
        if matches!(self.place, Place::Complete(_)) && first > wanted {
            return Err(BrokerError::Removed {
                stream: self.stream.clone(),
                wanted,
                first,
            });
        }
        Ok(())
    }

    fn failed(&self, source: Cause) -> BrokerError {
        BrokerError::Read {
            stream: self.stream.clone(),
            subject: self.filter.clone(),
            source,
        }
    }
}

impl Place {
    /// Whether a message stands before what is wanted.
    fn is_before(self, sequence: u64) -> bool {
        match self {
            Self::First => false,
            Self::Sequence(wanted) | Self::Complete(wanted) => sequence < wanted,
        }
    }
}

fn place(message: &jetstream::Message) -> Result<(u64, u64), Cause> {
    let info = message.info()?;
    Ok((info.stream_sequence, info.pending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_comes_twice() {
        assert!(!Place::First.is_before(1));
        for from in [Place::Sequence(5), Place::Complete(5)] {
            assert!(from.is_before(4));
            assert!(!from.is_before(5) && !from.is_before(6));
        }
    }
}
