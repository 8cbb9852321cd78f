//! Quotas: how they are told, how a tenant that has what it may have is passed by, and who is
//! refused where too many wait.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use broker_schema::digest::sha256_hex;
use broker_schema::{
    ErrorCode, ErrorInfo, ParsedSubject, PoolId, TaskId, TaskRequest, TenantId, codec,
};
use futures::{StreamExt as _, TryStreamExt as _};
use remuda_lease::{LeaseError, QuotaKind};
use remuda_telemetry::{Chain, TraceHeaders};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::credit::Backlog;
use crate::decide::Pace;
use crate::dispatch::Event;
use crate::fleet::Fleet;
use crate::place::format_of;
use crate::terminals::Address;

/// Messages that are read at once, and in one round, when looking for the newest of a tenant.
const CHUNK: usize = 16;
const MOST_READ: u64 = 4096;
/// A tenant that has what it may have is tried again after this, then after ever longer.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const DOUBLINGS: u32 = 5;

/// What a tenant is told that may not have a sandbox.
pub(crate) fn over(tenant: &TenantId, kind: QuotaKind, limit: u32, current: u32) -> ErrorInfo {
    let mend = match kind {
        _ if limit == 0 => "ask the operator for a quota",
        QuotaKind::Sessions => "close a session first",
        QuotaKind::Sandboxes | QuotaKind::Running => "wait until a task has ended",
    };
    ErrorInfo::new(
        ErrorCode::QuotaExceeded,
        format!("tenant {tenant} has {current} {kind}, max_{kind} is {limit}: {mend}"),
    )
}

/// What a tenant is told of which too many requests wait.
pub(crate) fn too_many(tenant: &TenantId, limit: u32, current: u64) -> ErrorInfo {
    ErrorInfo::new(
        ErrorCode::QuotaExceeded,
        format!(
            "tenant {tenant} has {current} requests waiting, max_queued is {limit}: submit again \
             when some have ended"
        ),
    )
}

/// What is said of a group that could never be queued as a whole.
pub(crate) fn group_too_large(tenant: &TenantId, limit: u32, size: u32) -> ErrorInfo {
    ErrorInfo::new(
        ErrorCode::QuotaExceeded,
        format!("the group has {size} tasks, max_queued of tenant {tenant} is {limit}"),
    )
    .at("group_size")
}

/// Whether a tenant may go, as far as its quotas are concerned. Redis alone knows, so one that
/// has what it may have is tried again after a while, with one claim first.
#[derive(Debug)]
pub(crate) struct TenantGate {
    pace: Pace,
    claiming: usize,
    failures: u32,
    again_at: Option<Instant>,
}

impl TenantGate {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            pace: Pace::new(most),
            claiming: 0,
            failures: 0,
            again_at: None,
        }
    }

    pub(crate) fn may_go(&self) -> bool {
        self.pace.allows(self.claiming)
    }

    /// A claim of its is on the way.
    pub(crate) fn began(&mut self) {
        self.claiming += 1;
    }

    pub(crate) fn ended(&mut self) {
        self.claiming = self.claiming.saturating_sub(1);
    }

    pub(crate) fn granted(&mut self) {
        self.failures = 0;
        if !self.pace.halted() {
            self.pace.granted();
        }
    }

    /// It has what it may have.
    pub(crate) fn over(&mut self, now: Instant) {
        if !self.pace.halted() {
            self.pace.none_warm();
            self.again_at = Some(now + FIRST_WAIT * (1 << self.failures.min(DOUBLINGS)));
            self.failures = self.failures.saturating_add(1);
        }
    }

    pub(crate) fn again_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// Lets one claim try where it is time.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            self.pace.hint();
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.claiming == 0 && self.again_at.is_none()
    }
}

