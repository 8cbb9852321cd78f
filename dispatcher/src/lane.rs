//! Lanes: one puller for each tenant and pool, so that no backlog stands before another's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::event::LaneHint;
use broker_schema::stream::ConsumerDef;
use broker_schema::{ParsedSubject, PoolId, TenantId, Term, codec, stream};
use futures::StreamExt as _;
use remuda_client::broker::{BrokerError, Delivery, Puller};
use remuda_lease::ClaimNonce;
use remuda_telemetry::{Chain, TaskGroup};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::decide::backoff;
use crate::dispatch::Event;
use crate::fleet::Fleet;
use crate::intake;
use crate::place::Job;
use crate::queue::Ticket;
use crate::stray;
use crate::takeover;

/// Other consumers may be met so often before the next try waits.
const MOST_CLEARED: u32 = 5;

/// A place in a lane's window. Dropped, it lets the lane fetch another request.
#[derive(Debug)]
pub(crate) struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    freed: Arc<Notify>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.freed.notify_one();
    }
}

type Lane = (TenantId, PoolId);

/// A lane that is pulled from, in one term.
#[derive(Debug)]
struct Running {
    term: Term,
    group: TaskGroup,
    task: JoinHandle<()>,
}

/// Finds the lanes of the pools that this dispatcher leads, by hints at once and by looking at
/// the stream with every tick.
pub(crate) async fn watch(
    fleet: Arc<Fleet>,
    mut hints: async_nats::Subscriber,
    events: mpsc::Sender<Event>,
    group: TaskGroup,
) {
    let mut lanes: BTreeMap<Lane, Running> = BTreeMap::new();
    let mut terms = fleet.leadership.subscribe();
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let found = tokio::select! {
            () = group.token().cancelled() => return,
            changed = terms.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = terms.borrow_and_update().clone();
                lanes.retain(|lane, running| {
                    let ours = now.get(authority(&fleet, lane)) == Some(&running.term);
                    if !ours {
                        running.group.cancel();
                    }
                    ours
                });
                takeover::clear(&fleet, &now).await;
                stored(&fleet).await
            }
            hint = hints.next() => match hint {
                Some(message) => hinted(&message.payload),
                None => return,
            },
            _ = tick.tick() => stored(&fleet).await,
        };
        for lane in found {
            // One that ended by itself or by a panic is opened again.
            if lanes
                .get(&lane)
                .is_some_and(|running| !running.task.is_finished())
            {
                continue;
            }
            let Some(term) = term_for(&fleet, &lane).await else {
                continue;
            };
            tracing::debug!(tenant = %lane.0, pool = %lane.1, %term, "lane found");
            let own = group.child();
            let (fleet, events, stop) = (fleet.clone(), events.clone(), own.clone());
            let named = lane.clone();
            let task = own.spawn("lane", async move {
                Pulling::new(&fleet, &named, term, &stop).run(&events).await;
            });
            let running = Running {
                term,
                group: own,
                task,
            };
            lanes.insert(lane, running);
        }
        fleet.metrics.lanes.set(lanes.len() as i64, ());
    }
}

/// The pool whose leader a lane belongs to: requests for pools that nobody has are the fleet's.
fn authority<'a>(fleet: &'a Fleet, lane: &'a Lane) -> &'a PoolId {
    if fleet.pools.contains_key(&lane.1) {
        &lane.1
    } else {
        fleet.leadership.whole_fleet()
    }
}

/// The term in which a lane is this dispatcher's.
async fn term_for(fleet: &Fleet, lane: &Lane) -> Option<Term> {
    let term = fleet.leadership.leads(authority(fleet, lane))?;
    if fleet.pools.contains_key(&lane.1) {
        return Some(term);
    }
    // Not every dispatcher need have every pool.
    match fleet.lease.leaders(std::slice::from_ref(&lane.1)).await {
        Ok(leaders) => leaders.is_empty().then_some(term),
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "a pool's leader cannot be looked up");
            None
        }
    }
}

fn hinted(payload: &[u8]) -> Vec<Lane> {
    codec::decode::<LaneHint>(payload, codec::Format::MessagePack)
        .or_else(|_| codec::decode::<LaneHint>(payload, codec::Format::Json))
        .map(|hint| vec![(hint.tenant, hint.pool)])
        .unwrap_or_default()
}

async fn stored(fleet: &Fleet) -> Vec<Lane> {
    if fleet.leadership.subscribe().borrow().is_empty() {
        return Vec::new();
    }
    let subjects = fleet.broker.subjects();
    let counts = fleet
        .broker
        .subject_counts(&fleet.broker.streams().requests, &subjects.requests())
        .await;
    let counts = match counts {
        Ok(counts) => counts,
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "lanes cannot be looked up");
            return Vec::new();
        }
    };
    let mut lanes = Vec::new();
    for subject in counts.keys() {
        match subjects.parse(subject) {
            Some(ParsedSubject::Request { tenant, pool }) => lanes.push((tenant, pool)),
            _ if fleet.leadership.leads_fleet() => stray::sweep(fleet, subject).await,
            _ => {}
        }
    }
    lanes
}

/// Pulls one lane in one term.
struct Pulling<'a> {
    fleet: &'a Fleet,
    lane: &'a Lane,
    authority: &'a PoolId,
    term: Term,
    group: &'a TaskGroup,
    failures: u32,
}

impl<'a> Pulling<'a> {
    fn new(fleet: &'a Fleet, lane: &'a Lane, term: Term, group: &'a TaskGroup) -> Self {
        Self {
            fleet,
            lane,
            authority: authority(fleet, lane),
            term,
            group,
            failures: 0,
        }
    }

