//! What every part of the dispatcher shares, and the effects that more than one of them has.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::codec::Format;
use broker_schema::pool::PoolSpec;
use broker_schema::{
    ErrorCode, HEADER_CODE, HEADER_REASON, HEADER_SUBJECT, HEADER_TASK, HEADER_TENANT, HEADER_TIME,
    PoolId, RequestLimits, SCHEMA_OLDEST, SCHEMA_VERSION, TaskId, TenantId, Terminal, Timestamp,
};
use bytes::Bytes;
use remuda_client::broker::{Broker, BrokerError, Delivery, Gate, Outgoing};
use remuda_lease::LeaseStore;
use remuda_telemetry::{Readiness, TaskGroup, TraceHeaders, failpoint};
use tokio_util::sync::CancellationToken;

use crate::app::{PART_NATS, PART_REDIS};
use crate::credit::Grants;
use crate::error::DispatcherError;
use crate::leader::Leadership;
use crate::metrics::{Code, Metrics};
use crate::options::DispatcherOptions;
use crate::progress::HeldSet;
use crate::tenants::Tenants;

/// How long a terminal or a dead letter is tried before its message waits for another turn.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) broker: Broker,
    pub(crate) lease: LeaseStore,
    pub(crate) options: DispatcherOptions,
    pub(crate) pools: BTreeMap<PoolId, PoolSpec>,
    pub(crate) tenants: Tenants,
    pub(crate) limits: RequestLimits,
    pub(crate) metrics: Metrics,
    pub(crate) readiness: Readiness,
    /// Cancelled once this dispatcher is told to stop: it is never ready again.
    pub(crate) leaving: CancellationToken,
    pub(crate) leadership: Leadership,
    pub(crate) held: HeldSet,
    /// Placements of each pool, for its credit.
    pub(crate) grants: Grants,
    pub(crate) group: TaskGroup,
}

impl Fleet {
    /// Puts a terminal through the gate. Losing is as good as winning: the task has an end.
    pub(crate) async fn end(
        &self,
        terminal: &Terminal,
        format: Format,
        trace: &TraceHeaders,
    ) -> Result<Gate, BrokerError> {
        let put = self.broker.put_terminal(terminal, format, trace, PATIENCE);
        let gate = Box::pin(put).await?;
        failpoint::step(failpoint::dispatcher::ENDED);
        if let (Gate::Won, Some(error)) = (&gate, &terminal.error) {
            tracing::info!(
                task = %terminal.task, tenant = %terminal.tenant, outcome = %terminal.outcome,
                code = %error.code, "task ended without running: {error}"
            );
            self.metrics.rejected.add(1, Code(error.code));
        }
        Ok(gate)
    }

    /// Keeps a message that nobody can act on where people look.
    pub(crate) async fn dead_letter(
        &self,
        lane: (&TenantId, &PoolId),
        message: DeadLetter,
    ) -> Result<(), BrokerError> {
        tracing::warn!(
            tenant = %lane.0, pool = %lane.1, code = %message.code, reason = message.reason,
            "message goes to the dead letters"
        );
        let mut headers = vec![
            (HEADER_CODE, message.code.to_string()),
            (HEADER_REASON, one_line(&message.reason)),
            (HEADER_SUBJECT, one_line(&message.subject)),
            (HEADER_TENANT, lane.0.to_string()),
            (HEADER_TIME, Timestamp::now().0.to_string()),
        ];
        headers.extend(message.task.map(|task| (HEADER_TASK, task.to_string())));
        let outgoing = Outgoing {
            subject: self.broker.subjects().dead_letter(lane.0, lane.1),
            message_id: Some(message.id),
            format: message.format,
            payload: message.payload,
            trace: message.trace,
            headers,
        };
        self.broker.publish(outgoing, PATIENCE).await?;
        failpoint::step(failpoint::dispatcher::DEAD_LETTERED);
        self.metrics.dead_lettered.add(1, Code(message.code));
        Ok(())
    }

    /// Takes a new incarnation where Redis has none that can be relied on; whoever leads the fleet
    /// publishes the pools.
    pub(crate) async fn bootstrap(&self) -> Result<(), DispatcherError> {
        if self
            .lease
            .incarnation()
            .await
            .map_err(DispatcherError::Lease)?
            .is_none()
        {
            let candidate = self
                .broker
                .next_incarnation()
                .await
                .map_err(DispatcherError::Incarnation)?;
            let incarnation = self
                .lease
                .install_incarnation(candidate)
                .await
                .map_err(DispatcherError::Lease)?;
            tracing::info!(
                incarnation,
                "redis is new, was flushed or was started again: a new incarnation is in force"
            );
        }
        if !self.leadership.leads_fleet() {
            return Ok(());
        }
        self.lease
            .set_schemas(SCHEMA_OLDEST..=SCHEMA_VERSION)
            .await
            .map_err(DispatcherError::Lease)?;
        let stored = self.lease.pools().await.map_err(DispatcherError::Pools)?;
        let mut wanted = self.options.pools.clone();
        wanted.sort_by(|a, b| a.name.cmp(&b.name));
        if stored != wanted {
            self.lease
                .set_pools(&wanted)
                .await
                .map_err(DispatcherError::Pools)?;
        }
        Ok(())
    }

    /// Whether the servers can be reached, told once when it changes.
    pub(crate) fn note_servers(&self, redis: Result<(), &remuda_lease::LeaseError>) {
        let before = self.readiness.missing();
        let nats = self.broker.connected();
        if !nats && !before.contains(&PART_NATS) {
            tracing::warn!(
                url = self.broker.url(),
                "nats-server cannot be reached: start it, or mend the network; trying again"
            );
        }
        if let Err(error) = redis
            && !before.contains(&PART_REDIS)
        {
            tracing::warn!(
                error = %remuda_telemetry::Chain(error),
                "redis cannot be used: start it, or mend the network; trying again"
            );
        }
        self.readiness
            .set(PART_NATS, nats && !self.leaving.is_cancelled());
        self.readiness.set(PART_REDIS, redis.is_ok());
    }
}

/// A message for the DLQ.
#[derive(Debug)]
pub(crate) struct DeadLetter {
    pub(crate) id: String,
    pub(crate) code: ErrorCode,
    pub(crate) reason: String,
    /// Where it was published to.
    pub(crate) subject: String,
    /// Where it could be read so far.
    pub(crate) task: Option<TaskId>,
    pub(crate) format: Format,
    pub(crate) payload: Bytes,
    pub(crate) trace: TraceHeaders,
}

impl DeadLetter {
    /// What was delivered, `kind` (`req`, `run`) telling from which stream: a repeat is one letter.
    pub(crate) fn of(
        kind: &str,
        delivery: &Delivery,
        task: Option<TaskId>,
        code: ErrorCode,
        reason: String,
    ) -> Self {
        Self {
            id: format!("{kind}/{}", delivery.stream_sequence),
            code,
            reason,
            subject: delivery.subject.clone(),
            task,
            format: delivery.format().unwrap_or_default(),
            payload: delivery.payload.clone(),
            trace: delivery.trace(),
        }
    }
}

/// A header holds one line, and not a long one.
fn one_line(text: &str) -> String {
    text.chars()
        .take(500)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
