//! Leadership: which pools this dispatcher works for, and until when. One loop asks Redis, takes
//! what is free and stands down where it could not renew in time; everybody else only reads.
//!
//! Two leaders of one pool at a time do no harm, they only get in each other's way: the claim,
//! the terminal gate and the consumers' names decide. So a clock that stands still while the
//! machine sleeps is good enough here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_schema::{DispatcherId, PoolId, Term};
use futures::StreamExt as _;
use remuda_lease::{Lead, LeadRequest, Leads};
use remuda_telemetry::Chain;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::fleet::Fleet;

/// Stands among the pools for what is the whole fleet's: targets, dead workers, sweeps, requests
/// for pools that nobody has.
pub(crate) const FLEET: &str = "_fleet";

/// Rounds in a row with more than its share after which a leader gives some away: one that has
/// only just come may be gone again.
const OVERLOADED: u32 = 5;
/// Between two rounds, whatever the hints say.
const SPACING: Duration = Duration::from_millis(20);
/// What is free and not ours to take yet is looked at this often.
const FREE: Duration = Duration::from_millis(250);

pub(crate) type Terms = BTreeMap<PoolId, Term>;

/// What this dispatcher leads.
#[derive(Debug)]
pub(crate) struct Leadership {
    dispatcher: DispatcherId,
    whole_fleet: PoolId,
    terms: watch::Sender<Terms>,
    born: Instant,
    /// Milliseconds after `born` up to which the terms can be relied on.
    fence: AtomicU64,
    orders: mpsc::UnboundedSender<Order>,
    /// Cancelled once everything was given up for good.
    gone: CancellationToken,
}

/// What others tell the loop.
#[derive(Debug)]
pub(crate) enum Order {
    /// Ask Redis now, then answer.
    Confirm(oneshot::Sender<()>),
}

impl Leadership {
    pub(crate) fn new(dispatcher: DispatcherId) -> (Self, mpsc::UnboundedReceiver<Order>) {
        let (orders, received) = mpsc::unbounded_channel();
        let leadership = Self {
            dispatcher,
            whole_fleet: PoolId::new(FLEET).unwrap_or_else(|_| unreachable!("it is a token")),
            terms: watch::Sender::new(Terms::new()),
            born: Instant::now(),
            fence: AtomicU64::new(0),
            orders,
            gone: CancellationToken::new(),
        };
        (leadership, received)
    }

    pub(crate) fn dispatcher(&self) -> &DispatcherId {
        &self.dispatcher
    }

    /// The pool that stands for the whole fleet's duties.
    pub(crate) fn whole_fleet(&self) -> &PoolId {
        &self.whole_fleet
    }

    /// The term in which this dispatcher works for a pool right now.
    pub(crate) fn leads(&self, pool: &PoolId) -> Option<Term> {
        if Instant::now() >= self.fence() {
            return None;
        }
        self.terms.borrow().get(pool).copied()
    }

    pub(crate) fn leads_fleet(&self) -> bool {
        self.leads(&self.whole_fleet).is_some()
    }

    pub(crate) fn holds(&self, pool: &PoolId, term: Term) -> bool {
        self.leads(pool) == Some(term)
    }

    /// Tells of every pool that is won or lost.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Terms> {
        self.terms.subscribe()
    }

    /// Whether Redis, asked now, still says that a term is ours.
    pub(crate) async fn confirm(&self, pool: &PoolId, term: Term) -> bool {
        let (asked, answered) = oneshot::channel();
        self.orders.send(Order::Confirm(asked)).is_ok()
            && answered.await.is_ok()
            && self.holds(pool, term)
    }

    /// Resolves once everything was given up for good.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    fn fence(&self) -> Instant {
        self.born + Duration::from_millis(self.fence.load(Ordering::Acquire))
    }

    fn rely_until(&self, fence: Instant) {
        let after = fence.saturating_duration_since(self.born).as_millis() as u64;
        self.fence.store(after, Ordering::Release);
    }
}

/// A name for this process that tells a person where it runs.
pub(crate) fn fresh_id(host: &str) -> DispatcherId {
    let host: String = host
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(32)
        .collect();
    let name = format!(
        "{host}-{}-{:08x}",
        std::process::id(),
        rand::random::<u32>()
    );
    name.parse()
        .unwrap_or_else(|_| unreachable!("it is made of what tokens are made of"))
}

/// What an answer of Redis means. Pure.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    terms: Terms,
    /// Redis says that they are ours, and we have given them up.
    surrender: Vec<PoolId>,
    /// Pools beyond the share.
    surplus: usize,
    /// When something may become free.
    soonest: Option<Duration>,
}

