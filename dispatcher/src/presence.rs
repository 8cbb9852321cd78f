//! Workers that are gone before their heartbeat has run out.
//!
//! A killed worker's connection to NATS ends with it, so that nobody is left who listens to its
//! control subject: the server says so at once. That alone would not do, for a worker may have
//! lost NATS and nothing else; and silence in Redis alone is waited out for a whole life of a
//! lease, for a worker may be slow. Both together are a death.

use std::time::Duration;

use async_nats::RequestErrorKind;
use broker_schema::codec::{self, Format};
use broker_schema::{ControlMessage, WorkerId};
use futures::{StreamExt as _, stream};
use remuda_lease::{LeaseError, WorkerInfo};

use crate::fleet::Fleet;

/// How long an answer to "is anybody there" may take; one who listens does not answer.
const ASK: Duration = Duration::from_millis(300);
/// Workers that are asked for at once.
const AT_ONCE: usize = 32;

/// Declares those dead that are silent and gone: what reaps finds them in the same round.
pub(crate) async fn declare_dead(fleet: &Fleet) -> Result<(), LeaseError> {
    let silence = silence(fleet.lease.ttl());
    let workers = fleet.lease.workers().await?;
    let silent = workers
        .into_iter()
        .filter(|worker| is_silent(worker, silence));
    let gone: Vec<WorkerId> = stream::iter(silent)
        .map(async |worker| {
            let worker = worker.record.worker;
            is_gone(fleet, &worker).await.then_some(worker)
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    for worker in gone {
        if fleet.lease.declare_dead(&worker, silence).await? {
            tracing::warn!(%worker, "worker is silent, and nobody listens under its name");
        }
    }
    Ok(())
}

/// Long enough for three heartbeats to be missed.
fn silence(ttl: Duration) -> Duration {
    ttl / 2
}

fn is_silent(worker: &WorkerInfo, silence: Duration) -> bool {
    worker.alive && worker.last_seen >= silence
}

/// Whether NATS knows nobody who listens as this worker. What is sent is a hint that a worker
/// answers with a heartbeat.
async fn is_gone(fleet: &Fleet, worker: &WorkerId) -> bool {
    let Ok(hint) = codec::encode(&ControlMessage::Pools, Format::MessagePack) else {
        return false;
    };
    let subject = fleet.broker.subjects().control(worker);
    let asked = fleet.broker.nats().request(subject, hint.into());
    match tokio::time::timeout(ASK, asked).await {
        Ok(Err(error)) => error.kind() == RequestErrorKind::NoResponders,
        Ok(Ok(_)) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use broker_schema::Timestamp;
    use remuda_lease::WorkerRecord;

    use super::*;

    #[test]
    fn only_one_that_missed_heartbeats_and_is_not_reaped_anyway_is_asked_for() {
        let ttl = Duration::from_secs(15);
        for (seconds, alive, expected) in [
            (0, true, false),
            (7, true, false),
            (8, true, true),
            (14, true, true),
            (16, false, false),
        ] {
            let worker = WorkerInfo {
                record: WorkerRecord {
                    worker: "w".parse().unwrap(),
                    incarnation: 1,
                    schema: 1,
                    backends: Vec::new(),
                    slots: 1,
                    pools: std::collections::BTreeMap::new(),
                    host: String::new(),
                    pid: 0,
                    started_at: Timestamp(0),
                },
                alive,
                draining: false,
                last_seen: Duration::from_secs(seconds),
            };
            assert_eq!(is_silent(&worker, silence(ttl)), expected, "{seconds} s");
        }
    }
}
