//! Placement: claim a sandbox, publish to RUN, wait for the PubAck, settle the request.

use std::time::{Duration, Instant};

use broker_schema::codec::{self, Format};
use broker_schema::{
    CancelCause, ErrorCode, ErrorInfo, HEADER_CONTENT_TYPE, HEADER_DIGEST, Outcome, Placement,
    SandboxRef, TaskId, TaskRequest, Term, Terminal, Timestamp,
};
use remuda_client::broker::{BrokerError, Delivery, Gate, Outgoing, Unpublished};
use remuda_lease::{Claim, ClaimNonce, ClaimRequest, LeaseError};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, TraceHeaders, failpoint, propagate};
use tokio::sync::oneshot;
use tracing::Instrument as _;

use crate::decide::{Next, after_claim, attempt_limit, backoff};
use crate::error::DispatcherError;
use crate::fleet::{DeadLetter, Fleet};
use crate::lane::Slot;
use crate::progress::Held;
use crate::queue::Ticket;
use crate::terminals::Address;
use crate::{cancel, quota, removal};

/// A request that is held, until it is placed or has an end.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ticket: Ticket,
    /// The leadership of its pool that it was fetched in.
    pub(crate) term: Term,
    pub(crate) request: TaskRequest,
    pub(crate) digest: String,
    pub(crate) delivery: Delivery,
    pub(crate) nonce: ClaimNonce,
    /// Its terminal was looked for and is not there.
    pub(crate) again: bool,
    pub(crate) failures: u32,
    pub(crate) since: Instant,
    /// Who wants to know how it ended.
    pub(crate) told: Option<oneshot::Sender<Outcome>>,
    pub(crate) held: Held,
    pub(crate) _slot: Slot,
}

/// What is to be done with a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Work {
    Place,
    Cancel(CancelCause),
    Expire,
    Reject(Box<ErrorInfo>),
}

/// What became of it.
#[derive(Debug)]
pub(crate) enum Placed {
    /// Placed, or ended.
    Settled {
        granted: bool,
    },
    NoneWarm(Box<Job>),
    /// Its tenant has what it may have.
    OverQuota(Box<Job>),
    /// RUN did not take the placement, and takes no other one either.
    Refused(Box<Job>, Duration),
    Later(Box<Job>, Duration),
}

