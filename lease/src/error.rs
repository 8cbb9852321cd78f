//! What can go wrong: a variant per operation with its inputs, and the fault under it.

use std::time::Duration;

use broker_schema::{
    DispatcherId, ErrorCode, PoolId, RunId, SandboxId, TaskId, TenantId, WorkerId,
};
use deadpool_redis::PoolError;
use redis::RedisError;

/// What went wrong between here and Redis.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    #[error("no answer within {after:?}")]
    Timeout { after: Duration },
    #[error("no connection")]
    Pool(#[source] PoolError),
    #[error("redis refused")]
    Redis(#[source] RedisError),
    /// Something else writes under the fleet's keys, or another version does.
    #[error("unexpected {what}: {found:?}, are other programs using these keys?")]
    Garbled { what: &'static str, found: String },
    #[error("cannot write {what} as JSON")]
    Encode {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "process {process} (host/pid) is that worker and is alive: stop it, or give this one another name"
    )]
    NameTaken { process: String },
    #[error("the fleet takes workers of schema version {oldest} to {newest}")]
    Schema { oldest: u32, newest: u32 },
    /// 2³² epochs were handed out. A new incarnation begins when the keys are removed.
    #[error("the epoch counter is spent, delete the key \"incarnation\" to begin a new one")]
    CounterSpent,
}

/// An operation that failed. `Fault` says why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    #[error("redis options are not usable: {}", problems.join("; "))]
    Options { problems: Vec<String> },
    #[error("{url:?} is no redis URL, expected redis://host:port")]
    Url {
        url: String,
        #[source]
        source: RedisError,
    },
    #[error("cannot make a connection pool for redis at {url}")]
    Pool {
        url: String,
        #[source]
        source: deadpool_redis::BuildError,
    },
    #[error("cannot reach redis at {url}, is it running?")]
    Connect {
        url: String,
        #[source]
        source: Fault,
    },
    #[error("redis at {url} is version {found}, at least 7.0 is needed")]
    TooOld { url: String, found: String },
    #[error("cannot read or install the incarnation")]
    Incarnation(#[source] Fault),
    #[error("cannot register worker {worker}")]
    Register {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
    #[error(
        "worker {worker} has schema version {ours}, the fleet takes {oldest} to {newest}: {}",
        if ours < oldest { "install a newer worker" } else { "upgrade the dispatchers first" }
    )]
    SchemaRefused {
        worker: WorkerId,
        ours: u32,
        oldest: u32,
        newest: u32,
    },
    #[error("cannot read or set the schema versions that the fleet takes")]
    Schema(#[source] Fault),
    #[error("cannot send the heartbeat of worker {worker}")]
    Heartbeat {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
    #[error("cannot set draining of worker {worker}")]
    Drain {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
    #[error("cannot deregister worker {worker}")]
    Deregister {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
    #[error("cannot list workers")]
    Workers(#[source] Fault),
    #[error("cannot read or write pools")]
    Pools(#[source] Fault),
    #[error("cannot set the targets of worker {worker}")]
    Targets {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
    #[error("cannot offer {sandboxes} sandboxes of worker {worker} in pool {pool}")]
    Offer {
        worker: WorkerId,
        pool: PoolId,
        sandboxes: usize,
        #[source]
        source: Fault,
    },
    #[error("cannot withdraw sandbox {sandbox} of worker {worker}")]
    Withdraw {
        worker: WorkerId,
        sandbox: SandboxId,
        #[source]
        source: Fault,
    },
    #[error("cannot claim a sandbox of pool {pool} for task {tenant}/{task}")]
    Claim {
        tenant: TenantId,
        task: TaskId,
        pool: PoolId,
        #[source]
        source: Fault,
    },
    #[error("cannot give back the claim of task {tenant}/{task}")]
    Unclaim {
        tenant: TenantId,
        task: TaskId,
        #[source]
        source: Fault,
    },
    #[error("cannot renew {leases} leases of worker {worker}")]
    Renew {
        worker: WorkerId,
        leases: usize,
        #[source]
        source: Fault,
    },
    #[error("cannot assign task {tenant}/{task} to sandbox {sandbox}")]
    Assign {
        tenant: TenantId,
        task: TaskId,
        sandbox: SandboxId,
        #[source]
        source: Fault,
    },
    #[error("cannot release the lease of sandbox {sandbox} of worker {worker}")]
    Release {
        worker: WorkerId,
        sandbox: SandboxId,
        #[source]
        source: Fault,
    },
    #[error("cannot cancel task {tenant}/{task}")]
    Cancel {
        tenant: TenantId,
        task: TaskId,
        #[source]
        source: Fault,
    },
    #[error("cannot cancel or count for run {tenant}/{run}")]
    Stop {
        tenant: TenantId,
        run: RunId,
        #[source]
        source: Fault,
    },
    #[error("cannot read or write what pools and tenants have")]
    Counts(#[source] Fault),
    #[error("cannot read what was refused")]
    Refusals(#[source] Fault),
    #[error("cannot read the clock of redis")]
    Clock(#[source] Fault),
    #[error("cannot note or read which results may go")]
    Removals(#[source] Fault),
    #[error("cannot reap dead workers")]
    Reap(#[source] Fault),
    #[error("cannot list leases")]
    Leases(#[source] Fault),
    #[error("cannot tell what dispatcher {dispatcher} leads")]
    Lead {
        dispatcher: DispatcherId,
        #[source]
        source: Fault,
    },
    #[error("cannot look up who leads")]
    Leaders(#[source] Fault),
    #[error("cannot read what worker {worker} holds")]
    Held {
        worker: WorkerId,
        #[source]
        source: Fault,
    },
}

impl LeaseError {
    /// The stable code that users see.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Options { .. } | Self::Url { .. } => ErrorCode::InvalidField,
            Self::TooOld { .. } => ErrorCode::RedisUnsuitable,
            Self::SchemaRefused { .. } => ErrorCode::UnsupportedSchema,
            _ => match self.fault() {
                Some(Fault::Redis(error)) if !transient(error) => ErrorCode::Internal,
                Some(Fault::Garbled { .. } | Fault::Encode { .. } | Fault::CounterSpent) => {
                    ErrorCode::Internal
                }
                _ => ErrorCode::RedisUnreachable,
            },
        }
    }

    /// Whether Redis could not be reached, as opposed to having answered nonsense.
    pub fn unreachable(&self) -> bool {
        self.code() == ErrorCode::RedisUnreachable
    }

    fn fault(&self) -> Option<&Fault> {
        std::error::Error::source(self).and_then(|source| source.downcast_ref::<Fault>())
    }
}

/// Whether the same command may work when the server is back to itself.
fn transient(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_timeout()
        || error.is_connection_dropped()
        || matches!(
            error.code(),
            Some("LOADING" | "BUSY" | "MASTERDOWN" | "READONLY" | "CLUSTERDOWN" | "TRYAGAIN")
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_follows_the_fault() {
        let after = Duration::from_secs(1);
        assert_eq!(
            LeaseError::Reap(Fault::Timeout { after }).code(),
            ErrorCode::RedisUnreachable
        );
        let garbled = Fault::Garbled {
            what: "worker id",
            found: "x y".into(),
        };
        assert_eq!(LeaseError::Workers(garbled).code(), ErrorCode::Internal);
    }
}
