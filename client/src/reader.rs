//! Reading what is stored under a subject in the order of the stream, each message once, from any
//! place on, across restarts of the server.
//!
//! The library's ordered consumer makes itself anew where it has missed something, in whatever
//! stream then has the name. This keeps the place itself, and compares it with the stream before
//! anything is read from there.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
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
/// How many messages are asked for at once.
const BATCH: usize = 500;
/// How long the server keeps the consumer of a reader that is away.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);

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

/// What to say of messages that were removed before they were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// That something before the place may have been removed is an error.
    Told,
    PassedOver,
}

/// Where to go on, and in what stream.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// This sequence, or what comes after it; none where it is the first that there is.
    wanted: Option<u64>,
    removal: Removal,
    /// When the stream was made that `wanted` counts in; none before it was looked at.
    made: Option<i128>,
}

/// A stream as it is when a reader gets there.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// Tells it from another one of its name, in nanoseconds since 1970.
    made: i128,
    first: u64,
    last: u64,
}

pub(crate) struct Reader {
    broker: Broker,
    stream: String,
    filter: String,
    until: Until,
    place: Place,
    messages: Option<Box<pull::Stream>>,
    /// How many messages came from this consumer.
    delivered: u64,
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
        from: Option<u64>,
        removal: Removal,
        until: Until,
    ) -> Self {
        let mut link = broker.link();
        let generation = link.borrow_and_update().generation;
        Self {
            broker,
            stream,
            filter,
            until,
            place: Place {
                wanted: from,
                removal,
                made: None,
            },
            messages: None,
            delivered: 0,
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
        let at = position(&message).map_err(|source| self.failed(source))?;
        if at.delivered != self.delivered + 1 {
            return Err(self.failed("messages were lost on their way".into()));
        }
        self.delivered = at.delivered;
        self.failures = 0;
        self.done = self.until == Until::CaughtUp && at.pending == 0;
        self.place.wanted = Some(at.sequence + 1);
        let (message, _) = message.split();
        Ok(Some(Stored {
            sequence: at.sequence,
            subject: message.subject.to_string(),
            headers: message.headers,
            payload: message.payload,
        }))
    }

    async fn open(&mut self) -> Result<(), BrokerError> {
        self.generation = self.link.borrow_and_update().generation;
        let config = pull::Config {
            filter_subject: self.filter.clone(),
            deliver_policy: match self.place.wanted {
                None => DeliverPolicy::All,
                // The server takes no sequence below 1.
                Some(sequence) => DeliverPolicy::ByStartSequence {
                    start_sequence: sequence.max(1),
                },
            },
            ack_policy: AckPolicy::None,
            max_deliver: 1,
            inactive_threshold: FORGOTTEN_AFTER,
            num_replicas: 1,
            memory_storage: true,
            ..pull::Config::default()
        };
        let consumer = self
            .broker
            .jetstream()
            .create_consumer_on_stream(config, self.stream.as_str())
            .await
            .map_err(|error| self.failed(error.into()))?;
        // After the consumer was made: one of a stream that is gone by now is gone with it.
        let found = self.look().await?;
        self.place.check(&self.stream, found)?;
        self.place.made = Some(found.made);
        if self.until == Until::CaughtUp && consumer.cached_info().num_pending == 0 {
            self.done = true;
            return Ok(());
        }
        let messages = consumer
            .stream()
            .max_messages_per_batch(BATCH)
            .messages()
            .await
            .map_err(|error| self.failed(error.into()))?;
        self.delivered = 0;
        self.messages = Some(Box::new(messages));
        Ok(())
    }

    async fn look(&self) -> Result<Found, BrokerError> {
        let stream = self
            .broker
            .jetstream()
            .get_stream(&self.stream)
            .await
            .map_err(|error| self.failed(error.into()))?;
        let info = stream.cached_info();
        Ok(Found {
            made: info.created.unix_timestamp_nanos(),
            first: info.state.first_sequence,
            last: info.state.last_sequence,
        })
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
    /// Whether the stream still has what the place counts on.
    fn check(&self, stream: &str, found: Found) -> Result<(), BrokerError> {
        let Some(wanted) = self.wanted else {
            return Ok(());
        };
        if self.made.is_some_and(|made| made != found.made) {
            return Err(BrokerError::StreamRemade {
                stream: stream.to_owned(),
                wanted,
            });
        }
        if wanted > found.last + 1 {
            return Err(BrokerError::StreamReset {
                stream: stream.to_owned(),
                wanted,
                last: found.last,
            });
        }
        if self.removal == Removal::Told && found.first > wanted {
            return Err(BrokerError::Removed {
                stream: stream.to_owned(),
                wanted,
                first: found.first,
            });
        }
        Ok(())
    }
}

/// Where a message stands in its stream, and among those of its consumer.
struct Position {
    sequence: u64,
    delivered: u64,
    pending: u64,
}

fn position(message: &jetstream::Message) -> Result<Position, Cause> {
    let info = message.info()?;
    Ok(Position {
        sequence: info.stream_sequence,
        delivered: info.consumer_sequence,
        pending: info.pending,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_compared_with_the_stream() {
        const FOUND: Found = Found {
            made: 7,
            first: 11,
            last: 20,
        };
        let place = |wanted, removal, made| Place {
            wanted,
            removal,
            made,
        };
        let cases = [
            (place(None, Removal::Told, None), "goes on"),
            // Nothing was read: nothing is missed.
            (place(None, Removal::Told, Some(6)), "goes on"),
            (place(Some(15), Removal::Told, None), "goes on"),
            (place(Some(15), Removal::Told, Some(7)), "goes on"),
            (place(Some(15), Removal::Told, Some(6)), "remade"),
            (place(Some(15), Removal::PassedOver, Some(8)), "remade"),
            // Also where it has not grown as far.
            (place(Some(30), Removal::Told, Some(6)), "remade"),
            (place(Some(21), Removal::Told, Some(7)), "goes on"),
            (place(Some(22), Removal::Told, None), "reset"),
            (place(Some(22), Removal::PassedOver, Some(7)), "reset"),
            (place(Some(11), Removal::Told, Some(7)), "goes on"),
            (place(Some(10), Removal::Told, None), "removed"),
            (place(Some(10), Removal::Told, Some(7)), "removed"),
            (place(Some(10), Removal::PassedOver, Some(7)), "goes on"),
        ];
        for (place, expected) in cases {
            let said = match place.check("TERM", FOUND) {
                Ok(()) => "goes on",
                Err(BrokerError::StreamRemade { .. }) => "remade",
                Err(BrokerError::StreamReset { .. }) => "reset",
                Err(BrokerError::Removed { .. }) => "removed",
                Err(_) => "another error",
            };
            assert_eq!(said, expected, "{place:?}");
        }
    }
}
