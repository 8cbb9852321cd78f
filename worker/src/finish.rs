//! The end of a task here: terminal through the gate, then the message, then the lease. Or back
//! to the dispatcher.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{
    Attribution, Epoch, ErrorCode, ErrorInfo, HEADER_DIGEST, Outcome, SandboxId, TaskId, TenantId,
    Terminal, Times,
};
use broker_schema::{Placement, Timestamp};
use remuda_client::broker::{Delivery, Gate, Outgoing};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, TraceHeaders, failpoint};

use crate::ballot::Ballot;
use crate::execute::Ran;
use crate::farewell::Farewell;
use crate::fetch::farewell_of;
use crate::jobs::JobKey;
use crate::metrics::AttemptEnd;
use crate::outcome::{Finding, expired};
use crate::shared::{Job, Shared};

/// A request that failed here waits a little, more with every attempt, and not in step with others.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The terminal of an attempt.
pub(crate) fn terminal(
    placement: &Placement,
    finding: Finding,
    ran: Option<Ran>,
    kept: bool,
) -> Terminal {
    let task = &placement.task;
    let mut terminal = Terminal {
        task: task.id,
        tenant: task.tenant.clone(),
        run: task.run.clone(),
        pool: task.pool.clone(),
        group: task.group.clone(),
        request_digest: placement.request_digest.clone(),
        attempt: placement.attempt,
        outcome: finding.outcome,
        attribution: finding.attribution,
        evidence: finding.evidence,
        exit: None,
        error: finding.error,
        steps: Vec::new(),
        frames: 0,
        usage: broker_schema::Usage::default(),
        times: Times {
            queued: task.submitted_at,
            dispatched: Some(placement.dispatched_at),
            started: None,
            finished: Timestamp::now(),
        },
        sandbox: Some(placement.sandbox.clone()),
        kept,
    };
    if let Some(ran) = ran {
        terminal.exit = ran.exit;
        terminal.steps = ran.steps;
        terminal.frames = ran.frames;
        terminal.usage = ran.usage;
        terminal.times.started = Some(ran.started);
    }
    terminal
}

/// Puts a job's terminal through the gate and settles its message. True where it won.
///
/// None where it could not be stored: the message comes again, and with it another chance.
pub(crate) async fn conclude(
    shared: &Shared,
    job: Job,
    terminal: &Terminal,
    trace: &TraceHeaders,
) -> Option<bool> {
    let won = put(shared, terminal, job.format, trace).await?;
    remove_later(shared, &job.placement.task);
    failpoint::step(failpoint::worker::TERMINAL_STORED);
    let took = job.received.elapsed();
    job.settle();
    failpoint::step(failpoint::worker::SETTLED);
    shared.metrics.attempt_ended(
        if won {
            AttemptEnd::Outcome(terminal.outcome)
        } else {
            AttemptEnd::Superseded
        },
        took,
    );
    Some(won)
}

/// Notes when the results of a task may go that are not to be kept. Nobody waits for it: where it
/// fails they stay for as long as all others.
fn remove_later(shared: &Shared, task: &broker_schema::TaskRequest) {
    let Some(kept) = task.results_kept_for() else {
        return;
    };
    let leases = shared.leases.clone();
    let (tenant, run, id) = (task.tenant.clone(), task.run.clone(), task.id);
    shared.holders.spawn("removal note", async move {
        if let Err(error) = leases.remove_later(&tenant, &run, id, kept).await {
            tracing::warn!(task = %id, error = %Chain(&error), "results will not be removed early");
        }
    });
}

async fn put(
    shared: &Shared,
    terminal: &Terminal,
    format: Format,
    trace: &TraceHeaders,
) -> Option<bool> {
    let patience = shared.options.timings.publish;
    let putting = shared
        .broker
        .put_terminal(terminal, format, trace, patience);
    match Box::pin(putting).await {
        Ok(Gate::Won) => Some(true),
        Ok(Gate::Lost(first)) => {
            tracing::info!(
                task = %terminal.task, tenant = %terminal.tenant, ours = %terminal.outcome,
                stored = %first.outcome, "another terminal came first, ours is dropped"
            );
            Some(false)
        }
        Err(error) => {
            tracing::error!(
                task = %terminal.task, tenant = %terminal.tenant, error = %Chain(&error),
                "a terminal cannot be stored, the task will be delivered again"
            );
            None
        }
    }
}

/// Answers for a message that never became a job, and settles it.
pub(crate) async fn answer(shared: Arc<Shared>, delivery: Delivery, terminal: Terminal) {
    // Where even the format is not known the default is as good as any.
    let format = delivery.format().unwrap_or_default();
    let trace = delivery.trace();
    if put(&shared, &terminal, format, &trace).await.is_some() {
        acknowledge(&delivery).await;
    }
}

pub(crate) async fn acknowledge(delivery: &Delivery) {
    if let Err(error) = delivery.ack_soon().await {
        tracing::debug!(error = %Chain(&error), "a message was not acknowledged and comes again");
    }
}

/// Why a task goes back to the dispatcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Back {
    /// Something here is broken: better to wait a little.
    Fault,
    /// The worker leaves, which is no fault that would pass with time.
    Leaving,
    /// The task asked for another attempt.
    Retry,
}

