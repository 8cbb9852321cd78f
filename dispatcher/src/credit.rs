//! Credit: what each pool has to give, told once in a tick.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{Credit, ParsedSubject, PoolId, TenantId, Timestamp};
use remuda_lease::{LeaseError, PoolUse};
use remuda_telemetry::Chain;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::fleet::Fleet;

/// Requests that wait in the stream, by lane.
pub(crate) type Backlog = BTreeMap<(TenantId, PoolId), u64>;

/// How far back the service rate looks, by and large.
const MEMORY: Duration = Duration::from_secs(10);
/// Nobody can tell what is longer than that.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Placements of each pool since somebody looked.
#[derive(Debug, Default)]
pub(crate) struct Grants(Mutex<BTreeMap<PoolId, u64>>);

impl Grants {
    pub(crate) fn add(&self, pool: &PoolId) {
        let mut grants = self.lock();
        if let Some(count) = grants.get_mut(pool) {
            *count += 1;
        } else {
            grants.insert(pool.clone(), 1);
        }
    }

    fn take(&self) -> BTreeMap<PoolId, u64> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PoolId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How fast a pool serves, in placements per second, where anybody can tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Rate(Option<f64>);

impl Rate {
    /// Takes in what was placed within `span`. While somebody waits the pool serves as fast as it
    /// can; else it serves at least as fast as was asked of it.
    fn observe(&mut self, placed: u64, span: Duration, waited: bool) {
        let span = span.as_secs_f64().max(1e-3);
        let seen = placed as f64 / span;
        let before = self.0.unwrap_or(seen);
        if waited || seen > before || self.0.is_none() && placed > 0 {
            let part = 1.0 - (-span / MEMORY.as_secs_f64()).exp();
            self.0 = Some(before + (seen - before) * part);
        }
    }

    /// How long a task waits that comes after `queued` others, with `free` sandboxes there.
    fn expected_wait(self, free: u64, queued: u64) -> Option<Duration> {
        if queued < free {
            return Some(Duration::ZERO);
        }
        let before_it = (queued - free + 1) as f64;
        let rate = self.0.filter(|rate| *rate > 1e-6)?;
        let seconds = (before_it / rate).min(LONGEST_WAIT.as_secs_f64());
        Some(Duration::from_secs_f64(seconds))
    }
}

pub(crate) async fn run(fleet: Arc<Fleet>, backlog: watch::Sender<Backlog>) {
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut rates: BTreeMap<PoolId, Rate> = BTreeMap::new();
    let mut waited: BTreeMap<PoolId, u64> = BTreeMap::new();
    let mut looked = Instant::now();
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = tick.tick() => {}
        }
        let span = looked.elapsed();
        looked = Instant::now();
        let placed = fleet.grants.take();
        let led: Vec<&PoolId> = fleet
            .pools
            .keys()
            .filter(|pool| fleet.leadership.leads(pool).is_some())
            .collect();
        rates.retain(|pool, _| led.contains(&pool));
        if led.is_empty() {
            continue;
        }
        let Some(waiting) = count(&fleet).await else {
            continue;
        };
        let mut queued: BTreeMap<PoolId, u64> = BTreeMap::new();
        for ((_, pool), count) in &waiting {
            *queued.entry(pool.clone()).or_default() += count;
        }
        backlog.send_replace(waiting);
        for pool in &led {
            let placed = placed.get(*pool).copied().unwrap_or_default();
            let now = queued.get(*pool).copied().unwrap_or_default();
            let before = waited.get(*pool).copied().unwrap_or_default();
            let rate = rates.entry((*pool).clone()).or_default();
            rate.observe(placed, span, now > 0 && before > 0);
        }
        if let Err(error) = tell(&fleet, &led, &queued, &rates).await {
            tracing::debug!(error = %Chain(&error), "credits are not told");
        }
        waited = queued;
    }
}

async fn count(fleet: &Fleet) -> Option<Backlog> {
    let subjects = fleet.broker.subjects();
    let stream = &fleet.broker.streams().requests;
    let counts = fleet
        .broker
        .subject_counts(stream, &subjects.requests())
        .await;
    let counts = match counts {
        Ok(counts) => counts,
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "waiting requests cannot be counted");
            return None;
        }
    };
    let lane = |(subject, count): (String, usize)| match subjects.parse(&subject)? {
        ParsedSubject::Request { tenant, pool } => Some(((tenant, pool), count as u64)),
        _ => None,
    };
    Some(counts.into_iter().filter_map(lane).collect())
}

