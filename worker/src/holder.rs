//! Holds one leased sandbox: runs its placements in the order of their arrival, then ends it.
//!
//! A sandbox that runs one task is destroyed after it. One that is kept waits for the session's
//! next task, straight from the fetch loop: nothing stands between its arrival and the sidecar.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use broker_schema::pool::PoolSpec;
use broker_schema::{
    ErrorCode, Outcome, RequestLimits, SandboxRef, SessionOptions, TaskRequest, Timestamp,
};
use remuda_lease::Renewal;
use remuda_telemetry::propagate::set_parent;
use remuda_telemetry::{Chain, TraceHeaders};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::backend::Sandbox;
use crate::execute::{Attempt, Past};
use crate::finish::{self, Back};
use crate::metrics::AttemptEnd;
use crate::outcome::{Finding, Interrupt, Verdict, expired, judge};
use crate::shared::{Job, Shared, Stop};
use crate::stream::Stream;

/// A session's task that runs for so long is written down in Redis, for `remuda ps` and for
/// those who want to cancel it. Shorter ones are over before anybody could.
const ASSIGN_AFTER: Duration = Duration::from_millis(200);

pub(crate) struct Holder {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sandbox: Sandbox,
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) lease: SandboxRef,
    pub(crate) queue: mpsc::UnboundedReceiver<Job>,
    pub(crate) stop: watch::Receiver<Stop>,
    pub(crate) past: Past,
}

/// An open session.
#[derive(Debug, Clone, Copy)]
struct Session {
    idle: Duration,
    ends: Instant,
}

/// What becomes of the sandbox after a task.
enum Next {
    Keep(Option<SessionOptions>),
    /// To be destroyed; `held` where the lease is still ours to give back.
    Close {
        held: bool,
    },
}

impl Holder {
    pub(crate) async fn run(mut self) {
        let held = self.serve().await;
        let id = self.sandbox.id();
        self.shared.herd().end(id);
        self.queue.close();
        while let Some(job) = self.queue.recv().await {
            let why = "the session was closed";
            if job.in_session() {
                finish::session_gone(self.shared.clone(), job, ErrorCode::SandboxLost, why).await;
            } else {
                finish::hand_back(self.shared.clone(), job, why, Back::Fault).await;
            }
        }
        if held {
            finish::release(&self.shared, id, self.lease.epoch, None).await;
        }
        if let Err(error) = self.sandbox.destroy().await {
            tracing::error!(error = %Chain(&error), "something of a sandbox is left over");
        }
        self.shared.herd().gone(id);
        self.shared.pool_wake.notify_one();
    }

    /// Runs placements until the sandbox is to end; true where its lease is still to be freed.
    async fn serve(&mut self) -> bool {
        let mut session: Option<Session> = None;
        loop {
            let idle = session.map_or(Duration::MAX, |session| session.idle);
            let wake = Instant::now()
                .checked_add(idle)
                .unwrap_or_else(far_future)
                .min(session.map_or_else(far_future, |session| session.ends));
            let job = tokio::select! {
                biased;
                // A failed wait means that nobody is left who could stop it.
                why = self.stop.wait_for(|stop| *stop != Stop::No) => {
                    let why = why.map_or(Stop::Shutdown, |why| *why);
                    return !matches!(why, Stop::LeaseLost | Stop::LeaseOverdue);
                }
                job = self.queue.recv() => job,
                () = self.sandbox.died(), if session.is_some() => {
                    tracing::warn!(sandbox = %self.sandbox.id(), "a session's sandbox has died");
                    return true;
                }
                () = tokio::time::sleep_until(wake), if session.is_some() => {
                    tracing::info!(sandbox = %self.sandbox.id(), "a session's time is over");
                    return true;
                }
            };
            let Some(job) = job else {
                return true;
            };
            match self.job(job).await {
                Next::Keep(options) => {
                    if let Some(options) = options {
                        session = Some(Session {
                            idle: Duration::from_millis(options.idle_timeout_ms),
                            ends: Instant::now()
                                .checked_add(Duration::from_millis(options.max_life_ms))
                                .unwrap_or_else(far_future),
                        });
                        self.shared.herd().opened(self.sandbox.id());
                    }
                }
                Next::Close { held } => return held,
            }
        }
    }