/// Tenants of which more wait than may: `(tenant, limit, current)`.
fn excess(
    backlog: &Backlog,
    limit: impl Fn(&TenantId) -> Option<u32>,
) -> Vec<(TenantId, u32, u64)> {
    let mut waiting: BTreeMap<&TenantId, u64> = BTreeMap::new();
    for ((tenant, _), count) in backlog {
        *waiting.entry(tenant).or_default() += count;
    }
    waiting
        .into_iter()
        .filter_map(|(tenant, current)| {
            let limit = limit(tenant)?;
            (current > u64::from(limit)).then(|| (tenant.clone(), limit, current))
        })
        .collect()
}

/// Refuses the newest requests of tenants of which more wait than may. What had a turn, and
/// copies of what waits or runs, is neither refused nor counted, as far back as is looked: the
/// lane settles them. The oldest others, as many as may wait, stay.
pub(crate) async fn run(
    fleet: Arc<Fleet>,
    mut backlog: watch::Receiver<Backlog>,
    events: mpsc::Sender<Event>,
) {
    if !fleet.tenants.limit_queues() {
        return;
    }
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            changed = backlog.changed() => if changed.is_err() { return },
        }
        let waiting = backlog.borrow_and_update().clone();
        let limit = |tenant: &TenantId| fleet.tenants.of(tenant).max_queued;
        for (tenant, limit, current) in excess(&waiting, limit) {
            let lanes = waiting.keys().filter(|(its, _)| *its == tenant);
            let pools: Vec<&PoolId> = lanes.map(|(_, pool)| pool).collect();
            let refusing = Refusing {
                fleet: &fleet,
                tenant: &tenant,
                error: too_many(&tenant, limit, current),
                events: &events,
            };
            let refused = tokio::select! {
                () = fleet.group.token().cancelled() => return,
                refused = refusing.newest(&pools, current, limit) => refused,
            };
            match refused {
                Ok(0) => {}
                Ok(count) => tracing::warn!(%tenant, count, limit, current, "requests are refused"),
                Err(error) => tracing::debug!(
                    %tenant, error = %Chain(&*error), "requests beyond the quota stay for now"
                ),
            }
        }
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A request of the tenant's that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    sequence: u64,
    pool: PoolId,
    /// `None` where it does not count: it was claimed, or cannot be read.
    waits: Option<TaskId>,
}

/// Those that are too many, from the newest on, of `current` messages of which `seen` were
/// looked at, from the newest on. Of several messages of one task only the oldest counts.
fn too_new(seen: Vec<Seen>, current: u64, limit: u32) -> Vec<Seen> {
    let (mut tasks, mut waiting, mut spared) = (BTreeSet::new(), Vec::new(), 0);
    for one in seen.into_iter().rev() {
        match one.waits {
            Some(task) if tasks.insert(task) => waiting.push(one),
            _ => spared += 1,
        }
    }
    let excess = current.saturating_sub(spared + u64::from(limit));
    let excess = usize::try_from(excess).unwrap_or(usize::MAX);
    waiting.into_iter().rev().take(excess).collect()
}

type Stream = async_nats::jetstream::stream::Stream;

/// One tenant's requests, from the newest on.
struct Refusing<'a> {
    fleet: &'a Fleet,
    tenant: &'a TenantId,
    error: ErrorInfo,
    events: &'a mpsc::Sender<Event>,
}

