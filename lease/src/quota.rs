//! What tenants and pools have: quotas, and the numbers that credit is made of.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use broker_schema::{Credit, PoolId, TenantId};

use crate::error::{Fault, LeaseError};
use crate::store::LeaseStore;

/// What a tenant may have at once; `None` for as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Leased sandboxes, sessions among them.
    pub sandboxes: Option<u32>,
    /// Tasks that run.
    pub running: Option<u32>,
    /// Sandboxes that are sessions.
    pub sessions: Option<u32>,
}

/// Which number of a [`Quota`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaKind {
    Sandboxes,
    Running,
    Sessions,
}

impl QuotaKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Running => "running",
            Self::Sessions => "sessions",
        }
    }
}

impl fmt::Display for QuotaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for QuotaKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Sandboxes, Self::Running, Self::Sessions]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or(())
    }
}

/// What a tenant has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantUse {
    pub sandboxes: u32,
    pub running: u32,
    pub sessions: u32,
}

/// What a pool has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolUse {
    pub warm: u64,
    pub leased: u64,
}

impl LeaseStore {
    pub async fn tenant_use(&self, tenant: &TenantId) -> Result<TenantUse, LeaseError> {
        let answer = self
            .run(&self.scripts().tenant_use, &[tenant.to_string()])
            .await;
        answer
            .and_then(|mut answer| {
                Ok(TenantUse {
                    sandboxes: answer.value("sandboxes")?,
                    running: answer.value("running tasks")?,
                    sessions: answer.value("sessions")?,
                })
            })
            .map_err(LeaseError::Counts)
    }

    pub async fn pool_use(&self) -> Result<BTreeMap<PoolId, PoolUse>, LeaseError> {
        let mut answer = self
            .run(&self.scripts().pool_use, &[])
            .await
            .map_err(LeaseError::Counts)?;
        let mut pools = BTreeMap::new();
        while !answer.is_done() {
            let pool = answer.text("pool").map_err(LeaseError::Counts)?;
            let count = PoolUse {
                warm: answer.value("warm").map_err(LeaseError::Counts)?,
                leased: answer.value("leased").map_err(LeaseError::Counts)?,
            };
            // One that cannot be read is told of where the pools are read.
            if let Ok(pool) = pool.parse() {
                pools.insert(pool, count);
            }
        }
        Ok(pools)
    }

    /// Keeps what was published last, for people who look.
    pub async fn set_credits(&self, credits: &[Credit]) -> Result<(), LeaseError> {
        if credits.is_empty() {
            return Ok(());
        }
        let mut args = Vec::with_capacity(credits.len() * 2);
        for credit in credits {
            args.push(credit.pool.to_string());
            args.push(serde_json::to_string(credit).map_err(|source| {
                LeaseError::Counts(Fault::Encode {
                    what: "credit",
                    source,
                })
            })?);
        }
        let answer = self.run(&self.scripts().set_credit, &args).await;
        answer.map(drop).map_err(LeaseError::Counts)
    }

    /// What was published last for each pool. What cannot be read is left out.
    pub async fn credits(&self) -> Result<BTreeMap<PoolId, Credit>, LeaseError> {
        let mut get = redis::cmd("HGETALL");
        get.arg(self.key("credit"));
        let stored: BTreeMap<String, String> =
            self.command(&get).await.map_err(LeaseError::Counts)?;
        let read = |json: &String| serde_json::from_str::<Credit>(json).ok();
        Ok(stored
            .values()
            .filter_map(read)
            .map(|credit| (credit.pool.clone(), credit))
            .collect())
    }
}