impl Verdict {
    fn of(leads: &Leads, spent: &Terms) -> Self {
        let (mut terms, mut surrender, mut soonest) = (Terms::new(), Vec::new(), None);
        let mut sooner = |wait: Duration| {
            soonest = Some(soonest.map_or(wait, |known: Duration| known.min(wait)));
        };
        for (pool, lead) in &leads.pools {
            match lead {
                Lead::Mine(term) if spent.get(pool).is_some_and(|given_up| given_up >= term) => {
                    surrender.push(pool.clone());
                }
                Lead::Mine(term) => {
                    terms.insert(pool.clone(), *term);
                }
                Lead::Other { remaining, .. } => sooner(*remaining),
                Lead::Free => sooner(FREE),
            }
        }
        Self {
            surplus: terms.len().saturating_sub(leads.share),
            terms,
            surrender,
            soonest,
        }
    }
}

/// What a leader with more than its share gives away: the fleet's duties first, they have no
/// queue; then the last by name.
fn surplus(terms: &Terms, whole_fleet: &PoolId, count: usize) -> Vec<PoolId> {
    let last = terms.keys().rev().filter(|pool| *pool != whole_fleet);
    terms
        .keys()
        .filter(|pool| *pool == whole_fleet)
        .chain(last)
        .take(count)
        .cloned()
        .collect()
}

struct Leader {
    fleet: Arc<Fleet>,
    pools: Vec<PoolId>,
    /// The last term of each pool that was given up here: Redis may not know yet.
    spent: Terms,
    next: Instant,
    overloaded: u32,
    nats_lost: Option<Instant>,
    waiting: Vec<oneshot::Sender<()>>,
}

/// Leads until told to stop, then gives everything up.
pub(crate) async fn run(
    fleet: Arc<Fleet>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    mut hints: async_nats::Subscriber,
    stop: CancellationToken,
) {
    let whole_fleet = fleet.leadership.whole_fleet().clone();
    let mut leader = Leader {
        pools: std::iter::once(whole_fleet)
            .chain(fleet.pools.keys().cloned())
            .collect(),
        fleet,
        spent: Terms::new(),
        next: Instant::now(),
        overloaded: 0,
        nats_lost: None,
        waiting: Vec::new(),
    };
    let fleet = leader.fleet.clone();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = fleet.group.token().cancelled() => break,
            () = sleep_until(leader.fence()), if leader.leads_any() => leader.lapse(),
            Some(order) = orders.recv() => leader.take(order),
            Some(_) = hints.next() => leader.hurry(),
            () = sleep_until(leader.next) => leader.round().await,
        }
    }
    leader.leave().await;
}

impl Leader {
    fn leadership(&self) -> &Leadership {
        &self.fleet.leadership
    }

    fn fence(&self) -> Instant {
        self.leadership().fence()
    }

    fn leads_any(&self) -> bool {
        !self.leadership().terms.borrow().is_empty()
    }

    fn ttl(&self) -> Duration {
        self.fleet.options.timings.term
    }

    fn hurry(&mut self) {
        self.next = self.next.min(Instant::now() + SPACING);
    }

    fn take(&mut self, Order::Confirm(asked): Order) {
        self.waiting.push(asked);
        self.hurry();
    }

