//! `remuda ps`: workers, pools and leases, as the registry has them.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::pool::PoolSpec;
use broker_schema::{Credit, PoolId, Timestamp};
use remuda_lease::{Leader, LeaseInfo, LeaseOptions, LeaseStore, WorkerInfo};
use serde_json::json;

use crate::failure::Failure;
use crate::fleet::Fleet;
use crate::globals::Globals;
use crate::out;
use crate::table::{Align, Table};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

/// What the registry knows of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PoolState {
    pub(super) name: PoolId,
    pub(super) backend: String,
    pub(super) target: u32,
    pub(super) warm: u64,
    pub(super) leased: usize,
    pub(super) max: u32,
    /// What its dispatcher told last, where that was lately.
    pub(super) credit: Option<Credit>,
}

/// What is older says nothing about now.
const STALE: Duration = Duration::from_secs(10);

pub(crate) async fn run(args: &Args, globals: &Globals) -> Result<u8, Failure> {
    let store = connect(globals).await?;
    let failed = |error: remuda_lease::LeaseError| Failure::chain(&error).code(error.code());
    let workers = store.workers().await.map_err(failed)?;
    let leases = store.leases().await.map_err(failed)?;
    let pools = pool_states(&store).await?;
    let leaders = leaders(&store, &pools).await?;
    if args.output == Format::Json {
        out::json(&json!({
            "workers": workers.iter().map(worker_json).collect::<Vec<_>>(),
            "pools": pools.iter().map(pool_json).collect::<Vec<_>>(),
            "leaders": leaders.iter().map(leader_json).collect::<Vec<_>>(),
            "leases": leases.iter().map(lease_json).collect::<Vec<_>>(),
        }))?;
        return Ok(0);
    }
    section("workers", &worker_table(&workers))?;
    section("pools", &pool_table(&pools))?;
    section("leaders", &leader_table(&leaders))?;
    section("leases", &lease_table(&leases))?;
    Ok(0)
}

fn section(name: &str, table: &Table) -> Result<(), Failure> {
    if table.is_empty() {
        return out::line(format_args!("no {name}"));
    }
    out::line(format_args!("{table}\n"))
}

pub(super) async fn connect(globals: &Globals) -> Result<LeaseStore, Failure> {
    let fleet = Fleet::locate(globals)?;
    let options = LeaseOptions {
        url: fleet.redis()?.to_owned(),
        prefix: fleet.prefix.clone(),
        ..LeaseOptions::default()
    };
    LeaseStore::connect(&options).await.map_err(|error| {
        Failure::chain(&error)
            .code(error.code())
            .mend("is the fleet running? `remuda doctor` looks")
    })
}

pub(super) async fn pool_states(store: &LeaseStore) -> Result<Vec<PoolState>, Failure> {
    let failed = |error: remuda_lease::LeaseError| Failure::chain(&error).code(error.code());
    let specs = store.pools().await.map_err(failed)?;
    let warm = store.warm_counts().await.map_err(failed)?;
    let leases = store.leases().await.map_err(failed)?;
    let credits = store.credits().await.map_err(failed)?;
    Ok(count(specs, &warm, &leases, credits, Timestamp::now()))
}

fn count(
    specs: Vec<PoolSpec>,
    warm: &BTreeMap<PoolId, u64>,
    leases: &[LeaseInfo],
    mut credits: BTreeMap<PoolId, Credit>,
    now: Timestamp,
) -> Vec<PoolState> {
    let mut state = |spec: PoolSpec| PoolState {
        backend: format!("{:?}", spec.backend).to_lowercase(),
        target: spec.warm,
        warm: warm.get(&spec.name).copied().unwrap_or(0),
        leased: leases
            .iter()
            .filter(|lease| lease.pool == spec.name)
            .count(),
        max: spec.max,
        credit: credits
            .remove(&spec.name)
            .filter(|credit| now.since(credit.at) < STALE),
        name: spec.name,
    };
    specs.into_iter().map(&mut state).collect()
}

fn unknown() -> String {
    "-".to_owned()
}

pub(super) fn pool_table(pools: &[PoolState]) -> Table {
    let mut table = Table::new([
        ("POOL", Align::Left),
        ("BACKEND", Align::Left),
        ("WARM", Align::Right),
        ("TARGET", Align::Right),
        ("LEASED", Align::Right),
        ("MAX", Align::Right),
        ("QUEUED", Align::Right),
        ("WAIT", Align::Right),
    ]);
    for pool in pools {
        table.row([
            pool.name.to_string(),
            pool.backend.clone(),
            pool.warm.to_string(),
            pool.target.to_string(),
            pool.leased.to_string(),
            pool.max.to_string(),
            pool.credit
                .as_ref()
                .map_or_else(unknown, |credit| credit.queued.to_string()),
            pool.credit
                .as_ref()
                .and_then(|credit| credit.expected_wait_ms)
                .map_or_else(unknown, |wait| seconds(Duration::from_millis(wait))),
        ]);
    }
    table
}