/// Gives a task back to the dispatcher, for another attempt. Its lease is freed first: it would
/// only stand in the way of the next claim.
pub(crate) async fn hand_back(shared: Arc<Shared>, job: Job, why: &str, back: Back) {
    let placement = &job.placement;
    let task = &placement.task;
    let fault = back == Back::Fault;
    if back == Back::Retry {
        tracing::info!(
            task = %task.id, tenant = %task.tenant, attempt = placement.attempt, why,
            "task is tried again"
        );
    } else {
        tracing::warn!(
            task = %task.id, tenant = %task.tenant, attempt = placement.attempt, why,
            "task goes back"
        );
    }
    if task
        .deadline
        .is_some_and(|deadline| deadline <= Timestamp::now())
    {
        let mut finding = expired("the deadline passed before another attempt could be made");
        if fault {
            finding.attribution = Attribution::Infrastructure;
            finding.evidence = format!("{}; the last attempt failed: {why}", finding.evidence);
        }
        let terminal = terminal(placement, finding, None, false);
        let trace = job.trace.clone();
        conclude(&shared, job, &terminal, &trace).await;
        return;
    }
    if fault {
        let most = RETRY_PAUSE.saturating_mul(1 << placement.attempt.min(10));
        tokio::time::sleep(most.min(LONGEST_PAUSE).mul_f64(rand::random())).await;
    }
    release(
        &shared,
        placement.sandbox.sandbox,
        placement.sandbox.epoch,
        None,
    )
    .await;
    history::record(|| Event::HandedBack {
        tenant: task.tenant.to_string(),
        task: task.id.to_string(),
        attempt: placement.attempt,
        why: why.to_owned(),
    });
    failpoint::step(failpoint::worker::HANDING_BACK);
    let payload = match codec::encode(task, job.format) {
        Ok(payload) => payload,
        Err(error) => {
            tracing::error!(error = %Chain(&error), task = %task.id, "a task cannot go back");
            return;
        }
    };
    let message = Outgoing {
        subject: shared.broker.subjects().request(&task.tenant, &task.pool),
        message_id: Some(placement.retry_id()),
        format: job.format,
        payload: payload.into(),
        trace: job.trace.clone(),
        headers: vec![(HEADER_DIGEST, placement.request_digest.clone())],
    };
    let patience = shared.options.timings.publish;
    match Box::pin(shared.broker.publish(message, patience)).await {
        Ok(_) => {
            failpoint::step(failpoint::worker::HANDED_BACK);
            let took = job.received.elapsed();
            job.settle();
            shared.metrics.attempt_ended(AttemptEnd::HandedBack, took);
        }
        Err(error) => tracing::error!(
            error = %Chain(&error), task = %task.id,
            "a task cannot go back, it will be delivered again"
        ),
    }
}

/// A session's task that has ended here before comes again: it is told what it came to.
pub(crate) async fn answer_again(
    shared: Arc<Shared>,
    key: JobKey,
    placement: Placement,
    delivery: Delivery,
    format: Format,
) {
    let remembered = shared.answers().of(&key);
    let known = match remembered {
        Some(terminal) => terminal,
        None => match unremembered(&shared, &placement).await {
            Some(terminal) => Arc::new(terminal),
            None => return acknowledge(&delivery).await,
        },
    };
    let trace = delivery.trace();
    if put(&shared, &known, format, &trace).await.is_some() {
        acknowledge(&delivery).await;
    }
}

/// What to say of a task that began here and whose terminal is not remembered; nothing where it
/// is stored.
async fn unremembered(shared: &Shared, placement: &Placement) -> Option<Terminal> {
    let task = &placement.task;
    let stored = shared
        .broker
        .terminal_of(&task.tenant, &task.run, task.id)
        .await;
    if let Ok(Some(_)) = stored {
        return None;
    }
    // Where nobody could tell, the gate will.
    let finding = farewell_of(shared, placement).map_or_else(
        || {
            let why = "it has run before, and what it came to was lost";
            let error = ErrorInfo::new(ErrorCode::Internal, why);
            Finding::new(Outcome::DeadLettered, why).with(error)
        },
        |farewell| farewell.finding(),
    );
    Some(terminal(placement, finding, None, false))
}

/// Tells a session's task that its sandbox is not here.
pub(crate) async fn session_gone(shared: Arc<Shared>, job: Job, farewell: &Farewell) {
    let terminal = terminal(&job.placement, farewell.finding(), None, false);
    let trace = job.trace.clone();
    conclude(&shared, job, &terminal, &trace).await;
}

/// Frees the lease of a task that has its terminal, and counts its result for its group.
pub(crate) async fn release_finished(
    shared: &Shared,
    sandbox: SandboxId,
    epoch: Epoch,
    finished: (&TenantId, TaskId),
    ballot: Option<Ballot>,
) {
    let finished = ballot
        .as_ref()
        .map_or_else(|| finished.into(), Ballot::finished);
    let releasing = shared
        .leases
        .finish(&shared.worker, sandbox, epoch, Some(&finished), false);
    match (Box::pin(releasing).await, &ballot) {
        (Ok(done), Some(ballot)) if done.enough => ballot.tell_enough(shared).await,
        (Ok(_), _) => {}
        (Err(error), _) => {
            tracing::warn!(error = %Chain(&error), "a lease stays until it expires");
        }
    }
    failpoint::step(failpoint::worker::RELEASED);
}

/// Frees a lease, and marks a task as finished. What fails here is mended by the lease's end.
pub(crate) async fn release(
    shared: &Shared,
    sandbox: SandboxId,
    epoch: Epoch,
    finished: Option<(&TenantId, TaskId)>,
) {
    let releasing = shared
        .leases
        .release(&shared.worker, sandbox, epoch, finished);
    if let Err(error) = Box::pin(releasing).await {
        tracing::warn!(error = %Chain(&error), "a lease stays until it expires");
    }
    failpoint::step(failpoint::worker::RELEASED);
}
