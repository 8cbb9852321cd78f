//! Cancellation: asked for on `cancel.<tenant>`, decided by the gate.
//!
//! The flag in Redis comes first: whatever is claimed or renewed later sees it. A broadcast makes
//! it fast: every dispatcher drops what it holds, every worker ends what it runs.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{
    CancelCause, CancelNotice, CancelRequest, CancelTarget, ControlMessage, ErrorCode, ErrorInfo,
    GroupId, Outcome, PoolId, RunId, TaskId, TaskRequest, TenantId, Terminal, Timestamp,
};
use futures::StreamExt as _;
use remuda_client::broker::{BrokerError, Gate};
use remuda_lease::{CancelState, LeaseError, Vote};
use remuda_telemetry::{Chain, TraceHeaders, failpoint};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::dispatch::Event;
use crate::fleet::Fleet;
use crate::place::format_of;
use crate::registry::tell;
use crate::terminals::Address;

/// Cancellations that are seen to at once.
const AT_ONCE: usize = 32;
/// How long the gate may take before the answer is that it will decide.
const GATE_PATIENCE: Duration = Duration::from_secs(3);
/// How long other dispatchers may take to say that they hold a task.
const OTHERS_PATIENCE: Duration = Duration::from_millis(500);

/// The answer to whoever asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<ErrorInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It has ended as cancelled.
    Cancelled,
    /// It is being ended: the terminal will tell who was first. What is said of a group and a run.
    Cancelling,
    /// It had ended otherwise.
    Finished,
    /// Nobody here knows it. It will not be started.
    Unknown,
}

pub(crate) async fn run(
    fleet: Arc<Fleet>,
    mut requests: async_nats::Subscriber,
    events: mpsc::Sender<Event>,
) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let message = tokio::select! {
            () = fleet.group.token().cancelled() => return,
            message = requests.next() => message,
        };
        let Some(message) = message else { return };
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let (shared, events) = (fleet.clone(), events.clone());
        fleet.group.spawn("cancel", async move {
            answer(&shared, &message, &events).await;
            drop(slot);
        });
    }
}

async fn answer(fleet: &Fleet, message: &async_nats::Message, events: &mpsc::Sender<Event>) {
    let format = format_of(message.headers.as_ref());
    let read = codec::decode::<CancelRequest>(&message.payload, format)
        .and_then(|request| check_tenant(fleet, &message.subject, request));
    let answer = match read {
        Ok(request) => match cancel(fleet, &request, events).await {
            Ok(state) => Answer { state, error: None },
            Err(error) => {
                tracing::warn!(tenant = %request.tenant, %error, "cancellation failed");
                Answer {
                    state: State::Unknown,
                    error: Some(error),
                }
            }
        },
        Err(error) => Answer {
            state: State::Unknown,
            error: Some(error),
        },
    };
    reply(fleet, message, &answer, format).await;
}

async fn reply(fleet: &Fleet, message: &async_nats::Message, answer: &Answer, format: Format) {
    // Anything else than an inbox would let a tenant publish where it may not.
    let Some(reply) = message.reply.as_ref().filter(|r| r.starts_with("_INBOX")) else {
        return;
    };
    let payload = match codec::encode(answer, format) {
        Ok(payload) => payload,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "an answer cannot be written");
            return;
        }
    };
    let nats = fleet.broker.nats();
    if let Err(error) = nats.publish(reply.clone(), payload.into()).await {
        tracing::debug!(error = %Chain(&error), "a cancellation was not answered");
    }
}

fn check_tenant(
    fleet: &Fleet,
    subject: &str,
    request: CancelRequest,
) -> Result<CancelRequest, ErrorInfo> {
    if fleet.broker.subjects().cancel(&request.tenant) == subject {
        return Ok(request);
    }
    Err(ErrorInfo::new(
        ErrorCode::SubjectMismatch,
        format!(
            "is {}, but the request was sent to {subject}",
            request.tenant
        ),
    )
    .at("tenant"))
}

fn unreachable(error: &dyn std::error::Error, code: ErrorCode) -> ErrorInfo {
    ErrorInfo::new(code, format!("{}, ask again", Chain(error)))
}

