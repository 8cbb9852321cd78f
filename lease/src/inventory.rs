//! Pools and the warm sandboxes in them.

use std::collections::BTreeMap;

use broker_schema::pool::PoolSpec;
use broker_schema::{Epoch, PoolId, SandboxId, WorkerId};

use crate::answer::{Answer, garbled};
use crate::error::{Fault, LeaseError};
use crate::store::LeaseStore;

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    /// All are in the inventory, or leased to somebody whose placement is on its way. `fresh`
    /// were not warm before.
    Taken { fresh: u32 },
    /// Nothing was taken: another incarnation is in force, or none. Send a heartbeat.
    StaleIncarnation { current: Option<u32> },
    /// Nothing was taken: nobody knows the worker. Send a heartbeat.
    Unregistered,
}

/// What the registry says of one sandbox of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// In the inventory, under this incarnation.
    Warm { incarnation: u32 },
    /// Leased; `live` until the lease has run out.
    Leased { epoch: Epoch, live: bool },
}

impl LeaseStore {
    /// Everything that the registry says one worker has. What cannot be read is left out.
    pub async fn held(&self, worker: &WorkerId) -> Result<BTreeMap<SandboxId, Held>, LeaseError> {
        let answer = self.run(&self.scripts().held, &[worker.to_string()]).await;
        answer.and_then(held).map_err(|source| LeaseError::Held {
            worker: worker.clone(),
            source,
        })
    }

    /// Offers sandboxes that are verified clean and idle. Repeating it changes nothing, so a
    /// worker offers all its idle sandboxes with every heartbeat: a sandbox whose placement
    /// never came returns to the inventory by it.
    pub async fn offer(
        &self,
        worker: &WorkerId,
        incarnation: u32,
        pool: &PoolId,
        sandboxes: &[SandboxId],
    ) -> Result<Offered, LeaseError> {
        let mut args = vec![
            worker.to_string(),
            incarnation.to_string(),
            pool.to_string(),
        ];
        args.extend(sandboxes.iter().map(ToString::to_string));
        let answer = self.run(&self.scripts().offer, &args).await;
        answer
            .and_then(|mut answer| match answer.tag()?.as_str() {
                "ok" => Ok(Offered::Taken {
                    fresh: answer.value("count")?,
                }),
                "stale" => Ok(Offered::StaleIncarnation {
                    current: answer.optional("incarnation")?,
                }),
                "unregistered" => Ok(Offered::Unregistered),
                other => Err(garbled("answer", other)),
            })
            .map_err(|source| LeaseError::Offer {
                worker: worker.clone(),
                pool: pool.clone(),
                sandboxes: sandboxes.len(),
                source,
            })
    }

    /// Takes an idle sandbox back. True: nobody can be given it any more. False: it is leased,
    /// expect its placement.
    pub async fn withdraw(
        &self,
        worker: &WorkerId,
        sandbox: SandboxId,
    ) -> Result<bool, LeaseError> {
        let args = [worker.to_string(), sandbox.to_string()];
        let answer = self.run(&self.scripts().withdraw, &args).await;
        answer
            .and_then(|mut answer| match answer.tag()?.as_str() {
                "gone" => Ok(true),
                "leased" => Ok(false),
                other => Err(garbled("answer", other)),
            })
            .map_err(|source| LeaseError::Withdraw {
                worker: worker.clone(),
                sandbox,
                source,
            })
    }

    /// Warm sandboxes of each pool.
    pub async fn warm_counts(&self) -> Result<BTreeMap<PoolId, u64>, LeaseError> {
        let mut answer = self
            .run(&self.scripts().warm_counts, &[])
            .await
            .map_err(LeaseError::Pools)?;
        let mut counts = BTreeMap::new();
        while !answer.is_done() {
            let pool = answer.text("pool").map_err(LeaseError::Pools)?;
            let count = answer.value("count").map_err(LeaseError::Pools)?;
            if let Ok(pool) = pool.parse() {
                counts.insert(pool, count);
            } else {
                tracing::warn!(pool, "a pool's name in redis cannot be read, left out");
            }
        }
        Ok(counts)
    }

    /// Replaces the pools.
    pub async fn set_pools(&self, pools: &[PoolSpec]) -> Result<(), LeaseError> {
        let mut args = Vec::with_capacity(pools.len() * 2);
        for pool in pools {
            args.push(pool.name.to_string());
            args.push(serde_json::to_string(pool).map_err(|source| {
                LeaseError::Pools(Fault::Encode {
                    what: "pool",
                    source,
                })
            })?);
        }
        let answer = self.run(&self.scripts().set_pools, &args).await;
        answer.map(drop).map_err(LeaseError::Pools)
    }

    /// The pools, in the order of their names. What cannot be read is left out.
    pub async fn pools(&self) -> Result<Vec<PoolSpec>, LeaseError> {
        let mut get = redis::cmd("HGETALL");
        get.arg(self.key("pools"));
        let stored: BTreeMap<String, String> = match self.command(&get).await {
            Err(fault) if self.mended(&fault).await => self.command(&get).await,
            done => done,
        }
        .map_err(LeaseError::Pools)?;
        let mut pools = Vec::with_capacity(stored.len());
        for (name, json) in stored {
            match serde_json::from_str::<PoolSpec>(&json) {
                Ok(pool) if pool.name.as_str() == name => pools.push(pool),
                _ => tracing::warn!(pool = name, "a pool in redis cannot be read, left out"),
            }
        }
        Ok(pools)
    }
}

fn held(mut answer: Answer) -> Result<BTreeMap<SandboxId, Held>, Fault> {
    let mut all = BTreeMap::new();
    while !answer.is_done() {
        let [sandbox, state, incarnation, counter] = [
            answer.text("sandbox id")?,
            answer.text("state")?,
            answer.text("incarnation")?,
            answer.text("epoch counter")?,
        ];
        let read = || {
            let incarnation = incarnation.parse().ok()?;
            let held = match state.as_str() {
                "warm" => Held::Warm { incarnation },
                "leased" | "over" => Held::Leased {
                    epoch: Epoch::new(incarnation, counter.parse().ok()?),
                    live: state == "leased",
                },
                _ => return None,
            };
            Some((sandbox.parse().ok()?, held))
        };
        if let Some((sandbox, held)) = read() {
            all.insert(sandbox, held);
        } else {
            tracing::warn!(sandbox, "a sandbox in redis cannot be read, left out");
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_has_is_read_and_garbage_left_out() {
        let ids: Vec<SandboxId> = (0..3).map(|_| SandboxId::new()).collect();
        let texts: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let [a, b, c] = [&texts[0], &texts[1], &texts[2]];
        let answer = [
            a, "warm", "3", "0", b, "leased", "3", "7", c, "over", "2", "9", "no uuid", "warm",
            "1", "0", a, "odd", "1", "0",
        ];
        let read = held(Answer::new(answer.map(str::to_owned).into())).unwrap();
        let leased = |incarnation, counter, live| Held::Leased {
            epoch: Epoch::new(incarnation, counter),
            live,
        };
        assert_eq!(
            read.into_iter().collect::<Vec<_>>(),
            [
                (ids[0], Held::Warm { incarnation: 3 }),
                (ids[1], leased(3, 7, true)),
                (ids[2], leased(2, 9, false)),
            ]
        );
        assert!(held(Answer::new(vec![a.clone()])).is_err());
    }
}
