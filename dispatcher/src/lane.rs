//! Lanes: one puller for each tenant and pool, so that no backlog stands before another's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_schema::event::LaneHint;
use broker_schema::{ParsedSubject, PoolId, TenantId, codec, stream};
use futures::StreamExt as _;
use remuda_client::broker::{Delivery, Puller};
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

/// Finds lanes, by hints at once and by looking at the stream with every tick.
pub(crate) async fn watch(
    fleet: Arc<Fleet>,
    mut hints: async_nats::Subscriber,
    events: mpsc::Sender<Event>,
    group: TaskGroup,
) {
    let mut lanes: BTreeMap<(TenantId, PoolId), JoinHandle<()>> = BTreeMap::new();
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let found = tokio::select! {
            () = group.token().cancelled() => return,
            hint = hints.next() => match hint {
                Some(message) => hinted(&message.payload),
                None => return,
            },
            _ = tick.tick() => stored(&fleet).await,
        };
        for lane in found {
            // One that ended by a panic is opened again.
            if lanes
                .get(&lane)
                .is_some_and(|running| !running.is_finished())
            {
                continue;
            }
            tracing::debug!(tenant = %lane.0, pool = %lane.1, "lane found");
            let (fleet, events, stop) = (fleet.clone(), events.clone(), group.clone());
            let named = lane.clone();
            let running = group.spawn("lane", async move { run(fleet, named, events, stop).await });
            lanes.insert(lane, running);
        }
        fleet.metrics.lanes.set(lanes.len() as i64, ());
    }
}

fn hinted(payload: &[u8]) -> Vec<(TenantId, PoolId)> {
    codec::decode::<LaneHint>(payload, codec::Format::MessagePack)
        .or_else(|_| codec::decode::<LaneHint>(payload, codec::Format::Json))
        .map(|hint| vec![(hint.tenant, hint.pool)])
        .unwrap_or_default()
}

async fn stored(fleet: &Fleet) -> Vec<(TenantId, PoolId)> {
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
            _ => stray::sweep(fleet, subject).await,
        }
    }
    lanes
}

/// Pulls one lane until told to stop.
async fn run(
    fleet: Arc<Fleet>,
    lane: (TenantId, PoolId),
    events: mpsc::Sender<Event>,
    group: TaskGroup,
) {
    let stop = group.token();
    let Some(mut puller) = open(&fleet, &lane, &group).await else {
        return;
    };
    let window = Arc::new(Semaphore::new(fleet.options.window));
    let freed = Arc::new(Notify::new());
    let mut failures = 0;
    loop {
        puller.want(window.available_permits());
        let delivery = tokio::select! {
            () = stop.cancelled() => break,
            () = freed.notified() => continue,
            delivery = puller.next() => delivery,
        };
        match delivery {
            Ok(delivery) => {
                failures = 0;
                let Ok(permit) = window.clone().try_acquire_owned() else {
                    // More came than was asked for: somebody else's turn.
                    let _ = delivery.nak(Duration::ZERO).await;
                    continue;
                };
                let slot = Slot {
                    permit: Some(permit),
                    freed: freed.clone(),
                };
                if !accept(&fleet, &lane, delivery, slot, &events).await {
                    break;
                }
            }
            Err(error) => {
                tracing::warn!(
                    tenant = %lane.0, pool = %lane.1, error = %Chain(&error),
                    "lane cannot be pulled, trying again"
                );
                if !pause(&group, &mut failures).await {
                    break;
                }
            }
        }
    }
    puller.close().await;
}

async fn open(fleet: &Fleet, lane: &(TenantId, PoolId), group: &TaskGroup) -> Option<Puller> {
    let subjects = fleet.broker.subjects();
    let def = stream::lane_consumer(subjects, &lane.0, &lane.1, fleet.options.window);
    let mut failures = 0;
    loop {
        match fleet.broker.puller(&def).await {
            Ok(puller) => return Some(puller),
            Err(error) => tracing::warn!(
                tenant = %lane.0, pool = %lane.1, error = %Chain(&error),
                "lane cannot be opened, trying again"
            ),
        }
        if !pause(group, &mut failures).await {
            return None;
        }
    }
}

/// False when it is time to stop.
async fn pause(group: &TaskGroup, failures: &mut u32) -> bool {
    let pause = backoff(*failures, rand::random());
    *failures = failures.saturating_add(1);
    tokio::select! {
        () = group.token().cancelled() => false,
        () = tokio::time::sleep(pause) => true,
    }
}

/// False where nobody takes jobs any more.
async fn accept(
    fleet: &Fleet,
    lane: &(TenantId, PoolId),
    delivery: Delivery,
    slot: Slot,
    events: &mpsc::Sender<Event>,
) -> bool {
    let Some(held) = fleet.held.hold(&delivery) else {
        return true;
    };
    let Some((request, digest)) = intake::take(fleet, (&lane.0, &lane.1), &delivery).await else {
        return true;
    };
    let job = Job {
        ticket: Ticket {
            sequence: delivery.stream_sequence,
            priority: request.priority,
            tenant: request.tenant.clone(),
            run: request.run.clone(),
            task: request.id,
            deadline: request.deadline,
        },
        request: *request,
        digest,
        delivery,
        nonce: ClaimNonce::new(),
        again: false,
        failures: 0,
        since: Instant::now(),
        _held: held,
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
