//! The reaper: what dead workers left in RUN is queued again or answered, by whoever leads the
//! fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::codec::{self};
use broker_schema::stream::{ConsumerDef, worker_consumer};
use broker_schema::{
    ErrorCode, ErrorInfo, HEADER_DIGEST, ParsedSubject, Placement, PoolId, WorkerId,
};
use remuda_client::broker::{BrokerError, Delivery, Outgoing};
use remuda_lease::LeaseError;
use remuda_telemetry::{Chain, TraceHeaders, failpoint};

use crate::cancel;
use crate::fleet::{DeadLetter, Fleet};
use crate::presence;
use crate::terminals::Address;

/// Placements of one dead worker that are looked at together.
const BATCH: usize = 16;
/// How long to wait for more before looking whether there are any.
const QUIET: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum ReapError {
    #[error("cannot find dead workers")]
    Find(#[source] LeaseError),
    #[error("cannot see to the placements of dead worker {worker}")]
    Placements {
        worker: WorkerId,
        #[source]
        source: BrokerError,
    },
    #[error("cannot bury worker {worker}")]
    Bury {
        worker: WorkerId,
        #[source]
        source: LeaseError,
    },
    #[error("cannot look for placements that nobody fetches")]
    Orphans(#[source] BrokerError),
}

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut absent = Absent::default();
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = tick.tick() => {}
        }
        if !fleet.leadership.leads_fleet() {
            absent = Absent::default();
            continue;
        }
        // Cancelled in the middle, what is left is seen to by the next dispatcher.
        let round = tokio::select! {
            () = fleet.group.token().cancelled() => return,
            round = round(&fleet, &mut absent) => round,
        };
        if let Err(error) = round {
            tracing::debug!(error = %Chain(&error), "dead workers wait");
        }
    }
}

/// Workers that placements wait for and that nobody knows, since when. A flushed Redis knows
/// nobody for a moment, and a worker may leave without its messages.
#[derive(Debug, Default)]
struct Absent(BTreeMap<WorkerId, Instant>);

impl Absent {
    /// Takes note and returns those that are absent for longer than `patience`.
    fn observe(
        &mut self,
        addressed: BTreeSet<WorkerId>,
        alive: &BTreeSet<WorkerId>,
        now: Instant,
        patience: Duration,
    ) -> Vec<WorkerId> {
        self.0
            .retain(|worker, _| addressed.contains(worker) && !alive.contains(worker));
        for worker in addressed {
            if !alive.contains(&worker) {
                self.0.entry(worker).or_insert(now);
            }
        }
        self.0
            .iter()
            .filter(|(_, since)| now.duration_since(**since) > patience)
            .map(|(worker, _)| worker.clone())
            .collect()
    }
}

async fn round(fleet: &Fleet, absent: &mut Absent) -> Result<(), ReapError> {
    presence::declare_dead(fleet)
        .await
        .map_err(ReapError::Find)?;
    // One that cannot be seen to now does not hold up those after it.
    let mut first = Ok(());
    for worker in fleet.lease.reap().await.map_err(ReapError::Find)? {
        tracing::warn!(%worker, "worker is dead: its heartbeat ran out");
        first = first.and(Box::pin(see_to_and_bury(fleet, &worker)).await);
    }
    let subjects = fleet.broker.subjects();
    let waiting = fleet
        .broker
        .subject_counts(&fleet.broker.streams().placements, &subjects.placements())
        .await
        .map_err(ReapError::Orphans)?;
    let addressed: BTreeSet<WorkerId> = waiting
        .keys()
        .filter_map(|subject| match subjects.parse(subject) {
            Some(ParsedSubject::Placement { worker, .. }) => Some(worker),
            _ => None,
        })
        .collect();
    if addressed.is_empty() {
        absent.0.clear();
        return first;
    }
    let alive = fleet
        .lease
        .workers()
        .await
        .map_err(ReapError::Find)?
        .into_iter()
        .filter(|worker| worker.alive)
        .map(|worker| worker.record.worker)
        .collect();
    let patience = fleet.lease.ttl();
    for worker in absent.observe(addressed, &alive, Instant::now(), patience) {
        tracing::warn!(%worker, "placements wait for a worker that nobody knows");
        first = first.and(Box::pin(see_to(fleet, &worker)).await);
    }
    first
}

async fn see_to_and_bury(fleet: &Fleet, worker: &WorkerId) -> Result<(), ReapError> {
    Box::pin(see_to(fleet, worker)).await?;
    let buried = fleet.lease.bury(worker).await;
    buried.map_err(|source| ReapError::Bury {
        worker: worker.clone(),
        source,
    })
}

