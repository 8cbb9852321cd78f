//! Workers: registration, heartbeats, targets.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use broker_schema::pool::{BackendKind, PoolSpec};
use broker_schema::{PoolId, Timestamp, WorkerId};
use serde::{Deserialize, Serialize};

use crate::answer::{Answer, garbled};
use crate::error::{Fault, LeaseError};
use crate::store::LeaseStore;

/// What a worker says about itself with every heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    pub worker: WorkerId,
    /// The incarnation that it works under; 0 before it knows one.
    pub incarnation: u32,
    /// Version of the wire contract that it speaks.
    pub schema: u32,
    pub backends: Vec<BackendKind>,
    /// Sandboxes that it can run at once.
    pub slots: u32,
    #[serde(default)]
    pub pools: BTreeMap<PoolId, PoolCount>,
    #[serde(default)]
    pub host: String,
    #[serde(default)]
    pub pid: u32,
    #[serde(default)]
    pub started_at: Timestamp,
}

/// Sandboxes that a worker has of one pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolCount {
    pub warm: u32,
    pub leased: u32,
}

/// What a worker should keep of one pool.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolTarget {
    pub spec: PoolSpec,
    pub warm: u32,
    pub max: u32,
}

/// What a heartbeat brings back.
#[derive(Debug, Clone, PartialEq)]
pub struct HeartbeatReply {
    /// The incarnation in force. Where it is not the record's, the heartbeat was not taken:
    /// adopt it, send the heartbeat again, offer every clean idle sandbox again.
    pub incarnation: Option<u32>,
    pub draining: bool,
    pub targets: Vec<PoolTarget>,
}

/// A worker as the registry sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerInfo {
    pub record: WorkerRecord,
    pub alive: bool,
    pub draining: bool,
    /// How long ago it was heard of.
    pub last_seen: Duration,
}

impl LeaseStore {
    /// The first heartbeat of a worker's life. Refused where the fleet does not take workers of
    /// its schema version.
    pub async fn register(&self, record: &WorkerRecord) -> Result<HeartbeatReply, LeaseError> {
        self.beat(record, true).await.map_err(|fault| match fault {
            Fault::Schema { oldest, newest } => LeaseError::SchemaRefused {
                worker: record.worker.clone(),
                ours: record.schema,
                oldest,
                newest,
            },
            source => LeaseError::Register {
                worker: record.worker.clone(),
                source,
            },
        })
    }

    /// Says which schema versions of workers the fleet takes. A worker of another one that is
    /// registered is told to leave with its next heartbeat.
    pub async fn set_schemas(&self, taken: RangeInclusive<u32>) -> Result<(), LeaseError> {
        let range = format!("{}:{}", taken.start(), taken.end());
        let answer = self.run(&self.scripts().schema, &[range]).await;
        answer.map(drop).map_err(LeaseError::Schema)
    }

    /// Which schema versions of workers the fleet takes; `None` where nobody has said so.
    pub async fn schemas(&self) -> Result<Option<RangeInclusive<u32>>, LeaseError> {
        let answer = self.run(&self.scripts().schema, &[]).await;
        answer.and_then(schemas).map_err(LeaseError::Schema)
    }

    /// Says that a worker is alive and asks what it should do. Taken only under the incarnation
    /// in force. It revives a worker that was thought dead; its leases stay lost.
    pub async fn heartbeat(&self, record: &WorkerRecord) -> Result<HeartbeatReply, LeaseError> {
        self.beat(record, false)
            .await
            .map_err(|source| LeaseError::Heartbeat {
                worker: record.worker.clone(),
                source,
            })
    }

    async fn beat(&self, record: &WorkerRecord, first: bool) -> Result<HeartbeatReply, Fault> {
        let json = serde_json::to_string(record).map_err(|source| Fault::Encode {
            what: "worker record",
            source,
        })?;
        let args = [
            record.worker.to_string(),
            record.incarnation.to_string(),
            json,
            u8::from(first).to_string(),
            self.ttl_millis(),
        ];
        let answer = self.run(&self.scripts().heartbeat, &args).await?;
        reply(answer)
    }

    /// Marks a worker as leaving, or not. False where nobody knows it.
    pub async fn set_draining(
        &self,
        worker: &WorkerId,
        draining: bool,
    ) -> Result<bool, LeaseError> {
        let args = [worker.to_string(), u8::from(draining).to_string()];
        let answer = self.run(&self.scripts().set_draining, &args).await;
        answer
            .and_then(|mut answer| answer.tag())
            .map(|tag| tag == "ok")
            .map_err(|source| LeaseError::Drain {
                worker: worker.clone(),
                source,
            })
    }

    /// A worker leaves; its inventory and its leases go with it.
    pub async fn deregister(&self, worker: &WorkerId) -> Result<(), LeaseError> {
        let args = [worker.to_string()];
        let answer = self.run(&self.scripts().deregister, &args).await;
        answer.map(drop).map_err(|source| LeaseError::Deregister {
            worker: worker.clone(),
            source,
        })
    }

    /// All workers, the dead ones that nobody has reaped yet among them.
    pub async fn workers(&self) -> Result<Vec<WorkerInfo>, LeaseError> {
        let args = [self.ttl_millis()];
        let answer = self.run(&self.scripts().workers, &args).await;
        answer.and_then(infos).map_err(LeaseError::Workers)
    }