async fn cancel(
    fleet: &Fleet,
    request: &CancelRequest,
    events: &mpsc::Sender<Event>,
) -> Result<State, ErrorInfo> {
    let tenant = &request.tenant;
    match request.target()? {
        CancelTarget::Task { task, run } => {
            let one = One {
                fleet,
                tenant,
                task,
                run: run.as_ref(),
            };
            one.cancel(events).await
        }
        CancelTarget::Group { run, group } => {
            many(fleet, tenant, &run, Some(&group), CancelCause::Group).await
        }
        CancelTarget::Run { run } => many(fleet, tenant, &run, None, CancelCause::Run).await,
    }
}

/// A run, or a group of it. Its tasks' terminals tell how each of them ended.
async fn many(
    fleet: &Fleet,
    tenant: &TenantId,
    run: &RunId,
    group: Option<&GroupId>,
    cause: CancelCause,
) -> Result<State, ErrorInfo> {
    let stopped = fleet.lease.stop(tenant, run, group, cause).await;
    stopped.map_err(|error: LeaseError| unreachable(&error, error.code()))?;
    tracing::info!(%tenant, %run, group = group.map(GroupId::as_str), "cancelled");
    let target = match group {
        Some(group) => CancelTarget::Group {
            run: run.clone(),
            group: group.clone(),
        },
        None => CancelTarget::Run { run: run.clone() },
    };
    let notice = CancelNotice {
        tenant: tenant.clone(),
        target,
        cause,
    };
    broadcast(fleet, &notice, None).await;
    Ok(State::Cancelling)
}

/// One task.
struct One<'a> {
    fleet: &'a Fleet,
    tenant: &'a TenantId,
    task: TaskId,
    run: Option<&'a RunId>,
}

impl One<'_> {
    async fn cancel(&self, events: &mpsc::Sender<Event>) -> Result<State, ErrorInfo> {
        let (fleet, task) = (self.fleet, self.task);
        // The flag first: a claim that comes later sees it.
        let state = fleet
            .lease
            .cancel(self.tenant, task)
            .await
            .map_err(|error| unreachable(&error, error.code()))?;
        failpoint::step(failpoint::dispatcher::CANCEL_FLAGGED);
        let failed = |error: BrokerError| unreachable(&error, error.code());
        match state {
            CancelState::Finished => {
                // Finished comes after the terminal, which says how.
                let stored = self.stored().await.map_err(failed)?;
                return Ok(stored.map_or(State::Finished, ended));
            }
            CancelState::Placed { sandbox } => {
                let hint = ControlMessage::CancelTask {
                    tenant: self.tenant.clone(),
                    task,
                };
                tell(fleet, &sandbox.worker, &hint).await;
                return Ok(State::Cancelling);
            }
            CancelState::Unplaced => {}
        }
        let notice = CancelNotice {
            tenant: self.tenant.clone(),
            target: CancelTarget::Task {
                task,
                run: self.run.cloned(),
            },
            cause: CancelCause::Asked,
        };
        if let Some(state) = dropped(&notice, events).await {
            if state == State::Cancelling {
                // The claim that was under way may have met the flag, and ended it.
                if let Some(outcome) = self.stored().await.map_err(failed)? {
                    return Ok(ended(outcome));
                }
                // It may just have been placed.
                broadcast(fleet, &notice, None).await;
            }
            return Ok(state);
        }
        let Some(run) = self.run else {
            // Another dispatcher may hold it.
            return Ok(ask_others(fleet, &notice).await);
        };
        let state = self.write(run).await.map_err(failed)?;
        // A session's task may run on a worker that has not said so: all are told.
        broadcast(fleet, &notice, None).await;
        Ok(state)
    }

    async fn stored(&self) -> Result<Option<Outcome>, BrokerError> {
        let Some(run) = self.run else {
            return Ok(None);
        };
        let broker = &self.fleet.broker;
        let stored = broker.terminal_of(self.tenant, run, self.task).await?;
        Ok(stored.map(|terminal| terminal.outcome))
    }

    /// The run is known, so the gate can be asked at once.
    async fn write(&self, run: &RunId) -> Result<State, BrokerError> {
        if let Some(outcome) = self.stored().await? {
            return Ok(ended(outcome));
        }
        let Ok(pool) = PoolId::new("unknown") else {
            return Ok(State::Unknown);
        };
        let address = Address {
            tenant: self.tenant.clone(),
            run: run.clone(),
            task: self.task,
            pool,
            group: None,
            queued: Timestamp::now(),
        };
        let terminal = address.cancelled("", CancelCause::Asked);
        let format = Format::MessagePack;
        let trace = TraceHeaders::default();
        Ok(match self.fleet.end(&terminal, format, &trace).await? {
            Gate::Won => State::Cancelled,
            Gate::Lost(terminal) => ended(terminal.outcome),
        })
    }
}

