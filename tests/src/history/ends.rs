//! What TERM and RES hold at the end, and what is left on the host.

use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::jetstream::consumer::pull;
use broker_schema::codec::{self, Format};
use broker_schema::{Frame, HEADER_CONTENT_TYPE, ParsedSubject, Terminal};
use futures::StreamExt as _;
use remuda_client::broker::{Broker, recorded_digest};

/// A terminal as TERM holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTerminal {
    pub sequence: u64,
    /// Of the subject, which is what decides who may read it.
    pub tenant: String,
    pub task: String,
    /// As every event has it that names a terminal.
    pub digest: String,
    pub terminal: Terminal,
}

/// A frame as RES holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredFrame {
    pub sequence: u64,
    pub tenant: String,
    pub task: String,
    pub frame: Frame,
}

/// What is there once everything has ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ends {
    /// When this was read, on the histories' clock.
    pub at: u64,
    pub terminals: Vec<StoredTerminal>,
    pub frames: Vec<StoredFrame>,
    /// What of the fleet is still on the host although it has ended, in words; the caller looks.
    pub leftovers: Vec<String>,
}

/// How long a message that is stored may take to come.
const PATIENCE: Duration = Duration::from_secs(30);

impl Ends {
    /// Reads TERM and RES from their beginnings.
    pub async fn read(broker: &Broker) -> anyhow::Result<Self> {
        let mut ends = Self {
            at: super::now(),
            ..Self::default()
        };
        let subjects = broker.subjects().clone();
        let streams = broker.streams().clone();
        for message in stored(broker, &streams.terminals).await? {
            let Some(ParsedSubject::Terminal { tenant, task, .. }) =
                subjects.parse(&message.subject)
            else {
                continue;
            };
            let terminal: Terminal = message.decode()?;
            ends.terminals.push(StoredTerminal {
                sequence: message.sequence,
                tenant: tenant.to_string(),
                task: task.to_string(),
                digest: recorded_digest(&terminal),
                terminal,
            });
        }
        for message in stored(broker, &streams.results).await? {
            let Some(ParsedSubject::Result { tenant, task, .. }) = subjects.parse(&message.subject)
            else {
                continue;
            };
            ends.frames.push(StoredFrame {
                sequence: message.sequence,
                tenant: tenant.to_string(),
                task: task.to_string(),
                frame: message.decode()?,
            });
        }
        Ok(ends)
    }
}

struct Message {
    sequence: u64,
    subject: String,
    format: Format,
    payload: bytes::Bytes,
}

impl Message {
    fn decode<T: serde::de::DeserializeOwned>(&self) -> anyhow::Result<T> {
        codec::decode(&self.payload, self.format)
            .map_err(|error| anyhow::anyhow!("{} cannot be read: {error}", self.subject))
    }
}

async fn stored(broker: &Broker, stream: &str) -> anyhow::Result<Vec<Message>> {
    let failed = || format!("cannot read {stream}");
    let consumer = broker
        .jetstream()
        .create_consumer_on_stream(pull::OrderedConfig::default(), stream)
        .await
        .with_context(failed)?;
    let mut left = consumer.cached_info().num_pending;
    let mut messages = consumer.messages().await.with_context(failed)?;
    let mut found = Vec::new();
    while left > 0 {
        let next = tokio::time::timeout(PATIENCE, messages.next()).await;
        let Some(message) = next.with_context(failed)? else {
            bail!("{stream} ended before all of it was read");
        };
        let message = message.with_context(failed)?;
        let info = message
            .info()
            .map_err(|error| anyhow::anyhow!("{stream}: {error}"))?;
        left = info.pending;
        let sequence = info.stream_sequence;
        let content_type = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(HEADER_CONTENT_TYPE))
            .map(async_nats::HeaderValue::as_str);
        let format = Format::from_content_type(content_type)
            .map_err(|error| anyhow::anyhow!("{}: {error}", message.subject))?;
        found.push(Message {
            sequence,
            subject: message.subject.to_string(),
            format,
            payload: message.payload.clone(),
        });
    }
    Ok(found)
}