/// Why a job could not be brought on; it waits and is tried again.
#[derive(Debug, thiserror::Error)]
enum Stuck {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Bootstrap(#[from] DispatcherError),
    #[error("cannot encode the placement")]
    Encode(#[from] codec::EncodeError),
    #[error("cannot publish the placement")]
    Publish {
        /// It is stored nowhere.
        refused: bool,
        #[source]
        source: BrokerError,
    },
}

impl From<Unpublished> for Stuck {
    fn from(
        Unpublished {
            error,
            may_be_stored,
        }: Unpublished,
    ) -> Self {
        match error {
            // That is the request's own doing: the stream takes others, and this one has an end.
            error @ (BrokerError::TooLarge { .. } | BrokerError::Option { .. }) => {
                Self::Broker(error)
            }
            source => Self::Publish {
                refused: !may_be_stored,
                source,
            },
        }
    }
}

/// A step that went through.
enum Done {
    Placed,
    Ended,
    NoneWarm,
    OverQuota,
    Wait(Duration),
}

pub(crate) async fn run(fleet: &Fleet, mut job: Box<Job>, work: Work) -> Placed {
    let trace = job.delivery.trace();
    let span = tracing::info_span!(
        "dispatch",
        task = %job.request.id, run = %job.request.run, tenant = %job.request.tenant,
        pool = %job.request.pool, attempt = tracing::field::Empty,
    );
    propagate::set_parent(&span, &trace);
    async {
        let done = match work {
            Work::Place => Box::pin(place(fleet, &mut job, &trace)).await,
            Work::Cancel(cause) => {
                let terminal = Address::of(&job.request).cancelled(&job.digest, cause);
                end(fleet, &mut job, &terminal, &trace).await
            }
            Work::Reject(error) => {
                let terminal = Address::of(&job.request).rejected(&job.digest, *error);
                end(fleet, &mut job, &terminal, &trace).await
            }
            Work::Expire => {
                let terminal = Address::of(&job.request).expired(&job.digest);
                end(fleet, &mut job, &terminal, &trace).await
            }
        };
        match done {
            Ok(Done::Placed) => {
                fleet.metrics.placed.add(1, ());
                fleet.metrics.queue_wait.record(job.since.elapsed(), ());
                Placed::Settled { granted: true }
            }
            Ok(Done::Ended) => Placed::Settled { granted: false },
            Ok(Done::NoneWarm) => Placed::NoneWarm(job),
            Ok(Done::OverQuota) => Placed::OverQuota(job),
            Ok(Done::Wait(wait)) => Placed::Later(job, wait),
            Err(stuck) => {
                let pause = backoff(job.failures, rand::random());
                job.failures = job.failures.saturating_add(1);
                // The servers' state is told of once, elsewhere.
                tracing::debug!(error = %Chain(&stuck), ?pause, "task waits");
                match stuck {
                    Stuck::Publish { .. } => Placed::Refused(job, pause),
                    _ => Placed::Later(job, pause),
                }
            }
        }
    }
    .instrument(span)
    .await
}

async fn place(fleet: &Fleet, job: &mut Job, trace: &TraceHeaders) -> Result<Done, Stuck> {
    let request = &job.request;
    let stored = fleet.terminal_of(request).await?;
    if let Some(terminal) = stored {
        return over(fleet, job, &terminal).await;
    }
    let request = &job.request;
    if request
        .deadline
        .is_some_and(|deadline| deadline <= Timestamp::now())
    {
        let terminal = Address::of(request).expired(&job.digest);
        return end(fleet, job, &terminal, trace).await;
    }
    if let Some(session) = request.session.clone() {
        return publish(fleet, job, session, 1, trace).await;
    }
    let claim = ClaimRequest {
        tenant: request.tenant.clone(),
        run: request.run.clone(),
        // Under another id nothing is known of its attempts and leases: for tests.
        task: if failpoint::is_on(failpoint::dispatcher::NO_CLAIM) {
            TaskId::new()
        } else {
            request.id
        },
        pool: request.pool.clone(),
        request_digest: job.digest.clone(),
        max_attempts: attempt_limit(fleet.options.max_attempts, request),
        nonce: job.nonce,
        again: job.again,
        group: request.group.clone(),
        session: request.keep_alive.is_some(),
        quota: fleet.tenants.of(&request.tenant).quota(),
    };
    let began = Instant::now();
    let answer = fleet.lease.claim(&claim).await?;
    fleet.metrics.claim.record(began.elapsed(), ());
    let next = after_claim(&answer);
    match (next, answer) {
        (_, Claim::Granted { sandbox, attempt }) => {
            tracing::Span::current().record("attempt", attempt);
            let lease = (sandbox.sandbox, sandbox.epoch);
            history::record(|| Event::Claimed {
                tenant: request.tenant.to_string(),
                task: request.id.to_string(),
                attempt,
                limit: claim.max_attempts,
                sandbox: sandbox.sandbox.to_string(),
                epoch: sandbox.epoch.0,
                worker: sandbox.worker.to_string(),
            });
            failpoint::step(failpoint::dispatcher::CLAIMED);
            let published = publish(fleet, job, sandbox, attempt, trace).await;
            if let Err(stuck) = &published {
                let given_back = match stuck {
                    Stuck::Publish { refused: true, .. } => {
                        fleet.lease.unclaim_refused(&claim, lease.0, lease.1).await
                    }
                    _ => fleet.lease.unclaim(&claim, lease.0, lease.1).await,
                };
                if let Err(error) = given_back {
                    tracing::debug!(error = %Chain(&error), "the claim runs out by itself");
                }
                job.nonce = ClaimNonce::new();
            }
            published
        }
        (Next::WaitForPool, _) => Ok(Done::NoneWarm),
        (Next::Later(wait), _) => Ok(Done::Wait(wait)),
        (Next::WaitForQuota, _) => Ok(Done::OverQuota),
        (
            Next::EndOverQuota {
                kind,
                limit,
                current,
            },
            _,
        ) => {
            let error = quota::over(&job.request.tenant, kind, limit, current);
            let terminal = Address::of(&job.request).rejected(&job.digest, error);
            end(fleet, job, &terminal, trace).await
        }
        (Next::EndCancelled(cause), _) => {
            let terminal = Address::of(&job.request).cancelled(&job.digest, cause);
            end(fleet, job, &terminal, trace).await
        }
        (Next::EndDeadLettered { attempts }, _) => {
            let reason = format!("{attempts} attempts ended by faults of the infrastructure");
            bury(fleet, job, ErrorCode::AttemptsExhausted, reason).await?;
            let terminal = Address::of(&job.request).dead_lettered(&job.digest, attempts);
            end(fleet, job, &terminal, trace).await
        }
        (Next::LookForTerminal, _) => {
            // It was not there before the claim; if it is not there now either, it was lost.
            let request = &job.request;
            let stored = fleet.terminal_of(request).await?;
            if let Some(terminal) = stored {
                return over(fleet, job, &terminal).await;
            }
            job.again = true;
            Ok(Done::Wait(Duration::from_millis(200)))
        }
        (Next::DeadLetterConflict { first_digest }, _) => conflict(fleet, job, &first_digest).await,
        (Next::Bootstrap | Next::Publish, _) => {
            fleet.bootstrap().await?;
            Ok(Done::Wait(Duration::from_millis(50)))
        }
    }
}

/// The task has its terminal. It is this request's unless the digests differ.
async fn over(fleet: &Fleet, job: &mut Job, terminal: &Terminal) -> Result<Done, Stuck> {
    let first = &terminal.request_digest;
    if !first.is_empty() && *first != job.digest {
        return conflict(fleet, job, first).await;
    }
    // Whoever stored it may have died before it could count it.
    Box::pin(cancel::count(fleet, &job.request, terminal)).await;
    job.tell(terminal.outcome);
    settle(&job.delivery, Ok(())).await;
    Ok(Done::Ended)
}

async fn conflict(fleet: &Fleet, job: &Job, first: &str) -> Result<Done, Stuck> {
    let reason = format!(
        "the id was used before for a request with the digest {first}, this one has {}",
        job.digest
    );
    bury(fleet, job, ErrorCode::IdConflict, reason).await?;
    settle(&job.delivery, Ok(())).await;
    Ok(Done::Ended)
}

async fn bury(
    fleet: &Fleet,
    job: &Job,
    code: ErrorCode,
    reason: String,
) -> Result<(), BrokerError> {
    let letter = DeadLetter::of("req", &job.delivery, Some(job.request.id), code, reason);
    let lane = (&job.request.tenant, &job.request.pool);
    fleet.dead_letter(lane, letter).await
}

async fn end(
    fleet: &Fleet,
    job: &mut Job,
    terminal: &Terminal,
    trace: &TraceHeaders,
) -> Result<Done, Stuck> {
    let format = job.delivery.format().unwrap_or_default();
    let gate = fleet
        .end(terminal, format, &TraceHeaders::current_or(trace))
        .await?;
    job.tell(match gate {
        Gate::Won => terminal.outcome,
        Gate::Lost(first) => first.outcome,
    });
    removal::note(fleet, &job.request).await;
    settle(&job.delivery, Ok(())).await;
    Ok(Done::Ended)
}

async fn publish(
    fleet: &Fleet,
    job: &Job,
    sandbox: SandboxRef,
    attempt: u32,
    trace: &TraceHeaders,
) -> Result<Done, Stuck> {
    let subjects = fleet.broker.subjects();
    let subject = subjects.placement(&sandbox.worker, &job.request.tenant, sandbox.sandbox);
    let placement = Placement {
        task: job.request.clone(),
        request_digest: job.digest.clone(),
        attempt,
        sandbox,
        dispatched_at: Timestamp::now(),
    };
    let outgoing = Outgoing {
        subject,
        message_id: Some(placement.message_id()),
        // Whoever asked in JSON is answered in JSON.
        format: job.delivery.format().unwrap_or_default(),
        payload: codec::encode(&placement, job.delivery.format().unwrap_or_default())?.into(),
        trace: TraceHeaders::current_or(trace),
        headers: Vec::new(),
    };
    let ack = fleet
        .broker
        .publish_or_tell(outgoing, fleet.options.timings.publish)
        .await?;
    history::record(|| Event::Placed {
        tenant: placement.task.tenant.to_string(),
        task: placement.task.id.to_string(),
        attempt,
        sandbox: placement.sandbox.sandbox.to_string(),
        epoch: placement.sandbox.epoch.0,
        worker: placement.sandbox.worker.to_string(),
        duplicate: ack.duplicate,
    });
    failpoint::step(failpoint::dispatcher::PLACED);
    if ack.duplicate {
        // The id names the epoch, which no other claim ever has: an earlier try of ours is stored.
        tracing::debug!(attempt, "the placement was stored by an earlier try");
    }
    settle(&job.delivery, Ok(())).await;
    failpoint::step(failpoint::dispatcher::SETTLED);
    Ok(Done::Placed)
}

/// Acknowledges a request that is seen to; lets it come again where it could not be.
pub(crate) async fn settle(delivery: &Delivery, seen_to: Result<(), BrokerError>) {
    let told = match seen_to {
        Ok(()) => delivery.ack().await,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "request comes again");
            // Ever more rarely, so that the server does not give up on it while this passes.
            let pause = delivery.delivered.clamp(1, 30);
            delivery.nak(Duration::from_secs(pause)).await
        }
    };
    if let Err(error) = told {
        // It comes again, and the claim or the terminal says that it is seen to.
        tracing::debug!(error = %Chain(&error), "request could not be settled");
    }
}

impl Job {
    fn tell(&mut self, outcome: Outcome) {
        if let Some(told) = self.told.take() {
            // Whoever asked may have gone.
            let _ = told.send(outcome);
        }
    }

    /// Whether it was admitted before: a worker gave it back, for another attempt.
    pub(crate) fn is_handed_back(&self) -> bool {
        self.delivery.header(HEADER_DIGEST).is_some()
    }

    /// Lets another dispatcher have it at once.
    pub(crate) async fn give_back(self: Box<Self>) {
        if let Err(error) = self.delivery.nak(Duration::ZERO).await {
            tracing::debug!(error = %Chain(&error), "request comes again after its ack wait");
        }
    }
}

/// Format of a message that has headers, for those that are not deliveries.
pub(crate) fn format_of(headers: Option<&async_nats::HeaderMap>) -> Format {
    let value = headers
        .and_then(|headers| headers.get(HEADER_CONTENT_TYPE))
        .map(async_nats::HeaderValue::as_str);
    Format::from_content_type(value).unwrap_or_default()
}
