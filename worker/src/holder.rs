//! Holds one leased sandbox: runs its placements in the order of their arrival, then ends it.
//!
//! A sandbox that runs one task is destroyed after it. One that is kept waits for the session's
//! next task, straight from the fetch loop: nothing stands between its arrival and the sidecar.
//! When it ends, whoever comes for it later is told why.

mod interrupt;
mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use broker_schema::pool::PoolSpec;
use broker_schema::{
    Outcome, RequestLimits, SandboxRef, SessionOptions, TaskId, TenantId, Timestamp,
};
use remuda_lease::{Finished, Renewal};
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::propagate::set_parent;
use remuda_telemetry::{Chain, TraceHeaders, failpoint};
use tokio::sync::{mpsc, watch};
use tracing::Instrument as _;

use crate::backend::Sandbox;
use crate::ballot::Ballot;
use crate::clock::BootTime;
use crate::execute::{Attempt, Past};
use crate::farewell::Farewell;
use crate::finish::{self, Back};
use crate::metrics::AttemptEnd;
use crate::outcome::{Finding, Interrupt, Verdict, cancelled, expired, judge};
use crate::shared::{Job, Shared, Stop};
use crate::stream::Stream;
use interrupt::{assign, given_up, interrupt, told};
use session::{Session, far_future};

pub(crate) struct Holder {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sandbox: Sandbox,
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) lease: SandboxRef,
    pub(crate) queue: mpsc::UnboundedReceiver<Job>,
    pub(crate) stop: watch::Receiver<Stop>,
    pub(crate) past: Past,
    /// Whose session it is, once it is one.
    pub(crate) session_of: Option<TenantId>,
}

/// What becomes of the sandbox after a task.
enum Next {
    Keep(Option<SessionOptions>),
    Close(End),
}

/// Why a sandbox ends.
struct End {
    /// Its lease is still ours to give back.
    held: bool,
    /// What later tasks of its session are told.
    farewell: Farewell,
    /// A task that goes back to the dispatcher once nothing of it can run any more.
    back: Option<Box<Returned>>,
}

/// A task that goes back, and why.
struct Returned {
    job: Job,
    why: String,
    back: Back,
}

impl End {
    fn new(held: bool, farewell: Farewell) -> Self {
        Self {
            held,
            farewell,
            back: None,
        }
    }
}

impl Next {
    fn back(job: Job, why: String, back: Back, held: bool) -> Self {
        Self::Close(End {
            back: Some(Box::new(Returned { job, why, back })),
            ..End::new(held, Farewell::closed())
        })
    }
}

impl Holder {
    pub(crate) async fn run(mut self) {
        let End {
            held,
            farewell,
            back,
        } = self.serve().await;
        let id = self.sandbox.id();
        // Whoever comes from here on is told, by the fetch loop or below.
        if let Some(tenant) = self.session_of.clone() {
            let (shared, epoch) = (&self.shared, self.lease.epoch);
            shared
                .farewells()
                .remember(id, tenant, epoch, farewell.clone());
        }
        self.shared.herd().end(id);
        self.queue.close();
        // The sandbox first: what is said below may take as long as NATS is away.
        if failpoint::is_on(failpoint::worker::NO_RESET) {
            // As if a used sandbox were as good as new.
            self.shared.herd().ready(id, self.sandbox);
            self.shared.offer_wake.notify_one();
        } else {
            if let Err(error) = self.sandbox.destroy().await {
                tracing::error!(error = %Chain(&error), "something of a sandbox is left over");
            }
            self.shared.herd().gone(id);
            failpoint::step(failpoint::worker::DESTROYED);
            self.shared.pool_wake.notify_one();
        }
        let returned = back.is_some();
        if let Some(back) = back {
            let Returned { job, why, back } = *back;
            // Frees the lease too.
            finish::hand_back(self.shared.clone(), job, &why, back).await;
        }
        if held && !returned {
            finish::release(&self.shared, id, self.lease.epoch, None).await;
        }
        while let Some(job) = self.queue.recv().await {
            if job.in_session() {
                finish::session_gone(self.shared.clone(), job, &farewell).await;
            } else {
                let why = "its sandbox was given to another task";
                finish::hand_back(self.shared.clone(), job, why, Back::Fault).await;
            }
        }
    }

