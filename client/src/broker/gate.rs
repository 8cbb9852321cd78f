//! The terminal gate: TERM keeps the first terminal of a task.

use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::DirectGetErrorKind;
use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::{ErrorInfo, RunId, TaskId, TenantId, Terminal};
use bytes::Bytes;
use remuda_telemetry::TraceHeaders;
use remuda_telemetry::history::{self, Event};
use tokio::time::Instant;

use super::error::Cause;
use super::publish::{Fate, Pauses, Ready};
use super::{Broker, BrokerError, Outgoing, format_of};

/// By which histories name a terminal: the same whatever format it travels in.
pub fn recorded_digest(terminal: &Terminal) -> String {
    codec::encode(terminal, Format::MessagePack)
        .map(|bytes| sha256_hex(&bytes))
        .unwrap_or_default()
}

/// Who was first at the gate.
#[derive(Debug, Clone, PartialEq)]
pub enum Gate {
    /// This terminal is the task's, now and for good.
    Won,
    /// Another one is: this.
    Lost(Box<Terminal>),
}

/// A terminal as TERM holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTerminal {
    pub sequence: u64,
    pub terminal: Terminal,
    payload: Bytes,
}

impl Broker {
    /// Puts a terminal through the gate. Safe to repeat: the same terminal
    /// wins again where it has won before.
    pub async fn put_terminal(
        &self,
        terminal: &Terminal,
        format: Format,
        trace: &TraceHeaders,
        patience: Duration,
    ) -> Result<Gate, BrokerError> {
        let gate = self.pass(terminal, format, trace, patience).await;
        history::record(|| Event::TerminalPut {
            tenant: terminal.tenant.to_string(),
            task: terminal.task.to_string(),
            attempt: terminal.attempt,
            outcome: terminal.outcome.to_string(),
            digest: recorded_digest(terminal),
            gate: match &gate {
                Ok(Gate::Won) => history::Gate::Won,
                Ok(Gate::Lost(_)) => history::Gate::Lost,
                Err(_) => history::Gate::Unknown,
            },
        });
        gate
    }

    async fn pass(
        &self,
        terminal: &Terminal,
        format: Format,
        trace: &TraceHeaders,
        patience: Duration,
    ) -> Result<Gate, BrokerError> {
        let subject = self
            .subjects()
            .terminal(&terminal.tenant, &terminal.run, terminal.task);
        let payload: Bytes = codec::encode(terminal, format)
            .map_err(|source| BrokerError::Encode {
                subject: subject.clone(),
                source,
            })?
            .into();
        let ready = Ready::of(&Outgoing {
            subject: subject.clone(),
            // The content is part of the id: two writers never share one, or
            // the loser would take the winner's "duplicate" for its own.
            message_id: Some(format!(
                "{}/{}/terminal/{}",
                terminal.tenant,
                terminal.task,
                sha256_hex(&payload)
            )),
            format,
            payload: payload.clone(),
            trace: trace.clone(),
            headers: Vec::new(),
        })?;
        let since = Instant::now();
        let deadline = since + patience;
        let mut pauses = Pauses::new(deadline);
        loop {
            let Err(fate) = self.attempt(&ready, deadline).await else {
                return Ok(Gate::Won);
            };
            if matches!(fate, Fate::Full(_)) {
                // The subject is taken, perhaps by an earlier try of ours; or
                // nobody is there and it is the stream that is full.
                match self
                    .stored_terminal(&terminal.tenant, &terminal.run, terminal.task)
                    .await
                {
                    Ok(Some(stored)) if stored.payload == payload => return Ok(Gate::Won),
                    Ok(Some(stored)) => return Ok(Gate::Lost(Box::new(stored.terminal))),
                    Ok(None) => {}
                    Err(error) if error.retryable() => {
                        tracing::debug!(%subject, %error, "reading back the terminal failed");
                    }
                    Err(error) => return Err(error),
                }
            }
            if !fate.passes() || !pauses.pause().await {
                return Err(fate.into_error(&subject, payload.len(), since.elapsed()));
            }
        }
    }

    /// The task's terminal, where it has one.
    pub async fn terminal_of(
        &self,
        tenant: &TenantId,
        run: &RunId,
        task: TaskId,
    ) -> Result<Option<Terminal>, BrokerError> {
        let stored = self.stored_terminal(tenant, run, task).await?;
        Ok(stored.map(|stored| stored.terminal))
    }

    /// The task's terminal with its place in TERM.
    pub async fn stored_terminal(
        &self,
        tenant: &TenantId,
        run: &RunId,
        task: TaskId,
    ) -> Result<Option<StoredTerminal>, BrokerError> {
        let subject = self.subjects().terminal(tenant, run, task);
        let Some(message) = self.first_at_gate(&subject).await? else {
            return Ok(None);
        };
        let terminal =
            read_terminal(&message).map_err(|info| BrokerError::Unreadable { subject, info })?;
        Ok(Some(StoredTerminal {
            sequence: message.sequence,
            terminal,
            payload: message.payload,
        }))
    }

    /// What stands in TERM for a task and is no terminal: nobody can read it, and nothing else
    /// can be stored there. Its sequence, its bytes, and what is wrong with them.
    pub async fn unreadable_terminal(
        &self,
        tenant: &TenantId,
        run: &RunId,
        task: TaskId,
    ) -> Result<Option<(u64, Bytes, ErrorInfo)>, BrokerError> {
        let subject = self.subjects().terminal(tenant, run, task);
        let Some(message) = self.first_at_gate(&subject).await? else {
            return Ok(None);
        };
        let info = read_terminal(&message).err();
        Ok(info.map(|info| (message.sequence, message.payload, info)))
    }

    async fn first_at_gate(&self, subject: &str) -> Result<Option<StreamMessage>, BrokerError> {
        let stream = &self.streams().terminals;
        let failed = |source: Cause| BrokerError::Read {
            stream: stream.clone(),
            subject: subject.to_owned(),
            source,
        };
        let got = self
            .jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .direct_get_last_for_subject(subject)
            .await;
        match got {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// A number that was never given out before, however often Redis forgets:
    /// the sequence of a stream.
    pub async fn next_incarnation(&self) -> Result<u32, BrokerError> {
        let ack = self
            .publish(
                Outgoing {
                    subject: self.subjects().incarnation(),
                    ..Outgoing::default()
                },
                Duration::from_secs(10),
            )
            .await?;
        u32::try_from(ack.sequence).map_err(|_| BrokerError::IncarnationsExhausted {
            sequence: ack.sequence,
        })
    }
}

fn read_terminal(message: &StreamMessage) -> Result<Terminal, ErrorInfo> {
    format_of(Some(&message.headers)).and_then(|format| codec::decode(&message.payload, format))
}