    /// Runs until told to stop, or until the term is over.
    async fn run(mut self, events: &mpsc::Sender<Event>) {
        let Some(mut puller) = self.open().await else {
            return;
        };
        let stop = self.group.token();
        let window = Arc::new(Semaphore::new(self.fleet.options.window));
        let freed = Arc::new(Notify::new());
        loop {
            puller.want(window.available_permits());
            let delivery = tokio::select! {
                () = stop.cancelled() => break,
                () = freed.notified() => continue,
                delivery = puller.next() => delivery,
            };
            match delivery {
                Ok(delivery) => {
                    self.failures = 0;
                    let Ok(permit) = window.clone().try_acquire_owned() else {
                        // More came than was asked for: somebody else's turn.
                        let _ = delivery.nak(Duration::ZERO).await;
                        continue;
                    };
                    let slot = Slot {
                        permit: Some(permit),
                        freed: freed.clone(),
                    };
                    if !self.accept(delivery, slot, events).await {
                        break;
                    }
                }
                Err(BrokerError::ConsumerGone { .. }) => {
                    // Another leader takes a lane by removing its consumer.
                    match self.open_if_ours().await {
                        Some(opened) => puller = opened,
                        None => return,
                    }
                }
                Err(error) => {
                    tracing::warn!(
                        tenant = %self.lane.0, pool = %self.lane.1, error = %Chain(&error),
                        "lane cannot be pulled, trying again"
                    );
                    if !self.pause().await {
                        break;
                    }
                }
            }
        }
        puller.close().await;
    }

    async fn open_if_ours(&mut self) -> Option<Puller> {
        if !self.confirmed().await {
            tracing::info!(
                tenant = %self.lane.0, pool = %self.lane.1, term = %self.term,
                "the lane is another leader's now"
            );
            return None;
        }
        self.open().await
    }

    async fn open(&mut self) -> Option<Puller> {
        let (fleet, (tenant, pool)) = (self.fleet, self.lane);
        let subjects = fleet.broker.subjects();
        let def = stream::lane_consumer(subjects, tenant, pool, self.term, fleet.options.window);
        let mut cleared = 0;
        while fleet.leadership.holds(self.authority, self.term) {
            let opened = match fleet.broker.puller(&def).await {
                Ok(puller) => return Some(puller.without_mending()),
                Err(BrokerError::ConsumerTaken { .. }) => self.clear(&def).await,
                Err(error) => Err(error),
            };
            match opened {
                Ok(false) => return None,
                Ok(true) if cleared < MOST_CLEARED => {
                    cleared += 1;
                    continue;
                }
                Ok(true) => {
                    tracing::warn!(%tenant, %pool, "somebody keeps taking this lane, trying again");
                }
                Err(error) => tracing::warn!(
                    %tenant, %pool, error = %Chain(&error), "lane cannot be opened, trying again"
                ),
            }
            if !self.pause().await {
                return None;
            }
        }
        None
    }

    /// Removes what else has this lane's messages; false where that is another leader.
    async fn clear(&self, def: &ConsumerDef) -> Result<bool, BrokerError> {
        let others = takeover::Others::of(self.fleet, def).await?;
        if let Some(newer) = others.newer_than(self.term) {
            tracing::warn!(
                tenant = %self.lane.0, pool = %self.lane.1, term = %self.term, %newer,
                "a later leader was here"
            );
            // Asked after it was seen: if this term is in force, that one never was, or Redis
            // has lost it.
            if !self.confirmed().await {
                return Ok(false);
            }
        }
        others.remove(self.fleet).await?;
        Ok(true)
    }

    async fn confirmed(&self) -> bool {
        tokio::select! {
            () = self.group.token().cancelled() => false,
            ours = self.fleet.leadership.confirm(self.authority, self.term) => ours,
        }
    }

    /// False when it is time to stop.
    async fn pause(&mut self) -> bool {
        let pause = backoff(self.failures, rand::random());
        self.failures = self.failures.saturating_add(1);
        tokio::select! {
            () = self.group.token().cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// False where nobody takes jobs any more.
    async fn accept(&self, delivery: Delivery, slot: Slot, events: &mpsc::Sender<Event>) -> bool {
        let (fleet, lane) = (self.fleet, self.lane);
        let Some(held) = fleet.held.hold(self.term, &delivery) else {
            return true;
        };
        let Some((request, digest)) = intake::take(fleet, (&lane.0, &lane.1), &delivery).await
        else {
            return true;
        };
        let job = Job {
            ticket: Ticket {
                sequence: delivery.stream_sequence,
                place: delivery.stream_sequence,
                priority: request.priority,
                tenant: request.tenant.clone(),
                tenant_weight: fleet.tenants.of(&request.tenant).weight,
                run: request.run.clone(),
                run_weight: request.run_weight.unwrap_or(1),
                group: request.group.clone(),
                task: request.id,
                deadline: request.deadline,
            },
            term: self.term,
            request: *request,
            digest,
            delivery,
            nonce: ClaimNonce::new(),
            again: false,
            failures: 0,
            since: Instant::now(),
            told: None,
            held,
            _slot: slot,
        };
        match events.send(Event::Queue(Box::new(job))).await {
            Ok(()) => true,
            Err(mpsc::error::SendError(Event::Queue(job))) => {
                job.give_back().await;
                false
            }
            Err(_) => false,
        }
    }
}
