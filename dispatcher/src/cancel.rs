//! Cancellation: asked for on `cancel.<tenant>`, decided by the gate.

use std::sync::Arc;

use broker_schema::codec::{self};
use broker_schema::{
    CancelRequest, ControlMessage, ErrorCode, ErrorInfo, Outcome, PoolId, RunId, TenantId,
    Timestamp,
};
use futures::StreamExt as _;
use remuda_client::broker::Gate;
use remuda_lease::CancelState;
use remuda_telemetry::{Chain, TraceHeaders};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::dispatch::Event;
use crate::fleet::Fleet;
use crate::place::format_of;
use crate::registry::tell;
use crate::terminals::Address;

/// Cancellations that are seen to at once.
const AT_ONCE: usize = 32;

/// The answer to whoever asked.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Answer {
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It has ended as cancelled.
    Cancelled,
    /// It is running; its worker ends it.
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
                tracing::warn!(task = %request.task, tenant = %request.tenant, %error,
                    "cancellation failed");
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
    // Anything else than an inbox would let a tenant publish where it may not.
    let Some(reply) = message.reply.as_ref().filter(|r| r.starts_with("_INBOX")) else {
        return;
    };
    let payload = match codec::encode(&answer, format) {
        Ok(payload) => payload,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "an answer cannot be written");
            return;
        }
    };
    if let Err(error) = fleet
        .broker
        .nats()
        .publish(reply.clone(), payload.into())
        .await
    {
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

async fn cancel(
    fleet: &Fleet,
    request: &CancelRequest,
    events: &mpsc::Sender<Event>,
) -> Result<State, ErrorInfo> {
    let unreachable = |error: &dyn std::error::Error, code| {
        ErrorInfo::new(code, format!("{}, ask again", Chain(error)))
    };
    // The flag first: a claim that comes later sees it.
    let state = fleet
        .lease
        .cancel(&request.tenant, request.task)
        .await
        .map_err(|error| unreachable(&error, error.code()))?;
    match state {
        CancelState::Finished => return Ok(State::Finished),
        CancelState::Placed { sandbox } => {
            tell(
                fleet,
                &sandbox.worker,
                &ControlMessage::Cancel(request.task),
            )
            .await;
            return Ok(State::Cancelling);
        }
        CancelState::Unplaced => {}
    }
    let (found, queued) = oneshot::channel();
    let event = Event::Cancel {
        tenant: request.tenant.clone(),
        task: request.task,
        found,
    };
    let queued_here = events.send(event).await.is_ok() && queued.await.unwrap_or(false);
    if queued_here {
        return Ok(State::Cancelled);
    }
    let Some(run) = &request.run else {
        return Ok(State::Unknown);
    };
    write(fleet, &request.tenant, run, request)
        .await
        .map_err(|error| unreachable(&error, error.code()))
}

/// The run is known, so the gate can be asked at once. A session's task may run on a worker that
/// has not said so: all are told.
async fn write(
    fleet: &Fleet,
    tenant: &TenantId,
    run: &RunId,
    request: &CancelRequest,
) -> Result<State, remuda_client::broker::BrokerError> {
    let ended = |outcome| match outcome {
        Outcome::Cancelled => State::Cancelled,
        _ => State::Finished,
    };
    let stored = fleet.broker.terminal_of(tenant, run, request.task).await?;
    if let Some(terminal) = stored {
        return Ok(ended(terminal.outcome));
    }
    let Ok(pool) = PoolId::new("unknown") else {
        return Ok(State::Unknown);
    };
    let address = Address {
        tenant: tenant.clone(),
        run: run.clone(),
        task: request.task,
        pool,
        group: None,
        queued: Timestamp::now(),
    };
    let terminal = address.cancelled("");
    let gate = fleet
        .end(
            &terminal,
            codec::Format::MessagePack,
            &TraceHeaders::default(),
        )
        .await?;
    let state = match gate {
        Gate::Won => State::Cancelled,
        Gate::Lost(terminal) => ended(terminal.outcome),
    };
    match fleet.lease.workers().await {
        Ok(workers) => {
            for worker in workers.iter().filter(|worker| worker.alive) {
                let message = ControlMessage::Cancel(request.task);
                tell(fleet, &worker.record.worker, &message).await;
            }
        }
        Err(error) => tracing::debug!(error = %Chain(&error), "workers were not told"),
    }
    Ok(state)
}