    /// Runs placements until the sandbox is to end.
    async fn serve(&mut self) -> End {
        let mut session: Option<Session> = None;
        let mut leaving = false;
        loop {
            let (idle_at, ends) = session.map_or_else(
                || (far_future(), far_future()),
                |session| (session.idle_at, session.ends),
            );
            let job = tokio::select! {
                biased;
                why = told(&mut self.stop, leaving) => match why {
                    Stop::LeaseLost => return End::new(false, Farewell::lease_lost()),
                    Stop::LeaseOverdue => return End::new(false, Farewell::lease_overdue()),
                    Stop::Shutdown => return End::new(true, Farewell::leaving()),
                    Stop::Cancelled => return End::new(true, Farewell::cancelled()),
                    Stop::No | Stop::Drain => {
                        leaving = true;
                        if let Some(session) = &mut session {
                            session.hurry(self.shared.options.timings.session_grace);
                        }
                        continue;
                    }
                },
                // Before the queue: a session that is never idle has an end too.
                () = tokio::time::sleep_until(ends), if session.is_some() => {
                    let life = session.map_or(0, |session| session.options.max_life_ms);
                    tracing::info!(sandbox = %self.sandbox.id(), "a session's life is over");
                    return End::new(true, Farewell::old(Duration::from_millis(life)));
                }
                job = self.queue.recv() => job,
                () = self.sandbox.died(), if session.is_some() => {
                    tracing::warn!(sandbox = %self.sandbox.id(), "a session's sandbox has died");
                    let oom = self.past.new_oom_kills(&self.sandbox);
                    return End::new(true, Farewell::died(oom.by_its_limit()));
                }
                () = tokio::time::sleep_until(idle_at), if session.is_some() => {
                    if session.is_some_and(|session| session.hurried) {
                        return End::new(true, Farewell::leaving());
                    }
                    let idle = session.map_or(0, |session| session.options.idle_timeout_ms);
                    tracing::info!(sandbox = %self.sandbox.id(), "a session was idle for too long");
                    return End::new(true, Farewell::idle(Duration::from_millis(idle)));
                }
            };
            let Some(job) = job else {
                return End::new(true, Farewell::leaving());
            };
            match self.job(job).await {
                Next::Keep(options) => {
                    if let Some(options) = options {
                        session = Some(Session::open(options));
                        self.shared.herd().opened(self.sandbox.id());
                    }
                    if let Some(session) = &mut session {
                        session.used();
                        if leaving {
                            session.hurry(self.shared.options.timings.session_grace);
                        }
                    }
                }
                Next::Close(end) => return end,
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

    async fn traced(&mut self, mut job: Job) -> Next {
        let session = job.in_session();
        let trace = TraceHeaders::current_or(&job.trace);
        if let Some(finding) = unfit(&job) {
            return self.finish(job, finding, None, &trace).await;
        }
        if !self.holds() {
            return self.quiet(&job);
        }
        if job.placement.task.keep_alive.is_some() && self.shared.draining() {
            let why = "the worker is leaving".to_owned();
            return Next::back(job, why, Back::Leaving, true);
        }
        if !self.in_time(&job).await {
            let why = "its lease ran out while the placement was under way";
            return Next::back(job, why.to_owned(), Back::Fault, false);
        }
        job.begin();
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
                Next::back(job, why, Back::Retry, true)
            }
            Verdict::Finish(finding) => {
                let (tenant, task) = (job.placement.task.tenant.clone(), job.placement.task.id);
                let next = self.finish(job, finding, Some(ran), &trace).await;
                if assigned.load(Ordering::Relaxed) && matches!(next, Next::Keep(_)) {
                    self.mark_finished(tenant, task, None);
                }
                next
            }
            Verdict::HandBack(why) => {
                let held = ran.interrupt != Some(Interrupt::LeaseLost);
                let back = match ran.interrupt {
                    Some(Interrupt::Shutdown) => Back::Leaving,
                    _ => Back::Fault,
                };
                Next::back(job, why, back, held)
            }
            Verdict::Quiet => self.quiet(&job),
        }
    }

    /// The lease can be counted on. Asked before anything is done or said under it: the machine
    /// may have slept, and no timer told of it.
    fn holds(&self) -> bool {
        let (sandbox, epoch) = (self.sandbox.id(), self.lease.epoch);
        self.shared.herd().holds(sandbox, epoch, BootTime::now())
    }

    /// Whether a placement came while the lease that it names was alive. One that may have come
    /// late, by clocks that may differ, is asked about.
    async fn in_time(&self, job: &Job) -> bool {
        let placement = &job.placement;
        let (now, sent) = (Timestamp::now(), placement.dispatched_at);
        let apart = now.since(sent).max(sent.since(now));
        if job.in_session() || apart < self.shared.leases.ttl() / 2 {
            return true;
        }
        let lease = [(self.lease.sandbox, self.lease.epoch)];
        match self.shared.leases.renew(&self.shared.worker, &lease).await {
            Ok(renewals) => renewals.first() != Some(&Renewal::Lost),
            // The renewals to come decide.
            Err(_) => true,
        }
    }

    fn quiet(&self, job: &Job) -> Next {
        tracing::warn!("the lease could not be renewed in time, the sandbox is killed");
        let took = job.received.elapsed();
        self.shared.metrics.attempt_ended(AttemptEnd::Quiet, took);
        history::record(|| Event::Quiet {
            task: job.placement.task.id.to_string(),
            attempt: job.placement.attempt,
        });
        Next::Close(End::new(false, Farewell::lease_overdue()))
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
        let in_session = job.in_session();
        let keep = finding.usable
            && if in_session {
                !task.close_session
            } else {
                opening.is_some() && worth_keeping(finding.outcome)
            };
        let farewell = if finding.usable {
            Farewell::closed()
        } else {
            Farewell::spoilt(&finding)
        };
        let lost = ran
            .as_ref()
            .is_some_and(|ran| ran.interrupt == Some(Interrupt::LeaseLost));
        let terminal = Arc::new(finish::terminal(&job.placement, finding, ran, keep));
        tracing::debug!(outcome = %terminal.outcome, evidence = terminal.evidence, "task ended");
        if in_session {
            self.shared.answers().remember(job.key(), &terminal);
        }
        let ballot = Ballot::of(&job.placement.task, &terminal);
        if !lost && !self.holds() {
            return self.quiet(&job);
        }
        let stop = self.stop.clone();
        let concluded = tokio::select! {
            biased;
            concluded = finish::conclude(&self.shared, job, &terminal, trace) => concluded,
            // Past the lease's end nothing may be said any more.
            _ = self.stop.wait_for(|stop| *stop == Stop::LeaseOverdue) => {
                return Next::Close(End::new(false, Farewell::lease_overdue()));
            }
            () = given_up(stop) => {
                return Next::Close(End::new(true, Farewell::leaving()));
            }
        };
        // A result that another terminal came before counts for nothing.
        let ballot = ballot.filter(|_| concluded == Some(true));
        if let Some(ballot) = ballot.clone().filter(|_| in_session) {
            let shared = self.shared.clone();
            let count = async move { ballot.count(&shared).await };
            self.shared.holders.spawn("session's result", count);
        }
        match concluded {
            Some(true) if keep && !in_session => {
                self.mark_finished(tenant.clone(), id, ballot);
                self.session_of = Some(tenant);
                self.sandbox.reset_memory_peak();
                Next::Keep(opening)
            }
            // A session outlives a task of its that somebody else has ended, and one whose
            // terminal cannot be stored now: it is remembered, and said when the message comes
            // again.
            _ if keep && in_session => {
                self.sandbox.reset_memory_peak();
                Next::Keep(None)
            }
            Some(_) if !in_session && !lost => {
                let (sandbox, epoch) = (self.sandbox.id(), self.lease.epoch);
                // The registry will say that it is gone: so it is.
                self.shared.herd().end(sandbox);
                let (shared, finished) = (&self.shared, (&tenant, id));
                finish::release_finished(shared, sandbox, epoch, finished, ballot).await;
                Next::Close(End::new(false, farewell))
            }
            Some(_) => Next::Close(End::new(!lost, farewell)),
            None => Next::Close(End::new(in_session, farewell)),
        }
    }

    /// Writes down that a task is over and its sandbox is kept: nobody has to wait for that.
    fn mark_finished(&self, tenant: TenantId, task: TaskId, ballot: Option<Ballot>) {
        let (shared, lease) = (self.shared.clone(), self.lease.clone());
        self.shared.holders.spawn("session mark", async move {
            let plain = Finished::from((&tenant, task));
            let finished = ballot.as_ref().map_or(plain, Ballot::finished);
            let (sandbox, epoch) = (lease.sandbox, lease.epoch);
            let kept = shared
                .leases
                .finish(&shared.worker, sandbox, epoch, Some(&finished), true);
            match (kept.await, &ballot) {
                (Ok(done), Some(ballot)) if done.enough => ballot.tell_enough(&shared).await,
                (Ok(_), _) => {}
                (Err(error), _) => tracing::warn!(
                    error = %Chain(&error), "a session's task is not marked finished"
                ),
            }
        });
    }
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
        return Some(cancelled("before it began", job.cancel.cause()));
    }
    if let Err(invalid) = task.validate(&RequestLimits::default()) {
        let finding = Finding::new(Outcome::Rejected, "the request is not valid");
        return Some(finding.with(invalid.into_info()));
    }
    let passed = task.deadline.is_some_and(|at| at <= Timestamp::now());
    passed.then(|| expired("the deadline passed before the first step"))
}