    async fn job(&mut self, job: Job) -> Next {
        let task = &job.placement.task;
        let span = tracing::info_span!(
            "execute",
            task = %task.id,
            run = %task.run,
            tenant = %task.tenant,
            sandbox = %self.lease.sandbox,
            worker = %self.shared.worker,
            attempt = job.placement.attempt,
        );
        set_parent(&span, &job.trace);
        Box::pin(self.traced(job)).instrument(span).await
    }

    async fn traced(&mut self, job: Job) -> Next {
        let session = job.in_session();
        let trace = TraceHeaders::current_or(&job.trace);
        if let Some(finding) = unfit(&job) {
            return self.finish(job, finding, None, &trace).await;
        }
        let assigned = AtomicBool::new(false);
        let ran = {
            let shared = &self.shared;
            let task = &job.placement.task;
            let attempt = Attempt {
                sandbox: &self.sandbox,
                spec: &self.spec,
                placement: &job.placement,
                stream: Stream::new(
                    &shared.broker,
                    &job.placement,
                    job.format,
                    trace.clone(),
                    shared.options.timings.publish,
                ),
                trace: &trace,
                past: &mut self.past,
            };
            let assignment = assign(shared, &self.lease, task, session, &assigned);
            let interrupt = interrupt(&mut self.stop, &job, assignment);
            attempt.run(interrupt).await
        };
        let verdict = judge(&ran.ends, ran.interrupt, session);
        match verdict {
            Verdict::Finish(finding) if again(&job, &finding) => {
                let why = format!("{}: {}", finding.outcome, finding.evidence);
                self.shared.herd().end(self.sandbox.id());
                finish::hand_back(self.shared.clone(), job, &why, Back::Retry).await;
                Next::Close { held: true }
            }
            Verdict::Finish(finding) => {
                let (tenant, task) = (job.placement.task.tenant.clone(), job.placement.task.id);
                let next = self.finish(job, finding, Some(ran), &trace).await;
                if assigned.load(Ordering::Relaxed) && matches!(next, Next::Keep(_)) {
                    self.mark_finished(tenant, task);
                }
                next
            }
            Verdict::HandBack(why) => {
                let held = ran.interrupt != Some(Interrupt::LeaseLost);
                let back = match ran.interrupt {
                    Some(Interrupt::Shutdown) => Back::Leaving,
                    _ => Back::Fault,
                };
                self.shared.herd().end(self.sandbox.id());
                finish::hand_back(self.shared.clone(), job, &why, back).await;
                Next::Close { held }
            }
            Verdict::Quiet => {
                tracing::warn!("the lease could not be renewed in time, the sandbox is killed");
                let took = job.received.elapsed();
                self.shared.metrics.attempt_ended(AttemptEnd::Quiet, took);
                Next::Close { held: false }
            }
        }
    }

    /// Says how it ended, and whether the sandbox is kept.
    async fn finish(
        &mut self,
        job: Job,
        finding: Finding,
        ran: Option<crate::execute::Ran>,
        trace: &TraceHeaders,
    ) -> Next {
        let task = &job.placement.task;
        let (tenant, id) = (task.tenant.clone(), task.id);
        let opening = task.keep_alive.filter(|_| !job.in_session());
        let keep = finding.usable
            && !self.shared.draining()
            && if job.in_session() {
                !task.close_session
            } else {
                opening.is_some() && worth_keeping(finding.outcome)
            };
        let lost = ran
            .as_ref()
            .is_some_and(|ran| ran.interrupt == Some(Interrupt::LeaseLost));
        let terminal = finish::terminal(&job.placement, finding, ran, keep);
        tracing::debug!(outcome = %terminal.outcome, evidence = terminal.evidence, "task ended");
        let in_session = job.in_session();
        let concluded = tokio::select! {
            biased;
            concluded = finish::conclude(&self.shared, job, &terminal, trace) => concluded,
            // Past the lease's end nothing may be said any more.
            _ = self.stop.wait_for(|stop| *stop == Stop::LeaseOverdue) => None,
        };
        match concluded {
            Some(true) if keep && in_session => {
                self.sandbox.reset_memory_peak();
                Next::Keep(None)
            }
            Some(true) if keep => {
                self.mark_finished(tenant, id);
                self.sandbox.reset_memory_peak();
                Next::Keep(opening)
            }
            // A session outlives a task of its that somebody else has ended.
            Some(false) if keep && in_session => Next::Keep(None),
            Some(_) => {
                if !in_session && !lost {
                    let epoch = self.lease.epoch;
                    let finished = Some((&tenant, id));
                    finish::release(&self.shared, self.sandbox.id(), epoch, finished).await;
                    return Next::Close { held: false };
                }
                Next::Close { held: !lost }
            }
            None => Next::Close { held: false },
        }
    }

