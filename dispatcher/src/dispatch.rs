//! The one loop that owns the queue: it takes jobs in, has them placed, and waits for pools.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use broker_schema::event::OfferHint;
use broker_schema::{PoolId, TaskId, TenantId, Timestamp, codec};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::Pace;
use crate::fleet::Fleet;
use crate::place::{self, Job, Placed, Work};
use crate::queue::FairQueue;

/// What others tell the loop.
#[derive(Debug)]
pub(crate) enum Event {
    Queue(Box<Job>),
    /// Whether the task was queued here and is being ended.
    Cancel {
        tenant: TenantId,
        task: TaskId,
        found: oneshot::Sender<bool>,
    },
}

/// One pool's queue and how fast it may be emptied.
#[derive(Debug)]
struct Line {
    queue: FairQueue<Box<Job>>,
    pace: Pace,
    claiming: usize,
}

/// A piece of work under way. `None` where it panicked: its request comes again by itself.
type UnderWay = BoxFuture<'static, (PoolId, Work, Option<Placed>)>;

pub(crate) struct Dispatch {
    fleet: Arc<Fleet>,
    lines: BTreeMap<PoolId, Line>,
    /// Whose turn it is among the pools.
    last: Option<PoolId>,
    under_way: FuturesUnordered<UnderWay>,
    /// Jobs that are asked about again at a time. The number tells equal times apart.
    later: BTreeMap<(Instant, u64), Box<Job>>,
    events: mpsc::Receiver<Event>,
    offers: async_nats::Subscriber,
}