async fn tell(
    fleet: &Fleet,
    led: &[&PoolId],
    queued: &BTreeMap<PoolId, u64>,
    rates: &BTreeMap<PoolId, Rate>,
) -> Result<(), LeaseError> {
    let used = fleet.lease.pool_use().await?;
    let at = Timestamp::now();
    let mut credits = Vec::with_capacity(led.len());
    for pool in led {
        let PoolUse { warm, leased } = used.get(*pool).copied().unwrap_or_default();
        let queued = queued.get(*pool).copied().unwrap_or_default();
        let rate = rates.get(*pool).copied().unwrap_or_default();
        let wait = rate.expected_wait(warm, queued);
        credits.push(Credit {
            pool: (*pool).clone(),
            free: warm,
            leased,
            max: fleet.pools.get(*pool).map_or(0, |spec| u64::from(spec.max)),
            queued,
            expected_wait_ms: wait.map(|wait| wait.as_millis() as u64),
            at,
        });
    }
    for credit in &credits {
        let payload = match codec::encode(credit, Format::MessagePack) {
            Ok(payload) => payload,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "a credit cannot be written");
                continue;
            }
        };
        let subject = fleet.broker.subjects().credit(&credit.pool);
        if let Err(error) = fleet.broker.nats().publish(subject, payload.into()).await {
            tracing::debug!(error = %Chain(&error), "a credit was not sent");
        }
    }
    fleet.lease.set_credits(&credits).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TICK: Duration = Duration::from_secs(1);

    #[test]
    fn the_rate_follows_what_is_served_while_somebody_waits() {
        let mut rate = Rate::default();
        assert_eq!(rate.expected_wait(0, 5), None, "nobody can tell yet");
        for _ in 0..60 {
            rate.observe(50, TICK, true);
        }
        let wait = rate.expected_wait(0, 99).unwrap();
        assert!(
            wait.abs_diff(Duration::from_secs(2)) < Duration::from_millis(50),
            "{wait:?}"
        );
        // A quiet time says nothing about how fast it could be.
        for _ in 0..600 {
            rate.observe(0, TICK, false);
            rate.observe(1, TICK, false);
        }
        let after = rate.expected_wait(0, 99).unwrap();
        assert_eq!(after, wait);
        // It gets slower: half of the way within some ten seconds.
        for _ in 0..10 {
            rate.observe(10, TICK, true);
        }
        let slower = rate.expected_wait(0, 99).unwrap();
        assert!(slower > wait * 3 / 2, "{slower:?}");
    }

    #[test]
    fn who_finds_a_free_sandbox_does_not_wait() {
        let rate = Rate(Some(10.0));
        let wait = |free, queued| rate.expected_wait(free, queued).unwrap();
        assert_eq!(wait(4, 0), Duration::ZERO);
        assert_eq!(wait(4, 3), Duration::ZERO);
        assert_eq!(wait(4, 4), Duration::from_millis(100));
        assert_eq!(wait(0, 0), Duration::from_millis(100));
        assert_eq!(wait(4, 23), Duration::from_secs(2));
        assert_eq!(wait(0, u64::MAX / 2), LONGEST_WAIT);
        assert_eq!(Rate(Some(0.0)).expected_wait(0, 1), None);
    }

    proptest! {
        #[test]
        fn estimates_are_sane(
            seen in prop::collection::vec((0..1000_u64, 0..5000_u64, any::<bool>()), 0..50),
            free in 0..1000_u64,
            queued in 0..100_000_u64,
        ) {
            let mut rate = Rate::default();
            for (placed, millis, waited) in seen {
                rate.observe(placed, Duration::from_millis(millis), waited);
                prop_assert!(rate.0.is_none_or(|rate| rate.is_finite() && rate >= 0.0));
            }
            let wait = rate.expected_wait(free, queued);
            prop_assert!(wait.is_none_or(|wait| wait <= LONGEST_WAIT));
            let longer = rate.expected_wait(free, queued + 1);
            if let (Some(wait), Some(longer)) = (wait, longer) {
                prop_assert!(wait <= longer);
            }
        }
    }
}