    /// Writes down that a task is over and its sandbox is kept: nobody has to wait for that.
    fn mark_finished(&self, tenant: broker_schema::TenantId, task: broker_schema::TaskId) {
        let (shared, lease) = (self.shared.clone(), self.lease.clone());
        self.shared.holders.spawn("session mark", async move {
            let kept = shared
                .leases
                .keep(&shared.worker, lease.sandbox, lease.epoch, (&tenant, task))
                .await;
            if let Err(error) = kept {
                tracing::warn!(error = %Chain(&error), "a session's task is not marked finished");
            }
        });
    }
}

fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}

/// Whether a sandbox is of use after an opening that ended like this.
fn worth_keeping(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Succeeded | Outcome::Failed | Outcome::TimedOut | Outcome::OomKilled
    )
}

/// Whether the task asked for another attempt after one that ended like this, and has the time.
fn again(job: &Job, finding: &Finding) -> bool {
    let task = &job.placement.task;
    let late = task.deadline.is_some_and(|at| at <= Timestamp::now());
    !late && task.retries_after(finding.outcome, job.placement.attempt)
}

/// Why a job is over before it began.
fn unfit(job: &Job) -> Option<Finding> {
    let task = &job.placement.task;
    if job.cancel.is_cancelled() {
        let why = "it was cancelled before it began";
        let error = broker_schema::ErrorInfo::new(ErrorCode::Cancelled, why);
        return Some(Finding::new(Outcome::Cancelled, why).with(error));
    }
    if let Err(invalid) = task.validate(&RequestLimits::default()) {
        let finding = Finding::new(Outcome::Rejected, "the request is not valid");
        return Some(finding.with(invalid.into_info()));
    }
    let passed = task.deadline.is_some_and(|at| at <= Timestamp::now());
    passed.then(|| expired("the deadline passed before the first step"))
}

/// Resolves when the attempt is to stop.
async fn interrupt(
    stop: &mut watch::Receiver<Stop>,
    job: &Job,
    assignment: impl Future<Output = Interrupt>,
) -> Interrupt {
    tokio::select! {
        biased;
        why = stop.wait_for(|stop| !matches!(stop, Stop::No | Stop::Drain)) => {
            match why.map_or(Stop::Shutdown, |why| *why) {
                Stop::LeaseLost => Interrupt::LeaseLost,
                Stop::LeaseOverdue => Interrupt::LeaseOverdue,
                Stop::No | Stop::Drain | Stop::Shutdown => Interrupt::Shutdown,
            }
        }
        () = job.cancel.cancelled() => Interrupt::Cancelled,
        why = assignment => why,
    }
}

/// Writes a session's long task down; resolves only where that shows that it must stop.
async fn assign(
    shared: &Shared,
    lease: &SandboxRef,
    task: &TaskRequest,
    session: bool,
    assigned: &AtomicBool,
) -> Interrupt {
    if session {
        tokio::time::sleep(ASSIGN_AFTER).await;
        assigned.store(true, Ordering::Relaxed);
        let assigning = shared
            .leases
            .assign(lease, &task.tenant, &task.run, task.id);
        match Box::pin(assigning).await {
            Ok(Renewal::Held { cancelled: Some(_) }) => return Interrupt::Cancelled,
            Ok(Renewal::Held { cancelled: None }) => {}
            Ok(Renewal::Lost) => return Interrupt::LeaseLost,
            Err(error) => tracing::debug!(error = %Chain(&error), "a task is not written down"),
        }
    }
    std::future::pending().await
}
