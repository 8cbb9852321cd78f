//! Reading what is stored, in order, from any place on.

use std::pin::Pin;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use broker_schema::codec;
use broker_schema::{Frame, RunId, TaskId, Terminal};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde::de::DeserializeOwned;

use crate::broker::{Broker, BrokerError, format_of};
use crate::client::Client;
use crate::error::ClientError;

/// When a reader is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// When it has read what was stored when it got there.
    CaughtUp,
    /// Never: it waits for more.
    Dropped,
}

/// A stored message as a reader gets it.
struct Stored {
    sequence: u64,
    subject: String,
    headers: Option<async_nats::HeaderMap>,
    payload: Bytes,
}

impl Stored {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, BrokerError> {
        format_of(self.headers.as_ref())
            .and_then(|format| codec::decode(&self.payload, format))
            .map_err(|info| BrokerError::Unreadable {
                subject: self.subject.clone(),
                info,
            })
    }
}

impl Client {
    /// The terminals of a run in the order they were stored, each with its
    /// sequence. Resume with the last sequence read plus one.
    pub fn results(
        &self,
        run: &RunId,
        from: Option<u64>,
        until: Until,
    ) -> impl Stream<Item = Result<(u64, Terminal), ClientError>> + Send + use<> {
        let broker = &self.shared.broker;
        let filter = broker.subjects().terminals_of_run(&self.shared.tenant, run);
        let stream = broker.streams().terminals.clone();
        let run = run.clone();
        follow(broker.clone(), stream, filter, from, until).map(move |item| {
            item.and_then(|stored| Ok((stored.sequence, stored.decode()?)))
                .map_err(|source| ClientError::Results {
                    run: run.clone(),
                    source,
                })
        })
    }

    /// The stored frames of one task, all attempts, each with its sequence.
    /// Frames of a lower attempt, and repeats, are the reader's to drop:
    /// [`Client::stream`] does.
    pub fn output(
        &self,
        run: &RunId,
        task: TaskId,
        from: Option<u64>,
        until: Until,
    ) -> impl Stream<Item = Result<(u64, Frame), ClientError>> + Send + use<> {
        let broker = &self.shared.broker;
        let filter = broker.subjects().result(&self.shared.tenant, run, task);
        frames(broker, filter, from, until)
            .map(move |item| item.map_err(|source| ClientError::Output { task, source }))
    }
}

/// The frames stored under one subject.
pub(crate) fn frames(
    broker: &Broker,
    subject: String,
    from: Option<u64>,
    until: Until,
) -> impl Stream<Item = Result<(u64, Frame), BrokerError>> + Send + use<> {
    let stream = broker.streams().results.clone();
    follow(broker.clone(), stream, subject, from, until)
        .map(|item| item.and_then(|stored| Ok((stored.sequence, stored.decode()?))))
}

type Messages = pull::Ordered;

enum State {
    Start,
    Reading(Box<Messages>),
    Done,
}

/// An ordered consumer: one that is made anew, from where it was, whenever it
/// misses something.
fn follow(
    broker: Broker,
    stream: String,
    filter: String,
    from: Option<u64>,
    until: Until,
) -> Pin<Box<dyn Stream<Item = Result<Stored, BrokerError>> + Send>> {
    let steps = futures::stream::unfold(State::Start, move |state| {
        let (broker, stream, filter) = (broker.clone(), stream.clone(), filter.clone());
        async move {
            let mut messages = match state {
                State::Done => return None,
                State::Reading(messages) => messages,
                State::Start => match open(&broker, &stream, &filter, from, until).await {
                    Ok(Some(messages)) => Box::new(messages),
                    Ok(None) => return None,
                    Err(error) => return Some((Err(error), State::Done)),
                },
            };
            let failed = |source| BrokerError::Read {
                stream: stream.clone(),
                subject: filter.clone(),
                source,
            };
            match messages.next().await {
                None => None,
                Some(Err(error)) => Some((Err(failed(error.into())), State::Done)),
                Some(Ok(message)) => match place(&message) {
                    Err(source) => Some((Err(failed(source)), State::Done)),
                    Ok((sequence, pending)) => {
                        let last = until == Until::CaughtUp && pending == 0;
                        let next = if last {
                            State::Done
                        } else {
                            State::Reading(messages)
                        };
                        let (message, _) = message.split();
                        let stored = Stored {
                            sequence,
                            subject: message.subject.to_string(),
                            headers: message.headers,
                            payload: message.payload,
                        };
                        Some((Ok(stored), next))
                    }
                },
            }
        }
    });
    Box::pin(steps)
}

fn place(message: &jetstream::Message) -> Result<(u64, u64), crate::broker::Cause> {
    let info = message.info()?;
    Ok((info.stream_sequence, info.pending))
}

/// `None` where there is nothing to read and nothing to wait for.
async fn open(
    broker: &Broker,
    stream: &str,
    filter: &str,
    from: Option<u64>,
    until: Until,
) -> Result<Option<Messages>, BrokerError> {
    let failed = |source| BrokerError::Read {
        stream: stream.to_owned(),
        subject: filter.to_owned(),
        source,
    };
    let config = pull::OrderedConfig {
        filter_subject: filter.to_owned(),
        deliver_policy: match from {
            // The server takes no sequence below 1.
            Some(start_sequence) => DeliverPolicy::ByStartSequence {
                start_sequence: start_sequence.max(1),
            },
            None => DeliverPolicy::All,
        },
        ..pull::OrderedConfig::default()
    };
    let consumer = broker
        .jetstream()
        .create_consumer_on_stream(config, stream)
        .await
        .map_err(|error| failed(error.into()))?;
    if until == Until::CaughtUp && consumer.cached_info().num_pending == 0 {
        return Ok(None);
    }
    consumer
        .messages()
        .await
        .map(Some)
        .map_err(|error| failed(error.into()))
}