impl Refusing<'_> {
    async fn newest(&self, pools: &[&PoolId], current: u64, limit: u32) -> Result<u64, Cause> {
        let broker = &self.fleet.broker;
        let name = &broker.streams().requests;
        let stream = broker.jetstream().get_stream(name).await?;
        let mut newest = 0;
        for pool in pools {
            let subject = broker.subjects().request(self.tenant, pool);
            match stream.direct_get_last_for_subject(subject).await {
                Ok(message) => newest = newest.max(message.sequence),
                Err(error) if error.kind() == NOT_FOUND => {}
                Err(error) => return Err(error.into()),
            }
        }
        let first = stream.cached_info().state.first_sequence.max(1);
        let last = newest.saturating_sub(MOST_READ).max(first - 1);
        let seen = self.look(&stream, last + 1..=newest, current).await?;
        // Some may have left since they were counted.
        let all = (last < first).then_some(seen.len() as u64);
        let current = all.map_or(current, |all| all.min(current));
        let mut refused = 0;
        for one in too_new(seen, current, limit) {
            if self.fleet.leadership.leads(&one.pool).is_none() {
                continue;
            }
            // It may have been settled meanwhile.
            if let Ok(message) = stream.direct_get(one.sequence).await {
                refused += u64::from(self.one(&stream, &message).await?);
            }
        }
        Ok(refused)
    }

    /// Looks at the tenant's messages, `current` at the most.
    async fn look(
        &self,
        stream: &Stream,
        sequences: RangeInclusive<u64>,
        current: u64,
    ) -> Result<Vec<Seen>, Cause> {
        let looks = sequences.rev().map(|sequence| async move {
            match stream.direct_get(sequence).await {
                Ok(message) => self.see(&message).await.transpose(),
                Err(error) if error.kind() == NOT_FOUND => None,
                Err(error) => Some(Err(error.into())),
            }
        });
        let most = usize::try_from(current).unwrap_or(usize::MAX);
        futures::stream::iter(looks)
            .buffered(CHUNK)
            .filter_map(|seen| async { seen })
            .take(most)
            .try_collect()
            .await
    }

    /// `None` where it is another tenant's.
    async fn see(&self, message: &StreamMessage) -> Result<Option<Seen>, Cause> {
        let parsed = self.fleet.broker.subjects().parse(&message.subject);
        let Some(ParsedSubject::Request { tenant, pool }) = parsed else {
            return Ok(None);
        };
        if tenant != *self.tenant {
            return Ok(None);
        }
        let format = format_of(Some(&message.headers));
        let waits = match codec::decode::<TaskRequest>(&message.payload, format) {
            Ok(request) if !self.was_claimed(&request).await? => Some(request.id),
            // What cannot be read is answered where it is fetched.
            Ok(_) | Err(_) => None,
        };
        Ok(Some(Seen {
            sequence: message.sequence,
            pool,
            waits,
        }))
    }

    /// Whether it was admitted: it had a turn, runs, or has ended, wherever this message of it
    /// comes from. A worker that gave it back and a client that submits again both say so.
    async fn was_claimed(&self, request: &TaskRequest) -> Result<bool, LeaseError> {
        let lease = &self.fleet.lease;
        lease.was_claimed(self.tenant, request.id).await
    }

    /// Whether it was refused. It may have had its turn since it was looked at.
    async fn one(&self, stream: &Stream, message: &StreamMessage) -> Result<bool, Cause> {
        let format = format_of(Some(&message.headers));
        let Ok(request) = codec::decode::<TaskRequest>(&message.payload, format) else {
            return Ok(false);
        };
        if self.was_claimed(&request).await? {
            return Ok(false);
        }
        let aside = self.fleet.held.set_aside(message.sequence);
        if aside.is_none() {
            let (found, refused) = oneshot::channel();
            let event = Event::Refuse {
                sequence: message.sequence,
                error: Box::new(self.error.clone()),
                found,
            };
            return Ok(self.events.send(event).await.is_ok() && refused.await.unwrap_or(false));
        }
        let address = Address {
            tenant: self.tenant.clone(),
            ..Address::of(&request)
        };
        let terminal = address.rejected(&sha256_hex(&message.payload), self.error.clone());
        self.fleet
            .end(&terminal, format, &TraceHeaders::default())
            .await?;
        if let Some(event) = Event::refuse_group(&request, &self.error) {
            let _ = self.events.send(event).await;
        }
        stream.delete_message(message.sequence).await?;
        drop(aside);
        Ok(true)
    }
}