    async fn round(&mut self) {
        let sent = Instant::now();
        let retry = self.ttl() / 15;
        self.next = sent + retry;
        let take = self.look_at_nats(sent).await;
        let request = LeadRequest {
            dispatcher: &self.fleet.leadership.dispatcher,
            ttl: self.ttl(),
            take,
            pools: &self.pools,
        };
        let asked = tokio::time::timeout(self.ttl() / 3, self.fleet.lease.lead(&request));
        let answer = tokio::select! {
            biased;
            answer = asked => answer,
            () = sleep_until(self.fence()), if self.leads_any() => return self.lapse(),
        };
        let leads = match answer {
            Ok(Ok(leads)) => leads,
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), "leadership cannot be renewed");
                return;
            }
            Err(_) => {
                tracing::debug!("leadership was not renewed in time");
                return;
            }
        };
        let verdict = Verdict::of(&leads, &self.spent);
        // As long as it may be relied on by whoever reads it, less what reading takes.
        self.leadership().rely_until(sent + self.ttl() * 5 / 6);
        self.settle(&verdict);
        if !verdict.surrender.is_empty() {
            self.give_up(&verdict.surrender).await;
        }
        self.overloaded = if verdict.surplus > 0 {
            self.overloaded + 1
        } else {
            0
        };
        if self.overloaded >= OVERLOADED {
            let whole_fleet = self.leadership().whole_fleet();
            let away = surplus(&verdict.terms, whole_fleet, verdict.surplus);
            tracing::info!(
                dispatchers = leads.dispatchers,
                "another dispatcher may lead some"
            );
            self.give_up(&away).await;
            self.overloaded = 0;
        }
        if leads.in_force {
            let renew = self.ttl() / 3;
            let wait = verdict.soonest.unwrap_or(renew).min(renew);
            self.next = sent + wait.max(SPACING);
        } else {
            self.bootstrap().await;
        }
        for asked in self.waiting.drain(..) {
            let _ = asked.send(());
        }
    }

    async fn bootstrap(&mut self) {
        match tokio::time::timeout(self.ttl() / 3, self.fleet.bootstrap()).await {
            Ok(Ok(())) => self.next = Instant::now() + SPACING,
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), "the incarnation cannot be renewed");
            }
            Err(_) => tracing::debug!("the incarnation was not renewed in time"),
        }
    }

    /// Whether to take what is free. A dispatcher without NATS can do nothing for its pools: it
    /// lets others have them.
    async fn look_at_nats(&mut self, now: Instant) -> bool {
        if self.fleet.broker.connected() {
            self.nats_lost = None;
            return true;
        }
        let since = *self.nats_lost.get_or_insert(now);
        if now - since >= self.ttl() && self.leads_any() {
            tracing::warn!("without NATS for too long: others may lead");
            let led: Vec<PoolId> = self.leadership().terms.borrow().keys().cloned().collect();
            self.give_up(&led).await;
        }
        false
    }

    /// Takes over what Redis says.
    fn settle(&mut self, verdict: &Verdict) {
        let leadership = &self.fleet.leadership;
        let spent = &mut self.spent;
        leadership.terms.send_if_modified(|terms| {
            if *terms == verdict.terms {
                return false;
            }
            for (pool, term) in &*terms {
                if verdict.terms.get(pool) != Some(term) {
                    tracing::warn!(%pool, %term, "no longer leads this pool");
                    spent.insert(pool.clone(), *term);
                }
            }
            for (pool, term) in &verdict.terms {
                if terms.get(pool) != Some(term) {
                    tracing::info!(%pool, %term, "leads this pool");
                }
            }
            terms.clone_from(&verdict.terms);
            true
        });
        self.count();
    }

    /// It was not renewed in time: somebody else may lead by now.
    fn lapse(&mut self) {
        tracing::warn!(
            after = ?self.ttl(),
            "leadership could not be renewed in time: what is held here is left to others"
        );
        let spent = &mut self.spent;
        self.fleet.leadership.terms.send_modify(|terms| {
            spent.append(terms);
        });
        self.count();
        for asked in self.waiting.drain(..) {
            let _ = asked.send(());
        }
    }

    /// Stops working for these pools, then lets others have them at once.
    async fn give_up(&mut self, pools: &[PoolId]) {
        let spent = &mut self.spent;
        self.fleet.leadership.terms.send_modify(|terms| {
            for pool in pools {
                if let Some(term) = terms.remove(pool) {
                    tracing::info!(%pool, %term, "gives this pool up");
                    spent.insert(pool.clone(), term);
                }
            }
        });
        self.count();
        self.step_down(false, pools).await;
    }

    async fn leave(&mut self) {
        let spent = &mut self.spent;
        self.fleet.leadership.terms.send_modify(|terms| {
            spent.append(terms);
        });
        self.count();
        let pools = self.pools.clone();
        self.step_down(true, &pools).await;
        self.fleet.leadership.gone.cancel();
    }

    async fn step_down(&self, leaving: bool, pools: &[PoolId]) {
        let dispatcher = self.leadership().dispatcher();
        let told = self.fleet.lease.step_down(dispatcher, leaving, pools);
        match tokio::time::timeout(self.ttl() / 3, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), "what was led runs out by itself");
                return;
            }
            Err(_) => return,
        }
        let nats = self.fleet.broker.nats();
        let hint = self.fleet.broker.subjects().leader_hint();
        if let Err(error) = nats.publish(hint, bytes::Bytes::new()).await {
            tracing::debug!(error = %Chain(&error), "a hint was not sent");
        }
    }

    fn count(&self) {
        let led = self.leadership().terms.borrow().len();
        self.fleet.metrics.leading.set(led as i64, ());
    }
}

#[cfg(test)]
#[path = "leader_tests.rs"]
mod tests;
