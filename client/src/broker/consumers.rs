//! Durable consumers: made, compared, removed.

use async_nats::jetstream::consumer::{AckPolicy, Config};
use async_nats::jetstream::{consumer, response::Response};
use broker_schema::stream::ConsumerDef;
use futures::TryStreamExt as _;
use serde::Serialize;

use super::error::Cause;
use super::{Broker, BrokerError};

const CONSUMER_NOT_FOUND: u64 = 10014;
const STREAM_NOT_FOUND: u64 = 10059;
/// A work queue has one consumer for each message: another one has these.
const NOT_UNIQUE: [u64; 2] = [10099, 10100];

/// What the server says of one consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerState {
    pub durable: String,
    /// Empty for every subject of the stream.
    pub filter: String,
    /// Nanoseconds since 1970: tells one from a later one of the same name.
    pub created: i128,
    /// Stream sequence of the last message that was delivered.
    pub delivered: u64,
    /// Delivered and not acknowledged, and still to be delivered again.
    pub ack_pending: u64,
    /// Yet to be delivered.
    pub pending: u64,
}

impl From<consumer::Info> for ConsumerState {
    fn from(info: consumer::Info) -> Self {
        Self {
            durable: info.name,
            filter: info.config.filter_subject,
            created: info.created.unix_timestamp_nanos(),
            delivered: info.delivered.stream_sequence,
            ack_pending: info.num_ack_pending as u64,
            pending: info.num_pending,
        }
    }
}

#[derive(Serialize)]
struct Create<'a> {
    stream_name: &'a str,
    config: &'a Config,
    /// Empty: make it, or bring it to this configuration.
    action: &'static str,
}

impl Broker {
    /// Makes a durable consumer or brings it to its definition, and compares
    /// what came of it.
    pub async fn ensure_consumer(&self, def: &ConsumerDef) -> Result<(), BrokerError> {
        let failed = |source: Cause| BrokerError::Consumer {
            operation: "make",
            stream: def.stream.clone(),
            consumer: def.durable.clone(),
            source,
        };
        let wanted = config(def);
        let mut subject = format!("CONSUMER.CREATE.{}.{}", def.stream, def.durable);
        if !def.filter.is_empty() {
            subject = format!("{subject}.{}", def.filter);
        }
        let request = Create {
            stream_name: &def.stream,
            config: &wanted,
            action: "",
        };
        let response: Response<consumer::Info> = self
            .jetstream()
            .request(subject, &request)
            .await
            .map_err(|error| failed(error.into()))?;
        match response {
            Response::Ok(info) => compare(def, &wanted, &info.config),
            Response::Err { error } if error.error_code().0 == STREAM_NOT_FOUND => {
                Err(BrokerError::StreamMissing {
                    stream: def.stream.clone(),
                })
            }
            Response::Err { error } if NOT_UNIQUE.contains(&error.error_code().0) => {
                Err(BrokerError::ConsumerTaken {
                    stream: def.stream.clone(),
                    consumer: def.durable.clone(),
                    filter: def.filter.clone(),
                })
            }
            Response::Err { error } => Err(failed(error.into())),
        }
    }

    /// All consumers of a stream.
    pub async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerState>, BrokerError> {
        let failed = |source: Cause| BrokerError::Stream {
            operation: "list the consumers of",
            stream: stream.to_owned(),
            source,
        };
        self.jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .consumers()
            .map_ok(ConsumerState::from)
            .try_collect()
            .await
            .map_err(|error| failed(error.into()))
    }

    /// How many messages a consumer has not delivered, or not been told to be done with.
    pub async fn consumer_unread(&self, stream: &str, durable: &str) -> Result<u64, BrokerError> {
        let failed = |source: Cause| BrokerError::Consumer {
            operation: "look up",
            stream: stream.to_owned(),
            consumer: durable.to_owned(),
            source,
        };
        let info = self
            .jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .consumer_info(durable)
            .await
            .map_err(|error| failed(error.into()))?;
        Ok(info.num_pending + info.num_ack_pending as u64)
    }

    /// Removes a consumer; false where there was none.
    pub async fn delete_consumer(&self, stream: &str, durable: &str) -> Result<bool, BrokerError> {
        let failed = |source: Cause| BrokerError::Consumer {
            operation: "remove",
            stream: stream.to_owned(),
            consumer: durable.to_owned(),
            source,
        };
        let response: Response<serde::de::IgnoredAny> = self
            .jetstream()
            .request(
                format!("CONSUMER.DELETE.{stream}.{durable}"),
                &std::collections::BTreeMap::<&str, &str>::new(),
            )
            .await
            .map_err(|error| failed(error.into()))?;
        match response {
            Response::Ok(_) => Ok(true),
            Response::Err { error }
                if [CONSUMER_NOT_FOUND, STREAM_NOT_FOUND].contains(&error.error_code().0) =>
            {
                Ok(false)
            }
            Response::Err { error } => Err(failed(error.into())),
        }
    }
}

fn config(def: &ConsumerDef) -> Config {
    Config {
        durable_name: Some(def.durable.clone()),
        name: Some(def.durable.clone()),
        filter_subject: def.filter.clone(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: def.ack_wait,
        max_ack_pending: def.max_ack_pending,
        max_waiting: def.max_waiting,
        inactive_threshold: def.inactive_threshold,
        // Attempts are counted at the claim; this is for what nobody ever settles.
        max_deliver: def.max_deliver,
        ..Config::default()
    }
}

type Show = fn(&Config) -> String;

fn compare(def: &ConsumerDef, wanted: &Config, found: &Config) -> Result<(), BrokerError> {
    let settings: [(&'static str, Show); 7] = [
        ("filter_subject", |c| c.filter_subject.clone()),
        ("ack_policy", |c| format!("{:?}", c.ack_policy)),
        ("ack_wait", |c| format!("{:?}", c.ack_wait)),
        ("max_ack_pending", |c| c.max_ack_pending.to_string()),
        ("max_waiting", |c| c.max_waiting.to_string()),
        ("max_deliver", |c| c.max_deliver.to_string()),
        ("deliver_subject", |c| format!("{:?}", c.deliver_subject)),
    ];
    for (setting, show) in settings {
        let (expected, is) = (show(wanted), show(found));
        if expected != is {
            return Err(BrokerError::ConsumerMismatch {
                consumer: def.durable.clone(),
                setting,
                expected,
                found: is,
            });
        }
    }
    Ok(())
}
