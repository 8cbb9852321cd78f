//! Pools and the warm sandboxes in them.

use std::collections::BTreeMap;

use broker_schema::pool::PoolSpec;
use broker_schema::{PoolId, SandboxId, WorkerId};

use crate::answer::garbled;
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

impl LeaseStore {
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
        let stored: BTreeMap<String, String> =
            self.command(&get).await.map_err(LeaseError::Pools)?;
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
