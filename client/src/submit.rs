//! Submitting: checked here, accepted by the stream.

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::event::LaneHint;
use broker_schema::{ErrorCode, ErrorInfo, Invalid, RunId, TaskId, TaskRequest, Terminal};
use bytes::Bytes;
use remuda_telemetry::history::Event;
use remuda_telemetry::{Chain, TraceHeaders, propagate};
use tracing::Instrument as _;

use crate::broker::{BrokerError, Outgoing, PubAck};
use crate::client::Client;
use crate::error::ClientError;
use crate::track::Tracked;

/// A task that was accepted: the stream has it.
#[derive(Debug)]
pub struct Submitted {
    tracked: Tracked,
    ack: PubAck,
}

impl Submitted {
    pub fn task(&self) -> TaskId {
        self.tracked.task()
    }

    /// SHA-256 of the request's bytes, hex: what its terminal names.
    pub fn request_digest(&self) -> &str {
        self.tracked.digest()
    }

    /// Whether the same request was accepted before, and where it stands.
    pub fn ack(&self) -> PubAck {
        self.ack
    }

    /// Waits for the terminal: by its live copy, else by looking for it. The
    /// request is published again, under its id, for as long as there is none.
    /// Waits without a bound of its own; dropping the future loses nothing.
    pub async fn terminal(&mut self) -> Result<Terminal, ClientError> {
        let span = tracing::info_span!("terminal", task = %self.task());
        // Waiting belongs to the trace of what is waited for, whoever waits.
        propagate::set_parent(&span, self.tracked.trace());
        self.tracked.terminal().instrument(span).await
    }
}

impl Client {
    /// Publishes a task and waits until it is accepted.
    #[tracing::instrument(skip_all, fields(task = %request.id, pool = %request.pool))]
    pub async fn submit(&self, request: TaskRequest) -> Result<Submitted, ClientError> {
        let payload = self.check(&request)?;
        let task = request.id;
        let digest = sha256_hex(&payload);
        if !self.shared.outbox.admit(task, &digest) {
            return Err(ClientError::IdConflict { task });
        }
        let broker = &self.shared.broker;
        let outgoing = Outgoing {
            subject: broker.subjects().request(&request.tenant, &request.pool),
            message_id: Some(request.message_id()),
            format: Format::MessagePack,
            payload,
            trace: TraceHeaders::current(),
            headers: Vec::new(),
        };
        let mut tracked =
            Tracked::listen(self, request.run.clone(), task, digest, outgoing).await?;
        if self.shared.outbox.first_in_lane(&request.pool) {
            self.announce_lane(&request).await;
        }
        self.note_submitted(&request.run, task, tracked.digest());
        let ack = tracked.publish(self.shared.patience).await?;
        self.note_accepted(task, ack);
        if ack.duplicate {
            tracked.look_now();
        }
        Ok(Submitted { tracked, ack })
    }

    /// Submits a task and waits for its terminal.
    pub async fn run(&self, request: TaskRequest) -> Result<Terminal, ClientError> {
        self.submit(request).await?.terminal().await
    }

    /// Everything that can be known to be wrong before anybody else sees the
    /// request; its bytes otherwise.
    pub(crate) fn check(&self, request: &TaskRequest) -> Result<Bytes, ClientError> {
        let task = request.id;
        let mut problems = request
            .validate(&self.shared.limits)
            .err()
            .map_or_else(Vec::new, |invalid| invalid.0);
        if request.tenant != self.shared.tenant {
            problems.push(
                ErrorInfo::new(
                    ErrorCode::SubjectMismatch,
                    format!(
                        "is {:?}, this client submits for {:?}",
                        request.tenant, self.shared.tenant
                    ),
                )
                .at("tenant"),
            );
        }
        if !problems.is_empty() {
            return Err(ClientError::Invalid {
                task,
                source: Invalid(problems),
            });
        }
        let payload =
            codec::encode(request, Format::MessagePack).map_err(|source| ClientError::Submit {
                task,
                source: BrokerError::Encode {
                    subject: "a request".to_owned(),
                    source,
                },
            })?;
        let limit = self.request_limit();
        if payload.len() > limit {
            return Err(ClientError::TooLarge {
                task,
                size: payload.len(),
                limit,
            });
        }
        Ok(payload.into())
    }

    /// A request is about to be published.
    pub(crate) fn note_submitted(&self, run: &RunId, task: TaskId, digest: &str) {
        self.shared.history.record(|| Event::Submitted {
            tenant: self.shared.tenant.to_string(),
            run: run.to_string(),
            task: task.to_string(),
            request_digest: digest.to_owned(),
        });
    }

    /// Its PubAck came.
    pub(crate) fn note_accepted(&self, task: TaskId, ack: PubAck) {
        self.shared.history.record(|| Event::Accepted {
            tenant: self.shared.tenant.to_string(),
            task: task.to_string(),
            sequence: ack.sequence,
            duplicate: ack.duplicate,
        });
    }

    /// A hint: without it the dispatcher finds the lane a moment later.
    async fn announce_lane(&self, request: &TaskRequest) {
        let broker = &self.shared.broker;
        let hint = LaneHint {
            tenant: request.tenant.clone(),
            pool: request.pool.clone(),
        };
        let Ok(payload) = codec::encode(&hint, Format::MessagePack) else {
            return;
        };
        if let Err(error) = broker
            .nats()
            .publish(broker.subjects().lane_hint(), payload.into())
            .await
        {
            tracing::debug!(error = %Chain(&error), "lane was not announced");
        }
    }
}