impl Dispatch {
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        events: mpsc::Receiver<Event>,
        offers: async_nats::Subscriber,
    ) -> Self {
        Self {
            fleet,
            lines: BTreeMap::new(),
            last: None,
            under_way: FuturesUnordered::new(),
            later: BTreeMap::new(),
            events,
            offers,
        }
    }

    /// Runs until told to stop, then finishes what is under way and gives the rest back.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(self.fleet.options.timings.tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.fill();
            let due = self.later.first_key_value().map(|((at, _), _)| *at);
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = self.under_way.next(), if !self.under_way.is_empty() => {
                    self.settle(done);
                }
                Some(event) = self.events.recv() => self.take(event),
                Some(message) = self.offers.next() => self.hinted(&message.payload),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)),
                    if due.is_some() => self.due(),
                _ = tick.tick() => self.tick(),
            }
        }
        self.drain().await;
    }

    fn line(&mut self, pool: &PoolId) -> &mut Line {
        let most = self.fleet.options.in_flight;
        self.lines.entry(pool.clone()).or_insert_with(|| Line {
            queue: FairQueue::default(),
            pace: Pace::new(most),
            claiming: 0,
        })
    }

    fn queue(&mut self, job: Box<Job>) {
        let pool = job.request.pool.clone();
        let ticket = job.ticket.clone();
        self.line(&pool).queue.push(ticket, job);
    }

    /// Starts as many placements as may be under way, pools in turn.
    fn fill(&mut self) {
        while self.under_way.len() < self.fleet.options.in_flight {
            let after = self.last.clone();
            let ready = |(_, line): &(&PoolId, &Line)| {
                !line.queue.is_empty() && line.pace.allows(line.claiming)
            };
            let next = self
                .lines
                .iter()
                .filter(ready)
                .find(|(pool, _)| after.as_ref().is_none_or(|after| *pool > after))
                .or_else(|| self.lines.iter().find(ready))
                .map(|(pool, _)| pool.clone());
            let Some(pool) = next else { break };
            self.last = Some(pool.clone());
            let line = self.line(&pool);
            let Some(job) = line.queue.pop() else { break };
            line.claiming += 1;
            self.start(job, Work::Place);
        }
        let queued: usize = self.lines.values().map(|line| line.queue.len()).sum();
        let queued = queued + self.later.len();
        self.fleet.metrics.queued.set(queued as i64, ());
    }

    fn start(&mut self, job: Box<Job>, work: Work) {
        let pool = job.request.pool.clone();
        let fleet = self.fleet.clone();
        let task = self
            .fleet
            .group
            .spawn("place", async move { place::run(&fleet, job, work).await });
        self.under_way
            .push(async move { (pool, work, task.await.ok()) }.boxed());
    }

    fn settle(&mut self, (pool, work, placed): (PoolId, Work, Option<Placed>)) {
        let line = self.line(&pool);
        if work == Work::Place {
            line.claiming = line.claiming.saturating_sub(1);
        }
        match placed {
            Some(Placed::Settled { granted: true }) => line.pace.granted(),
            Some(Placed::Settled { granted: false }) | None => {}
            Some(Placed::NoneWarm(job)) => {
                line.pace.none_warm();
                self.queue(job);
            }
            Some(Placed::Later(job, wait)) => {
                // A probe that said nothing about the pool must not leave it halted.
                line.pace.hint();
                self.postpone(job, wait);
            }
        }
    }

    fn postpone(&mut self, job: Box<Job>, wait: Duration) {
        let sequence = job.ticket.sequence;
        self.later.insert((Instant::now() + wait, sequence), job);
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Queue(job) => self.queue(job),
            Event::Cancel {
                tenant,
                task,
                found,
            } => {
                let mut jobs: Vec<Box<Job>> = self
                    .lines
                    .values_mut()
                    .flat_map(|line| line.queue.take_task(&tenant, task))
                    .collect();
                let same = |job: &Job| job.request.tenant == tenant && job.request.id == task;
                let waiting: Vec<_> = self
                    .later
                    .iter()
                    .filter(|(_, job)| same(job))
                    .map(|(key, _)| *key)
                    .collect();
                jobs.extend(waiting.iter().filter_map(|key| self.later.remove(key)));
                // Nobody waits for the answer where the receiver is gone.
                let _ = found.send(!jobs.is_empty());
                for job in jobs {
                    self.start(job, Work::Cancel);
                }
            }
        }
    }

    fn hinted(&mut self, payload: &[u8]) {
        let hint = codec::decode::<OfferHint>(payload, codec::Format::MessagePack)
            .or_else(|_| codec::decode::<OfferHint>(payload, codec::Format::Json));
        if let Ok(hint) = hint
            && let Some(line) = self.lines.get_mut(&hint.pool)
        {
            line.pace.hint();
        }
    }

    fn due(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.later.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let job = entry.remove();
            self.queue(job);
        }
    }

    /// Hints may be missed, and deadlines pass.
    fn tick(&mut self) {
        let now = Timestamp::now();
        let mut expired = Vec::new();
        for line in self.lines.values_mut() {
            if line.pace.halted() {
                line.pace.hint();
            }
            expired.extend(line.queue.take_expired(now));
        }
        for job in expired {
            self.start(job, Work::Expire);
        }
        self.lines
            .retain(|_, line| !line.queue.is_empty() || line.claiming > 0 || line.pace.halted());
    }

    async fn drain(mut self) {
        self.events.close();
        let bound = self.fleet.options.timings.drain;
        let mut left: Vec<Box<Job>> = Vec::new();
        let finished = tokio::time::timeout(bound, async {
            while let Some((_, _, placed)) = self.under_way.next().await {
                match placed {
                    Some(Placed::NoneWarm(job) | Placed::Later(job, _)) => left.push(job),
                    Some(Placed::Settled { .. }) | None => {}
                }
            }
        })
        .await;
        if finished.is_err() {
            tracing::warn!(
                placements = self.under_way.len(),
                "placements did not end in time, their requests come again"
            );
        }
        while let Some(event) = self.events.recv().await {
            if let Event::Queue(job) = event {
                left.push(job);
            }
        }
        left.extend(std::mem::take(&mut self.later).into_values());
        for line in self.lines.values_mut() {
            left.extend(line.queue.drain());
        }
        if !left.is_empty() {
            tracing::info!(requests = left.len(), "requests go back to the stream");
        }
        for job in left {
            job.give_back().await;
        }
    }
}