    /// What was refused so far, by what it was: heartbeats in another's name, renewals and
    /// releases of leases that were not, or no longer, the caller's.
    pub async fn refusals(&self) -> Result<BTreeMap<String, u64>, LeaseError> {
        let read = async {
            let mut answer = self.run(&self.scripts().refusals, &[]).await?;
            let mut refused = BTreeMap::new();
            while !answer.is_done() {
                let what = answer.text("refusal")?;
                refused.insert(what, answer.value("count")?);
            }
            Ok(refused)
        };
        read.await.map_err(LeaseError::Refusals)
    }

    /// Sets how many sandboxes of each pool a worker should keep (warm) and may have (max).
    /// False where nobody knows the worker.
    pub async fn set_targets(
        &self,
        worker: &WorkerId,
        targets: &[(PoolId, u32, u32)],
    ) -> Result<bool, LeaseError> {
        let mut args = vec![worker.to_string()];
        for (pool, warm, max) in targets {
            args.push(pool.to_string());
            args.push(format!("{warm}:{max}"));
        }
        let answer = self.run(&self.scripts().set_targets, &args).await;
        answer
            .and_then(|mut answer| answer.tag())
            .map(|tag| tag == "ok")
            .map_err(|source| LeaseError::Targets {
                worker: worker.clone(),
                source,
            })
    }
}

fn reply(mut answer: Answer) -> Result<HeartbeatReply, Fault> {
    let tag = answer.tag()?;
    // Of a refusal it is the oldest schema version.
    let incarnation = answer.optional("incarnation")?;
    let mut reply = HeartbeatReply {
        incarnation,
        draining: false,
        targets: Vec::new(),
    };
    match tag.as_str() {
        "stale" => Ok(reply),
        "taken" => Err(Fault::NameTaken {
            process: answer.text("process")?,
        }),
        "schema" => Err(Fault::Schema {
            oldest: incarnation.unwrap_or_default(),
            newest: answer.value("schema version")?,
        }),
        "ok" => {
            reply.draining = answer.flag("draining")?;
            while !answer.is_done() {
                let pool = answer.text("pool")?;
                let counts = answer.text("target")?;
                let spec = answer.text("pool spec")?;
                if let Some(target) = target(&pool, &counts, &spec) {
                    reply.targets.push(target);
                } else {
                    // One bad entry must not stop the others, nor the heartbeat.
                    tracing::warn!(pool, "a pool or target in redis cannot be read");
                }
            }
            Ok(reply)
        }
        other => Err(garbled("answer", other)),
    }
}

fn schemas(mut answer: Answer) -> Result<Option<RangeInclusive<u32>>, Fault> {
    answer.tag()?;
    let text = answer.text("schema versions")?;
    if text.is_empty() {
        return Ok(None);
    }
    let range = text
        .split_once(':')
        .and_then(|(oldest, newest)| Some(oldest.parse().ok()?..=newest.parse().ok()?));
    range
        .map(Some)
        .ok_or_else(|| garbled("schema versions", &text))
}

fn target(pool: &str, counts: &str, spec: &str) -> Option<PoolTarget> {
    let (warm, max) = counts.split_once(':')?;
    let spec: PoolSpec = serde_json::from_str(spec).ok()?;
    (spec.name.as_str() == pool).then_some(())?;
    Some(PoolTarget {
        spec,
        warm: warm.parse().ok()?,
        max: max.parse().ok()?,
    })
}

fn infos(mut answer: Answer) -> Result<Vec<WorkerInfo>, Fault> {
    let mut workers = Vec::new();
    while !answer.is_done() {
        let worker = answer.text("worker id")?;
        let last_seen = answer.millis("age")?;
        let alive = answer.flag("alive")?;
        let draining = answer.flag("draining")?;
        let json = answer.text("worker record")?;
        match serde_json::from_str::<WorkerRecord>(&json) {
            Ok(record) if record.worker.as_str() == worker => workers.push(WorkerInfo {
                record,
                alive,
                draining,
                last_seen,
            }),
            _ => {
                tracing::warn!(
                    worker,
                    "a worker's record in redis cannot be read, left out"
                );
            }
        }
    }
    Ok(workers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(texts: &[&str]) -> Answer {
        Answer::new(texts.iter().map(|&t| t.to_owned()).collect())
    }

    #[test]
    fn a_bad_target_does_not_cost_the_others() {
        let spec = serde_json::to_string(&PoolSpec::named("py".parse().unwrap())).unwrap();
        let read = reply(answer(&[
            "ok", "3", "1", "bad", "1:2", "{", "py", "4:8", &spec, "py", "x", &spec, "other",
            "1:2", &spec,
        ]))
        .unwrap();
        assert_eq!(read.incarnation, Some(3));
        assert!(read.draining);
        assert_eq!(read.targets.len(), 1);
        assert_eq!((read.targets[0].warm, read.targets[0].max), (4, 8));
    }

    #[test]
    fn a_stale_heartbeat_learns_the_incarnation() {
        assert_eq!(reply(answer(&["stale", "7"])).unwrap().incarnation, Some(7));
        assert_eq!(reply(answer(&["stale", ""])).unwrap().incarnation, None);
        let refused = reply(answer(&["schema", "2", "3"]));
        assert!(matches!(
            refused,
            Err(Fault::Schema {
                oldest: 2,
                newest: 3
            })
        ));
        for bad in [&["huh"][..], &["stale", "x"], &["ok"], &["ok", "1"], &[]] {
            assert!(reply(answer(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_worker_that_cannot_be_read_is_left_out() {
        let list = answer(&["w1", "5", "1", "0", "not json", "w2", "5", "1", "0", "{}"]);
        assert_eq!(infos(list).unwrap(), []);
        assert!(infos(answer(&["w1", "x"])).is_err());
    }
}
