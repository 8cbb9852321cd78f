//! Takes placements: a free slot first, then a message, then its place.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::stream::PLACEMENT_ACK_WAIT;
use broker_schema::{
    Attribution, ErrorCode, ErrorInfo, Outcome, ParsedSubject, Placement, PoolId, RunId, TaskId,
    TenantId, Terminal, Times, Timestamp, Usage, codec,
};
use remuda_client::broker::{BrokerError, Delivery, Puller};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, failpoint};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::execute::Past;
use crate::farewell::Farewell;
use crate::finish::{self, Back};
use crate::holder::Holder;
use crate::inventory::{Named, Place};
use crate::jobs::{Admission, Family, JobKey};
use crate::shared::{HolderHandle, Job, Shared};

/// How often the server is told that the messages in hand are worked on.
const PROGRESS: Duration = Duration::from_secs(PLACEMENT_ACK_WAIT.as_secs() / 3);
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) async fn run(shared: Arc<Shared>, mut puller: Puller, token: CancellationToken) {
    let mut progress = tokio::time::interval(PROGRESS);
    progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        puller.want(shared.free_slots());
        tokio::select! {
            biased;
            () = token.cancelled() => break,
            delivery = puller.next() => match delivery {
                Ok(delivery) => route(&shared, delivery).await,
                Err(BrokerError::Closed) => {
                    tracing::error!("the connection to NATS was closed for good, leaving");
                    shared.leave.cancel();
                    return;
                }
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "placements cannot be fetched");
                    tokio::select! {
                        () = token.cancelled() => break,
                        () = tokio::time::sleep(PAUSE) => {}
                    }
                }
            },
            () = shared.fetch_wake.notified() => {}
            _ = progress.tick() => {
                for delivery in shared.deliveries() {
                    if let Err(error) = delivery.progress().await {
                        tracing::debug!(error = %Chain(&error), "progress was not told");
                    }
                }
            }
        }
    }
    puller.close().await;
}

/// A placement whose subject and payload say the same.
struct Read {
    placement: Placement,
    format: codec::Format,
}

/// Why a message is no placement of this worker.
struct Unreadable {
    error: ErrorInfo,
    /// Whom to tell.
    ids: Option<Ids>,
}

/// The least of a placement that somebody can be answered by.
#[derive(Deserialize)]
struct Ids {
    task: TaskIds,
    #[serde(default)]
    request_digest: String,
}

#[derive(Deserialize)]
struct TaskIds {
    id: TaskId,
    run: RunId,
    pool: PoolId,
}

async fn route(shared: &Arc<Shared>, delivery: Delivery) {
    failpoint::step(failpoint::worker::FETCHED);
    let subject = shared.broker.subjects().parse(&delivery.subject);
    let Some(ParsedSubject::Placement {
        tenant, sandbox, ..
    }) = subject
    else {
        tracing::error!(
            subject = delivery.subject,
            "a message is on a strange subject, dropped"
        );
        shared.metrics.unreadable();
        finish::acknowledge(&delivery).await;
        return;
    };
    let read = match read(shared, &delivery, &tenant, sandbox) {
        Ok(read) => read,
        Err(unreadable) => {
            refuse(shared, delivery, tenant, *unreadable);
            return;
        }
    };
    let Read { placement, format } = read;
    let key = JobKey::of(&placement);
    let family = Family::of(&placement);
    let now = std::time::Instant::now();
    let admission = shared
        .jobs()
        .admit(&key, delivery.stream_sequence, family, now);
    let cancel = match admission {
        Admission::Run(cancel) => cancel,
        Admission::Redelivered => return,
        Admission::Ended if placement.task.session.is_some() => {
            let inner = shared.clone();
            shared.holders.spawn("answer again", async move {
                finish::answer_again(inner, key, placement, delivery, format).await;
            });
            return;
        }
        // What runs has its message still, and comes again with that.
        Admission::Running | Admission::Ended => {
            finish::acknowledge(&delivery).await;
            return;
        }
    };
    place(
        shared,
        Job::new(shared, placement, delivery, format, cancel),
    );
}