fn ended(outcome: Outcome) -> State {
    match outcome {
        Outcome::Cancelled => State::Cancelled,
        _ => State::Finished,
    }
}

/// Ends what is held here; how it ended, where something was.
async fn dropped(notice: &CancelNotice, events: &mpsc::Sender<Event>) -> Option<State> {
    let (found, heard) = oneshot::channel();
    let event = Event::Cancel {
        notice: notice.clone(),
        found,
    };
    events.send(event).await.ok()?;
    let heard = heard.await.ok()?.into_iter().next()?;
    // The gate has the last word: a request may be a repeat of one that has ended.
    match tokio::time::timeout(GATE_PATIENCE, heard).await {
        Ok(Ok(outcome)) => Some(ended(outcome)),
        _ => Some(State::Cancelling),
    }
}

/// Asks all dispatchers to end a task that they hold.
async fn ask_others(fleet: &Fleet, notice: &CancelNotice) -> State {
    let nats = fleet.broker.nats();
    let inbox = nats.new_inbox();
    let Ok(mut answers) = nats.subscribe(inbox.clone()).await else {
        return State::Unknown;
    };
    broadcast(fleet, notice, Some(inbox)).await;
    let first = async {
        while let Some(message) = answers.next().await {
            let answer = codec::decode::<Answer>(&message.payload, Format::MessagePack);
            if let Ok(answer) = answer
                && answer.state != State::Unknown
            {
                return answer.state;
            }
        }
        State::Unknown
    };
    let answered = tokio::time::timeout(OTHERS_PATIENCE, first).await;
    answered.unwrap_or(State::Unknown)
}

/// Tells every dispatcher and every worker. Losing it costs time and nothing else.
pub(crate) async fn broadcast(fleet: &Fleet, notice: &CancelNotice, reply: Option<String>) {
    let payload = match codec::encode(notice, Format::MessagePack) {
        Ok(payload) => payload,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "a hint cannot be written");
            return;
        }
    };
    let (nats, subject) = (fleet.broker.nats(), fleet.broker.subjects().cancel_hint());
    let sent = match reply {
        Some(reply) => {
            nats.publish_with_reply(subject, reply, payload.into())
                .await
        }
        None => nats.publish(subject, payload.into()).await,
    };
    if let Err(error) = sent {
        tracing::debug!(error = %Chain(&error), "a cancellation was not told on");
    }
}

/// Hears what was cancelled elsewhere, and ends what of it is held here.
pub(crate) async fn listen(
    fleet: Arc<Fleet>,
    mut notices: async_nats::Subscriber,
    events: mpsc::Sender<Event>,
) {
    loop {
        let message = tokio::select! {
            () = fleet.group.token().cancelled() => return,
            message = notices.next() => message,
        };
        let Some(message) = message else { return };
        let notice = codec::decode::<CancelNotice>(&message.payload, Format::MessagePack)
            .or_else(|_| codec::decode::<CancelNotice>(&message.payload, Format::Json));
        let notice = match notice {
            Ok(notice) => notice,
            Err(error) => {
                tracing::warn!(%error, "a cancellation that was told on cannot be read");
                continue;
            }
        };
        let (shared, events) = (fleet.clone(), events.clone());
        fleet.group.spawn("cancelled elsewhere", async move {
            if let Some(state) = dropped(&notice, &events).await {
                let answer = Answer { state, error: None };
                reply(&shared, &message, &answer, Format::MessagePack).await;
            }
        });
    }
}

/// Counts the result of a task for its group, where the group asks for a number of them: told
/// again it counts once.
pub(crate) async fn count(fleet: &Fleet, request: &TaskRequest, terminal: &Terminal) {
    let (Some(group), Some(min_valid)) = (&request.group, request.min_valid) else {
        return;
    };
    if !terminal.counts_for_group() {
        return;
    }
    let vote = Vote {
        run: &request.run,
        group,
        min_valid,
    };
    match fleet.lease.vote(&request.tenant, request.id, vote).await {
        Ok(true) => {
            let notice = CancelNotice {
                tenant: request.tenant.clone(),
                target: vote.into(),
                cause: CancelCause::Enough { valid: min_valid },
            };
            broadcast(fleet, &notice, None).await;
        }
        Ok(false) => {}
        Err(error) => tracing::debug!(error = %Chain(&error), "a result is not counted"),
    }
}