const NOT_FOUND: async_nats::jetstream::stream::DirectGetErrorKind =
    async_nats::jetstream::stream::DirectGetErrorKind::NotFound;

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn the_quota_the_limit_and_the_present_value_are_named() {
        let told = over(&tenant("acme"), QuotaKind::Sessions, 4, 5);
        assert_eq!(told.code, ErrorCode::QuotaExceeded);
        for part in ["acme", "5 sessions", "max_sessions is 4"] {
            assert!(told.message.contains(part), "{told}");
        }
        let told = too_many(&tenant("acme"), 10, 12);
        for part in ["acme", "12 requests", "max_queued is 10"] {
            assert!(told.message.contains(part), "{told}");
        }
        assert!(group_too_large(&tenant("acme"), 4, 8).message.contains('8'));
    }

    #[test]
    fn a_tenant_is_over_by_all_its_lanes_together() {
        let lane = |name: &str, pool: &str| (tenant(name), pool.parse::<PoolId>().unwrap());
        let backlog = Backlog::from([
            (lane("a", "p"), 3),
            (lane("a", "q"), 4),
            (lane("b", "p"), 6),
            (lane("c", "p"), 99),
        ]);
        let limit = |tenant: &TenantId| (tenant.as_str() != "c").then_some(6);
        assert_eq!(excess(&backlog, limit), [(tenant("a"), 6, 7)]);
    }

    #[test]
    fn copies_and_what_was_claimed_are_neither_refused_nor_counted() {
        let ids: Vec<TaskId> = (0..4).map(|_| TaskId::new()).collect();
        // From the oldest on: `None` was claimed.
        let refused = |messages: &[Option<usize>], current, limit| -> Vec<u64> {
            let seen = messages.iter().zip(1..).map(|(task, sequence)| Seen {
                sequence,
                pool: "p".parse().unwrap(),
                waits: task.map(|task| ids[task]),
            });
            let mut seen: Vec<Seen> = seen.collect();
            seen.reverse();
            let refused = too_new(seen, current, limit);
            refused.into_iter().map(|one| one.sequence).collect()
        };
        let (a, b, c, d) = (Some(0), Some(1), Some(2), Some(3));
        assert_eq!(refused(&[a, b, c, d], 4, 2), [4, 3]);
        // The copy of one that runs, the newest and among the others.
        assert_eq!(refused(&[a, b, None], 3, 2), [0_u64; 0]);
        assert_eq!(refused(&[None, a, b, c], 4, 2), [4]);
        assert_eq!(refused(&[a, None, b, None, c], 5, 3), [0_u64; 0]);
        // The copy of one that waits: refusing it would end that one.
        assert_eq!(refused(&[a, b, a], 3, 2), [0_u64; 0]);
        assert_eq!(refused(&[a, b, a, c, c], 5, 2), [4]);
        // What was not looked at counts as waiting.
        assert_eq!(refused(&[c, None, d], 10, 8), [3]);
        assert_eq!(refused(&[None, None], 1, 1), [0_u64; 0]);
    }

    #[test]
    fn a_tenant_at_its_quota_is_passed_by_and_tried_again() {
        let (mut gate, now) = (TenantGate::new(8), Instant::now());
        assert!(gate.may_go());
        for _ in 0..3 {
            gate.began();
        }
        gate.over(now);
        gate.ended();
        // Another answer of the same moment does not make the wait longer.
        gate.over(now);
        gate.ended();
        assert!(!gate.may_go());
        assert_eq!(gate.again_at(), Some(now + FIRST_WAIT));
        // A grant that was on its way opens nothing.
        gate.granted();
        gate.ended();
        assert!(!gate.may_go() && !gate.is_idle());
        gate.tick(now + FIRST_WAIT / 2);
        assert!(!gate.may_go());
        gate.tick(now + FIRST_WAIT);
        assert!(gate.may_go() && gate.is_idle());
        gate.began();
        assert!(!gate.may_go(), "one claim tries first");
        gate.granted();
        assert!(gate.may_go());
        // Without a grant in between the wait doubles, up to a bound.
        let mut gate = TenantGate::new(8);
        let mut waits = Vec::new();
        for _ in 0..8 {
            gate.over(now);
            waits.push(gate.again_at().unwrap() - now);
            gate.tick(now + Duration::from_secs(9));
        }
        assert_eq!(waits[..3], [20, 40, 80].map(Duration::from_millis));
        assert_eq!(waits[7], Duration::from_millis(640));
    }
}