fn place(shared: &Arc<Shared>, job: Job) {
    let placement = &job.placement;
    if shared.draining() && !job.in_session() {
        back(shared, job, "the worker is leaving", Back::Leaving);
        return;
    }
    let named = Named {
        sandbox: placement.sandbox.sandbox,
        epoch: placement.sandbox.epoch,
        tenant: &placement.task.tenant,
        session: job.in_session(),
    };
    let deadline = shared.lease_deadline(BootTime::now());
    let mut ends = None;
    let place = shared
        .herd()
        .place(named, shared.incarnation(), deadline, || {
            let (handle, queue, stop) = HolderHandle::new();
            ends = Some((handle.clone(), queue, stop));
            handle
        });
    match (place, ends) {
        (Place::Adopt(sandbox, spec), Some((handle, queue, stop))) => {
            history::record(|| Event::Adopted {
                sandbox: placement.sandbox.sandbox.to_string(),
                epoch: placement.sandbox.epoch.0,
                worker: shared.worker.to_string(),
                tenant: placement.task.tenant.to_string(),
                task: placement.task.id.to_string(),
                attempt: placement.attempt,
            });
            failpoint::step(failpoint::worker::ADOPTED);
            let holder = Holder {
                shared: shared.clone(),
                sandbox,
                spec,
                lease: placement.sandbox.clone(),
                queue,
                stop,
                past: Past::new(),
                session_of: None,
            };
            enqueue(shared, &handle, job);
            shared.holders.spawn("holder", holder.run());
            shared.pool_wake.notify_one();
        }
        (Place::Queue(handle), _) => enqueue(shared, &handle, job),
        (Place::Gone(code, why), _) => gone(shared, job, &Farewell::unknown(code, why)),
        (Place::HandBack(why), _) => back(shared, job, why, Back::Fault),
        (Place::Adopt(..), None) => {
            back(shared, job, "its holder could not be made", Back::Fault);
        }
    }
}

fn enqueue(shared: &Arc<Shared>, handle: &HolderHandle, job: Job) {
    // The holder has ended since its place was looked up.
    if let Err(returned) = handle.jobs.send(job) {
        gone(shared, returned.0, &Farewell::leaving());
    }
}

/// `otherwise` where nothing is remembered of the session.
fn gone(shared: &Arc<Shared>, job: Job, otherwise: &Farewell) {
    let farewell = farewell_of(shared, &job.placement).unwrap_or_else(|| otherwise.clone());
    let inner = shared.clone();
    shared.holders.spawn("session gone", async move {
        finish::session_gone(inner, job, &farewell).await;
    });
}

/// Why the session is gone that a placement is for.
pub(crate) fn farewell_of(shared: &Shared, placement: &Placement) -> Option<Farewell> {
    let sandbox = &placement.sandbox;
    let tenant = &placement.task.tenant;
    shared
        .farewells()
        .of(sandbox.sandbox, tenant, sandbox.epoch)
}

fn back(shared: &Arc<Shared>, job: Job, why: &'static str, reason: Back) {
    let inner = shared.clone();
    shared.holders.spawn("hand back", async move {
        finish::hand_back(inner.clone(), job, why, reason).await;
        inner.pool_wake.notify_one();
    });
}

fn read(
    shared: &Shared,
    delivery: &Delivery,
    tenant: &TenantId,
    sandbox: broker_schema::SandboxId,
) -> Result<Read, Box<Unreadable>> {
    let format = delivery
        .format()
        .map_err(|error| Box::new(Unreadable { error, ids: None }))?;
    let placement: Placement = codec::decode(&delivery.payload, format).map_err(|error| {
        let ids = codec::decode(&delivery.payload, format).ok();
        Box::new(Unreadable { error, ids })
    })?;
    let named = &placement.sandbox;
    let same = placement.task.tenant == *tenant
        && named.sandbox == sandbox
        && named.worker == shared.worker
        && placement
            .task
            .session
            .as_ref()
            .is_none_or(|session| session == named);
    if same {
        return Ok(Read { placement, format });
    }
    Err(Box::new(Unreadable {
        error: ErrorInfo::new(
            ErrorCode::SubjectMismatch,
            "the subject and the payload name different tenants, workers or sandboxes",
        ),
        ids: Some(Ids {
            task: TaskIds {
                id: placement.task.id,
                run: placement.task.run,
                pool: placement.task.pool,
            },
            request_digest: placement.request_digest,
        }),
    }))
}

/// Answers under the tenant of the subject, whatever the payload claims.
fn refuse(shared: &Arc<Shared>, delivery: Delivery, tenant: TenantId, unreadable: Unreadable) {
    let Unreadable { error, ids } = unreadable;
    tracing::error!(subject = delivery.subject, %error, "a placement cannot be used");
    let Some(ids) = ids else {
        shared.metrics.unreadable();
        shared
            .holders
            .spawn("drop", async move { finish::acknowledge(&delivery).await });
        return;
    };
    shared.metrics.refused();
    let terminal = Terminal {
        task: ids.task.id,
        tenant,
        run: ids.task.run,
        pool: ids.task.pool,
        group: None,
        request_digest: ids.request_digest,
        attempt: 0,
        outcome: Outcome::Rejected,
        attribution: Attribution::User,
        evidence: "the placement cannot be used".to_owned(),
        exit: None,
        error: Some(error),
        steps: Vec::new(),
        frames: 0,
        usage: Usage::default(),
        times: Times {
            finished: Timestamp::now(),
            ..Times::default()
        },
        sandbox: None,
        kept: false,
    };
    shared.holders.spawn(
        "refusal",
        finish::answer(shared.clone(), delivery, terminal),
    );
}
