//! Quotas: how they are told, how a tenant that has what it may have is passed by, and who is
//! refused where too many wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use broker_schema::digest::sha256_hex;
use broker_schema::{
    ErrorCode, ErrorInfo, HEADER_DIGEST, ParsedSubject, PoolId, TaskRequest, TenantId, codec,
};
use futures::StreamExt as _;
use remuda_lease::QuotaKind;
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
const CHUNK: u64 = 16;
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

/// Refuses the newest requests of tenants of which more wait than may. The oldest ones, as many
/// as may wait, are never touched: those that were let wait before are among them.
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
                refused = refusing.newest(&pools, current - u64::from(limit)) => refused,
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

/// One tenant's requests, from the newest on.
struct Refusing<'a> {
    fleet: &'a Fleet,
    tenant: &'a TenantId,
    error: ErrorInfo,
    events: &'a mpsc::Sender<Event>,
}

impl Refusing<'_> {
    async fn newest(&self, pools: &[&PoolId], excess: u64) -> Result<u64, Cause> {
        let (broker, subjects) = (&self.fleet.broker, self.fleet.broker.subjects());
        let name = &broker.streams().requests;
        let stream = broker.jetstream().get_stream_no_info(name).await?;
        let mut newest = 0;
        for pool in pools {
            let subject = subjects.request(self.tenant, pool);
            match stream.direct_get_last_for_subject(subject).await {
                Ok(message) => newest = newest.max(message.sequence),
                Err(error) if error.kind() == NOT_FOUND => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (mut left, mut refused) = (excess, 0);
        let mut next = newest;
        let last = newest.saturating_sub(MOST_READ);
        while left > 0 && next > last {
            let first = next.saturating_sub(CHUNK).max(last);
            let found: Vec<_> = futures::stream::iter((first + 1..=next).rev())
                .map(|sequence| {
                    let stream = &stream;
                    async move { stream.direct_get(sequence).await.ok() }
                })
                .buffered(CHUNK as usize)
                .filter_map(|message| async { message })
                .collect()
                .await;
            next = first;
            for message in found {
                let parsed = subjects.parse(&message.subject);
                let Some(ParsedSubject::Request { tenant, pool }) = parsed else {
                    continue;
                };
                if tenant != *self.tenant || left == 0 {
                    continue;
                }
                left -= 1;
                if self.fleet.leadership.leads(&pool).is_some() {
                    refused += u64::from(self.one(&stream, &message).await?);
                }
            }
        }
        Ok(refused)
    }

    /// Whether it was refused: one that had a turn already was admitted, wherever it stands now.
    async fn one(
        &self,
        stream: &async_nats::jetstream::stream::Stream<()>,
        message: &StreamMessage,
    ) -> Result<bool, Cause> {
        let format = format_of(Some(&message.headers));
        // What cannot be read is answered where it is fetched.
        let Ok(request) = codec::decode::<TaskRequest>(&message.payload, format) else {
            return Ok(false);
        };
        let handed_back = message.headers.get(HEADER_DIGEST).is_some();
        if handed_back
            && self
                .fleet
                .lease
                .was_claimed(self.tenant, request.id)
                .await?
        {
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