/// Reads what a dead worker left, through a consumer of our own: two on one subject are not
/// taken, so the worker's goes first.
async fn see_to(fleet: &Fleet, worker: &WorkerId) -> Result<(), ReapError> {
    let failed = |source| ReapError::Placements {
        worker: worker.clone(),
        source,
    };
    let subjects = fleet.broker.subjects();
    let theirs = worker_consumer(subjects, worker, BATCH);
    fleet
        .broker
        .delete_consumer(&theirs.stream, &theirs.durable)
        .await
        .map_err(failed)?;
    let def = ConsumerDef {
        durable: format!("reaper-{worker}"),
        inactive_threshold: Duration::from_secs(60),
        ..theirs
    };
    let mut puller = fleet.broker.puller(&def).await.map_err(failed)?;
    let seen: Result<(), BrokerError> = async {
        loop {
            puller.want(BATCH);
            if let Ok(delivery) = tokio::time::timeout(QUIET, puller.next()).await {
                Box::pin(take(fleet, worker, &delivery?)).await?;
                continue;
            }
            let left = fleet
                .broker
                .subject_counts(&def.stream, &def.filter)
                .await?;
            if left.values().sum::<usize>() == 0 {
                return Ok(());
            }
        }
    }
    .await;
    puller.close().await;
    let removed = fleet
        .broker
        .delete_consumer(&def.stream, &def.durable)
        .await;
    seen.map_err(failed)?;
    removed.map(drop).map_err(failed)
}

/// Sees to one placement, then acknowledges it.
async fn take(fleet: &Fleet, worker: &WorkerId, delivery: &Delivery) -> Result<(), BrokerError> {
    let read = delivery
        .format()
        .and_then(|format| codec::decode::<Placement>(&delivery.payload, format));
    match read {
        Ok(placement) => Box::pin(again(fleet, delivery, placement)).await?,
        Err(error) => unreadable(fleet, worker, delivery, &error).await?,
    }
    delivery.ack().await
}

async fn again(
    fleet: &Fleet,
    delivery: &Delivery,
    placement: Placement,
) -> Result<(), BrokerError> {
    let request = &placement.task;
    // Whoever may write here chose the subject; what the payload says of the tenant must agree.
    let addressed = fleet.broker.subjects().parse(&delivery.subject);
    let tenant_agrees = matches!(
        addressed,
        Some(ParsedSubject::Placement { tenant, .. }) if tenant == request.tenant
    );
    if !tenant_agrees {
        let error = ErrorInfo::new(
            ErrorCode::SubjectMismatch,
            format!("is {}, the subject is {}", request.tenant, delivery.subject),
        )
        .at("tenant");
        return unreadable(fleet, &placement.sandbox.worker, delivery, &error).await;
    }
    let stored = fleet.terminal_of(request).await?;
    if let Some(terminal) = stored {
        // The worker may have died before it could count it.
        Box::pin(cancel::count(fleet, request, &terminal)).await;
        return Ok(());
    }
    let format = delivery.format().unwrap_or_default();
    let trace = TraceHeaders::current_or(&delivery.trace());
    if request.session.is_some() {
        let terminal =
            Address::of(request).sandbox_lost(&placement.request_digest, &placement.sandbox);
        return fleet.end(&terminal, format, &trace).await.map(drop);
    }
    let subject = fleet
        .broker
        .subjects()
        .request(&request.tenant, &request.pool);
    let payload = codec::encode(request, format).map_err(|source| BrokerError::Encode {
        subject: subject.clone(),
        source,
    })?;
    tracing::info!(
        task = %request.id, tenant = %request.tenant, attempt = placement.attempt,
        worker = %placement.sandbox.worker, "task of a dead worker is queued again"
    );
    let outgoing = Outgoing {
        subject,
        message_id: Some(placement.retry_id()),
        format,
        payload: payload.into(),
        trace,
        headers: vec![(HEADER_DIGEST, placement.request_digest.clone())],
    };
    fleet.broker.publish(outgoing, PATIENCE).await?;
    failpoint::step(failpoint::dispatcher::REQUEUED);
    fleet.metrics.redispatched.add(1, ());
    Ok(())
}

async fn unreadable(
    fleet: &Fleet,
    worker: &WorkerId,
    delivery: &Delivery,
    error: &ErrorInfo,
) -> Result<(), BrokerError> {
    let tenant = match fleet.broker.subjects().parse(&delivery.subject) {
        Some(ParsedSubject::Placement { tenant, .. }) => Some(tenant),
        _ => None,
    };
    let unknown = PoolId::new("unknown").ok();
    let (Some(tenant), Some(pool)) = (tenant, unknown) else {
        tracing::warn!(%worker, subject = delivery.subject, "placement dropped: {error}");
        return Ok(());
    };
    let reason = format!("placement of dead worker {worker}: {error}");
    let letter = DeadLetter::of("run", delivery, None, error.code, reason);
    fleet.dead_letter((&tenant, &pool), letter).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_given_time_to_appear() {
        let id = |name: &str| name.parse::<WorkerId>().unwrap();
        let (mut absent, start) = (Absent::default(), Instant::now());
        let patience = Duration::from_secs(15);
        let addressed = BTreeSet::from([id("a"), id("b"), id("c")]);
        let mut at = |secs, alive: &[&str]| {
            let alive = alive.iter().map(|name| id(name)).collect();
            let now = start + Duration::from_secs(secs);
            absent.observe(addressed.clone(), &alive, now, patience)
        };
        assert_eq!(at(0, &["a"]), []);
        assert_eq!(at(10, &["a", "b"]), []);
        assert_eq!(at(16, &["a"]), [id("c")]);
        assert_eq!(at(40, &["a", "c"]), [id("b")]);
    }
}