pub(super) fn pool_json(pool: &PoolState) -> serde_json::Value {
    json!({
        "pool": pool.name,
        "backend": pool.backend,
        "warm": pool.warm,
        "target": pool.target,
        "leased": pool.leased,
        "max": pool.max,
        "queued": pool.credit.as_ref().map(|credit| credit.queued),
        "expected_wait_ms": pool.credit.as_ref().and_then(|credit| credit.expected_wait_ms),
    })
}

fn worker_table(workers: &[WorkerInfo]) -> Table {
    let mut table = Table::new([
        ("WORKER", Align::Left),
        ("STATE", Align::Left),
        ("SLOTS", Align::Right),
        ("HOST", Align::Left),
        ("PID", Align::Right),
        ("SEEN", Align::Right),
    ]);
    for info in workers {
        table.row([
            info.record.worker.to_string(),
            if info.alive { "alive" } else { "gone" }.to_owned(),
            info.record.slots.to_string(),
            info.record.host.clone(),
            info.record.pid.to_string(),
            format!("{} ago", seconds(info.last_seen)),
        ]);
    }
    table
}

fn worker_json(info: &WorkerInfo) -> serde_json::Value {
    json!({
        "worker": info.record,
        "alive": info.alive,
        "last_seen_ms": info.last_seen.as_millis() as u64,
    })
}

/// Which dispatcher works for which pool, the fleet's own duties first.
async fn leaders(store: &LeaseStore, pools: &[PoolState]) -> Result<Vec<Leader>, Failure> {
    let whole_fleet = "_fleet".parse().into_iter();
    let asked: Vec<PoolId> = whole_fleet
        .chain(pools.iter().map(|pool| pool.name.clone()))
        .collect();
    let found = store.leaders(&asked).await;
    found.map_err(|error| Failure::chain(&error).code(error.code()))
}

fn leader_table(leaders: &[Leader]) -> Table {
    let mut table = Table::new([
        ("POOL", Align::Left),
        ("DISPATCHER", Align::Left),
        ("TERM", Align::Right),
        ("LEFT", Align::Right),
    ]);
    for leader in leaders {
        table.row([
            leader.pool.to_string(),
            leader.dispatcher.to_string(),
            leader.term.to_string(),
            seconds(leader.remaining),
        ]);
    }
    table
}

fn leader_json(leader: &Leader) -> serde_json::Value {
    json!({
        "pool": leader.pool,
        "dispatcher": leader.dispatcher,
        "term": leader.term.0,
        "remaining_ms": leader.remaining.as_millis() as u64,
    })
}

fn lease_table(leases: &[LeaseInfo]) -> Table {
    let mut table = Table::new([
        ("SANDBOX", Align::Left),
        ("POOL", Align::Left),
        ("WORKER", Align::Left),
        ("TENANT", Align::Left),
        ("RUN", Align::Left),
        ("TASK", Align::Left),
        ("TRY", Align::Right),
        ("LEFT", Align::Right),
    ]);
    for lease in leases {
        table.row([
            lease.sandbox.sandbox.to_string(),
            lease.pool.to_string(),
            lease.sandbox.worker.to_string(),
            lease.tenant.to_string(),
            lease.run.to_string(),
            lease
                .task
                .map_or_else(|| "(idle session)".to_owned(), |task| task.to_string()),
            lease.attempt.to_string(),
            seconds(lease.remaining),
        ]);
    }
    table
}

fn lease_json(lease: &LeaseInfo) -> serde_json::Value {
    json!({
        "sandbox": lease.sandbox,
        "pool": lease.pool,
        "tenant": lease.tenant,
        "run": lease.run,
        "task": lease.task,
        "attempt": lease.attempt,
        "remaining_ms": lease.remaining.as_millis() as u64,
    })
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_and_leased_are_counted_by_pool() {
        let name: PoolId = "py".parse().unwrap();
        let other: PoolId = "other".parse().unwrap();
        let warm = BTreeMap::from([(name.clone(), 3), (other, 9)]);
        let specs = || vec![PoolSpec::named(name.clone())];
        let states = count(specs(), &warm, &[], BTreeMap::new(), Timestamp(0));
        assert_eq!(
            pool_table(&states).to_string(),
            "POOL  BACKEND  WARM  TARGET  LEASED  MAX  QUEUED  WAIT\n\
             py    local       3       4       0   64       -     -"
        );
        let credit = Credit {
            pool: name.clone(),
            free: 0,
            leased: 4,
            max: 64,
            queued: 7,
            expected_wait_ms: Some(1500),
            at: Timestamp(1_000_000),
        };
        let credits = || BTreeMap::from([(name.clone(), credit.clone())]);
        let at = |secs| {
            count(
                specs(),
                &warm,
                &[],
                credits(),
                Timestamp(secs * 1_000_000_u64),
            )
        };
        assert_eq!(at(2)[0].credit, Some(credit.clone()));
        assert!(pool_table(&at(2)).to_string().ends_with("7  1.5 s"));
        assert_eq!(at(60)[0].credit, None, "it is old");
    }
}
