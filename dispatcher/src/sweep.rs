//! The sweep: finds messages of the work queues that no consumer will deliver any more, whose
//! advisory was lost or never sent. Whoever leads the fleet does it now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use broker_schema::stream::worker_consumer;
use broker_schema::{ParsedSubject, WorkerId, subject_matches};
use remuda_client::broker::{BrokerError, ConsumerState};
use remuda_lease::LeaseError;
use remuda_telemetry::Chain;

use crate::fleet::Fleet;
use crate::undeliverable;

/// Most messages of one consumer or subject that are seen to in one round.
const MOST: usize = 64;

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error("cannot look through the work queues")]
    Broker(#[from] BrokerError),
    #[error("cannot tell which workers are alive")]
    Workers(#[source] LeaseError),
}

/// Consumers, by stream, name and time of their making, that had something stuck a round ago.
type Suspects = BTreeSet<(String, String, i128)>;

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut turn = tokio::time::interval(fleet.options.timings.sweep);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut suspects = Suspects::new();
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = turn.tick() => {}
        }
        if !fleet.leadership.leads_fleet() {
            suspects.clear();
            continue;
        }
        let swept = tokio::select! {
            () = fleet.group.token().cancelled() => return,
            swept = round(&fleet, &suspects) => swept,
        };
        match swept {
            Ok(found) => suspects = found,
            Err(error) => tracing::debug!(error = %Chain(&error), "the sweep waits"),
        }
    }
}

async fn round(fleet: &Fleet, suspects: &Suspects) -> Result<Suspects, SweepError> {
    let streams = fleet.broker.streams();
    let mut found = Suspects::new();
    for stream in [&streams.requests, &streams.placements] {
        let consumers = fleet.broker.consumers(stream).await?;
        let counts = fleet.broker.subject_counts(stream, ">").await?;
        for consumer in &consumers {
            if !may_have_stuck(&counts, consumer) {
                continue;
            }
            let stuck = delivered_and_left(fleet, stream, consumer).await?;
            if stuck.len() as u64 <= consumer.ack_pending {
                continue;
            }
            let key = (stream.clone(), consumer.durable.clone(), consumer.created);
            if suspects.contains(&key) {
                free(fleet, stream, consumer, stuck).await?;
            } else {
                found.insert(key);
            }
        }
        if stream == &streams.placements {
            orphans(fleet, &counts, &consumers).await?;
        }
    }
    Ok(found)
}

/// Whether more is stored than a consumer has out or will deliver. What came or went between the
/// two looks makes this a guess.
fn may_have_stuck(counts: &BTreeMap<String, usize>, consumer: &ConsumerState) -> bool {
    let stored: u64 = counts
        .iter()
        .filter(|(subject, _)| subject_matches(&consumer.filter, subject))
        .map(|(_, count)| *count as u64)
        .sum();
    stored > consumer.pending.saturating_add(consumer.ack_pending)
}

/// The sequences of what a consumer has delivered and is still stored, up to one more than it
/// says it has out. Where that many are left, one of them is stuck for certain: nothing can come
/// to be among them after the consumer was looked at.
async fn delivered_and_left(
    fleet: &Fleet,
    stream: &str,
    consumer: &ConsumerState,
) -> Result<Vec<u64>, BrokerError> {
    let filter = match consumer.filter.as_str() {
        "" => ">",
        filter => filter,
    };
    let most = match usize::try_from(consumer.ack_pending) {
        Ok(0) => MOST,
        out => out.unwrap_or(usize::MAX).saturating_add(1),
    };
    let (mut left, mut from) = (Vec::new(), 1);
    while left.len() < most
        && let Some(message) = fleet.broker.next_stored(stream, filter, from).await?
        && message.sequence <= consumer.delivered
    {
        from = message.sequence + 1;
        left.push(message.sequence);
    }
    Ok(left)
}

/// Where the consumer has nothing out, everything that it has delivered is stuck. Otherwise
/// nobody can tell which: it is made anew, and delivers all of it again.
async fn free(
    fleet: &Fleet,
    stream: &str,
    consumer: &ConsumerState,
    stuck: Vec<u64>,
) -> Result<(), BrokerError> {
    if consumer.ack_pending > 0 {
        tracing::warn!(
            stream,
            consumer = consumer.durable,
            "messages are stuck among others that are worked on: all are delivered again"
        );
        // Whoever pulls from it makes it again.
        let durable = &consumer.durable;
        return fleet
            .broker
            .delete_consumer(stream, durable)
            .await
            .map(drop);
    }
    for sequence in stuck {
        let Some(message) = fleet.broker.stored_message(stream, sequence).await? else {
            continue;
        };
        tracing::warn!(
            stream,
            consumer = consumer.durable,
            sequence,
            "a message is stuck: no consumer will deliver it again"
        );
        let reason = format!("{} will not deliver it again", consumer.durable);
        undeliverable::bury(fleet, stream, message, reason).await?;
    }
    Ok(())
}

/// Placements that no consumer covers. Those of dead workers are the reaper's.
async fn orphans(
    fleet: &Fleet,
    counts: &BTreeMap<String, usize>,
    consumers: &[ConsumerState],
) -> Result<(), SweepError> {
    let covered = |subject: &str| {
        consumers
            .iter()
            .any(|consumer| subject_matches(&consumer.filter, subject))
    };
    let mut addressed = BTreeSet::new();
    for subject in counts.keys().filter(|subject| !covered(subject)) {
        match fleet.broker.subjects().parse(subject) {
            Some(ParsedSubject::Placement { worker, .. }) => {
                addressed.insert(worker);
            }
            _ => strays(fleet, subject).await?,
        }
    }
    if addressed.is_empty() {
        return Ok(());
    }
    for info in fleet.lease.workers().await.map_err(SweepError::Workers)? {
        let worker: &WorkerId = &info.record.worker;
        if info.alive && addressed.contains(worker) {
            tracing::warn!(%worker, "a worker's consumer is gone: it is made again");
            let slots = info.record.slots as usize;
            let def = worker_consumer(fleet.broker.subjects(), worker, slots);
            fleet.broker.ensure_consumer(&def).await?;
        }
    }
    Ok(())
}

/// Placements under a subject that is no worker's.
async fn strays(fleet: &Fleet, subject: &str) -> Result<(), BrokerError> {
    let stream = &fleet.broker.streams().placements;
    for _ in 0..MOST {
        // A subject with a wildcard in it finds the messages of others.
        let message = match fleet.broker.next_stored(stream, subject, 1).await? {
            Some(message) if message.subject == subject => message,
            _ => return Ok(()),
        };
        let reason = "no worker can have this subject".to_owned();
        undeliverable::bury(fleet, stream, message, reason).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_out_nor_to_come_may_be_stuck() {
        let counts = BTreeMap::from([
            ("remuda.run.w1.a.x".to_owned(), 2),
            ("remuda.run.w1.b.y".to_owned(), 1),
            ("remuda.run.w2.a.z".to_owned(), 9),
        ]);
        let mut consumer = ConsumerState {
            durable: "worker-w1".to_owned(),
            filter: "remuda.run.w1.*.*".to_owned(),
            created: 0,
            delivered: 0,
            ack_pending: 0,
            pending: 3,
        };
        for (pending, ack_pending, expected) in [
            (3, 0, false),
            (0, 3, false),
            (1, 2, false),
            (1, 1, true),
            (0, 0, true),
            (9, 9, false),
        ] {
            consumer.pending = pending;
            consumer.ack_pending = ack_pending;
            assert_eq!(
                may_have_stuck(&counts, &consumer),
                expected,
                "{pending} {ack_pending}"
            );
        }
    }
}
