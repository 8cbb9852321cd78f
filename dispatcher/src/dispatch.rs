//! The one loop that owns the queue: it takes jobs in, has them placed, and waits for pools.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use broker_schema::event::OfferHint;
use broker_schema::{
    CancelNotice, ErrorInfo, Notices, Outcome, PoolId, TenantId, Timestamp, codec,
};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::{Brake, Pace};
pub(crate) use crate::event::Event;
use crate::event::group_of;
use crate::fleet::Fleet;
use crate::group::{Entry, GroupKey, Groups};
use crate::leader::Terms;
use crate::place::{self, Job, Placed, Work};
use crate::queue::{FairQueue, Ticket};
use crate::quota::{self, TenantGate};

/// One pool's queue and how fast it may be emptied.
#[derive(Debug)]
struct Line {
    queue: FairQueue<Box<Job>>,
    pace: Pace,
    brake: Brake,
    claiming: usize,
}

/// A piece of work under way.
type UnderWay = BoxFuture<'static, Done>;

#[derive(Debug)]
struct Done {
    pool: PoolId,
    tenant: TenantId,
    /// The request's, where it was a placement.
    placing: Option<u64>,
    /// `None` where it panicked: its request comes again by itself.
    placed: Option<Placed>,
}

pub(crate) struct Dispatch {
    fleet: Arc<Fleet>,
    lines: BTreeMap<PoolId, Line>,
    /// Whose turn it is among the pools.
    last: Option<PoolId>,
    under_way: FuturesUnordered<UnderWay>,
    /// Requests that are being placed, and who is to be told should they come back.
    placing: HashMap<u64, (Ticket, Option<oneshot::Sender<Outcome>>)>,
    /// Tenants that have quotas, while they have something to place.
    gates: BTreeMap<TenantId, TenantGate>,
    /// Jobs that wait for the others of their groups.
    groups: Groups<Box<Job>>,
    /// What was cancelled lately.
    notices: Notices,
    /// Jobs that are asked about again at a time. The number tells equal times apart.
    later: BTreeMap<(Instant, u64), Box<Job>>,
    events: mpsc::Receiver<Event>,
    offers: async_nats::Subscriber,
    /// What this dispatcher leads; other pools' jobs are somebody else's.
    terms: watch::Receiver<Terms>,
}

impl Dispatch {
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        events: mpsc::Receiver<Event>,
        offers: async_nats::Subscriber,
    ) -> Self {
        Self {
            terms: fleet.leadership.subscribe(),
            groups: Groups::new(fleet.options.timings.group_hold, fleet.options.window),
            gates: BTreeMap::new(),
            placing: HashMap::new(),
            notices: Notices::default(),
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
            let due = self.next_due();
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = self.under_way.next(), if !self.under_way.is_empty() => {
                    self.settle(done);
                }
                Ok(()) = self.terms.changed() => self.forget_others(),
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
            brake: Brake::default(),
            claiming: 0,
        })
    }

    /// Where a job goes that has just come; `None` where it is not, or no longer, for the queue.
    fn admitted(&mut self, job: Box<Job>) -> Option<Box<Job>> {
        // It comes again, to whoever leads now.
        if !self.is_ours(&job) {
            return None;
        }
        let Ticket {
            tenant, task, run, ..
        } = &job.ticket;
        let group = job.ticket.group.as_ref();
        let now = Instant::now().into_std();
        if let Some(cause) = self.notices.cause(tenant, *task, run, group, now) {
            self.start(job, Work::Cancel(cause));
            return None;
        }
        Some(job)
    }

    fn is_ours(&self, job: &Job) -> bool {
        self.terms.borrow().get(&job.request.pool) == Some(&job.term)
    }

    /// Takes in a job that was fetched: it is queued, or waits for its group.
    fn arrive(&mut self, job: Box<Job>) {
        let Some(job) = self.admitted(job) else {
            return;
        };
        let Some((key, size)) = group_of(&job.request).filter(|_| !job.is_handed_back()) else {
            self.push(job.ticket.clone(), job);
            return;
        };
        let limit = self.fleet.tenants.of(&key.tenant).max_queued;
        if let Some(limit) = limit.filter(|limit| (*limit as usize) < size) {
            let size = job.request.group_size.unwrap_or_default();
            let error = quota::group_too_large(&key.tenant, limit, size);
            self.start(job, Work::Reject(Box::new(error)));
            return;
        }
        let now = Instant::now().into_std();
        match self.groups.add(&key, size, job.ticket.clone(), job, now) {
            Entry::Held => {}
            Entry::Queue(members) => self.push_group(members),
            Entry::Refuse(job, error) => self.start(job, Work::Reject(Box::new(error))),
        }
    }

    fn push_group(&mut self, members: Vec<(Ticket, Box<Job>)>) {
        for (ticket, mut job) in members {
            job.ticket = ticket.clone();
            self.push(ticket, job);
        }
    }

    fn push(&mut self, ticket: Ticket, job: Box<Job>) {
        let pool = job.request.pool.clone();
        self.line(&pool).queue.push(ticket, job);
    }

    /// Queues a job again that got nothing: its turn is not counted.
    fn put_back(&mut self, job: Box<Job>) {
        if job.held.is_superseded() {
            return;
        }
        if let Some(job) = self.admitted(job) {
            let pool = job.request.pool.clone();
            self.line(&pool).queue.put_back(job.ticket.clone(), job);
        }
    }

    /// Drops the jobs of pools that are led by others now. Nothing is said to the server: the new
    /// leader gets them at once, from a consumer of its own.
    fn forget_others(&mut self) {
        let terms = self.terms.borrow_and_update().clone();
        let ours = |job: &Job| terms.get(&job.request.pool) == Some(&job.term);
        self.later.retain(|_, job| ours(job));
        self.groups.retain(|job| ours(job));
        for line in self.lines.values_mut() {
            for job in line.queue.drain() {
                if ours(&job) {
                    line.queue.push(job.ticket.clone(), job);
                }
            }
        }
    }

    /// Starts as many placements as may be under way, pools in turn.
    fn fill(&mut self) {
        while self.under_way.len() < self.fleet.options.in_flight {
            let after = self.last.clone();
            let leadership = &self.fleet.leadership;
            let gates = &self.gates;
            let may_go = |tenant: &TenantId| gates.get(tenant).is_none_or(TenantGate::may_go);
            let ready = |(pool, line): &(&PoolId, &Line)| {
                line.brake.until().is_none()
                    && line.pace.allows(line.claiming)
                    && line.queue.is_ready(may_go)
                    && leadership.leads(pool).is_some()
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
            let Some(line) = self.lines.get_mut(&pool) else {
                break;
            };
            let Some(job) = line.queue.pop(may_go) else {
                break;
            };
            line.claiming += 1;
            self.began(&job.ticket.tenant);
            self.start(job, Work::Place);
        }
        let queued: usize = self.lines.values().map(|line| line.queue.len()).sum();
        let queued = queued + self.later.len() + self.groups.len();
        self.fleet.metrics.queued.set(queued as i64, ());
    }

    fn began(&mut self, tenant: &TenantId) {
        if let Some(gate) = self.gates.get_mut(tenant) {
            gate.began();
        } else if self.fleet.tenants.of(tenant).is_held_back() {
            let mut gate = TenantGate::new(self.fleet.options.in_flight);
            gate.began();
            self.gates.insert(tenant.clone(), gate);
        }
    }

    fn start(&mut self, job: Box<Job>, work: Work) {
        let (pool, tenant) = (job.request.pool.clone(), job.request.tenant.clone());
        let placing = (work == Work::Place).then_some(job.ticket.sequence);
        if let Some(sequence) = placing {
            self.placing.insert(sequence, (job.ticket.clone(), None));
        }
        let fleet = self.fleet.clone();
        let task = self.fleet.group.spawn("place", async move {
            Box::pin(place::run(&fleet, job, work)).await
        });
        let done = async move {
            Done {
                pool,
                tenant,
                placing,
                placed: task.await.ok(),
            }
        };
        self.under_way.push(done.boxed());
    }

    fn settle(&mut self, done: Done) {
        let Done {
            pool,
            tenant,
            placing,
            placed,
        } = done;
        let mut told = None;
        if let Some(sequence) = placing {
            told = self.placing.remove(&sequence).and_then(|(_, told)| told);
            let line = self.line(&pool);
            line.claiming = line.claiming.saturating_sub(1);
            if let Some(gate) = self.gates.get_mut(&tenant) {
                gate.ended();
            }
        }
        match placed {
            Some(Placed::Settled { granted: true }) => {
                let line = self.line(&pool);
                line.pace.granted();
                line.brake.taken();
                if let Some(gate) = self.gates.get_mut(&tenant) {
                    gate.granted();
                }
                self.fleet.grants.add(&pool);
            }
            Some(Placed::Settled { granted: false }) | None => {}
            Some(Placed::NoneWarm(mut job)) => {
                job.told = job.told.or(told);
                self.line(&pool).pace.none_warm();
                self.put_back(job);
            }
            Some(Placed::OverQuota(mut job)) => {
                job.told = job.told.or(told);
                // A probe that said nothing about the pool must not leave it halted.
                self.line(&pool).pace.hint();
                if let Some(gate) = self.gates.get_mut(&tenant) {
                    gate.over(Instant::now());
                }
                self.put_back(job);
            }
            Some(Placed::Refused(mut job, wait)) => {
                job.told = job.told.or(told);
                let line = self.line(&pool);
                line.pace.none_warm();
                line.brake.refused(Instant::now(), rand::random());
                self.postpone(job, wait);
            }
            Some(Placed::Later(mut job, wait)) => {
                job.told = job.told.or(told);
                self.line(&pool).pace.hint();
                self.postpone(job, wait);
            }
        }
    }

    fn postpone(&mut self, job: Box<Job>, wait: Duration) {
        if job.held.is_superseded() {
            return;
        }
        let sequence = job.ticket.sequence;
        self.later.insert((Instant::now() + wait, sequence), job);
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Queue(job) => self.arrive(job),
            Event::Cancel { notice, found } => {
                self.notices.add(&notice, Instant::now().into_std());
                let jobs = self.take_meant(&notice);
                let mut heard = Vec::with_capacity(jobs.len());
                for mut job in jobs {
                    let (told, hear) = oneshot::channel();
                    job.told = Some(told);
                    heard.push(hear);
                    self.start(job, Work::Cancel(notice.cause));
                }
                // What is being placed ends when it comes back; else it was placed or has ended,
                // and nobody is told how.
                for (ticket, told) in self.placing.values_mut() {
                    if ticket.is_meant(&notice) {
                        let (teller, hear) = oneshot::channel();
                        *told = Some(teller);
                        heard.push(hear);
                    }
                }
                // Nobody waits for the answer where the receiver is gone.
                let _ = found.send(heard);
            }
            Event::Refuse {
                sequence,
                error,
                found,
            } => {
                let job = self.take_sequence(sequence);
                let _ = found.send(job.is_some());
                if let Some(job) = job {
                    if let Some((key, _)) = group_of(&job.request) {
                        self.refuse_group(&key, &error);
                    }
                    self.start(job, Work::Reject(error));
                }
            }
            Event::RefuseGroup { key, error } => self.refuse_group(&key, &error),
        }
    }

    fn refuse_group(&mut self, key: &GroupKey, error: &ErrorInfo) {
        let now = Instant::now().into_std();
        for job in self.groups.refuse(key, error, now) {
            self.start(job, Work::Reject(Box::new(error.clone())));
        }
    }

    #[expect(clippy::vec_box, reason = "jobs stay in their boxes")]
    fn take_meant(&mut self, notice: &CancelNotice) -> Vec<Box<Job>> {
        let lines = self.lines.values_mut();
        let mut jobs: Vec<Box<Job>> = lines
            .flat_map(|line| line.queue.take_meant(notice))
            .collect();
        jobs.extend(self.groups.take_meant(notice));
        jobs.extend(self.take_later(|job| job.ticket.is_meant(notice)));
        jobs
    }

    fn take_sequence(&mut self, sequence: u64) -> Option<Box<Job>> {
        let mut lines = self.lines.values_mut();
        lines
            .find_map(|line| line.queue.take(sequence))
            .or_else(|| self.groups.take(sequence))
            .or_else(|| self.take_later(|job| job.ticket.sequence == sequence).pop())
    }

    #[expect(clippy::vec_box, reason = "jobs stay in their boxes")]
    fn take_later(&mut self, taken: impl Fn(&Job) -> bool) -> Vec<Box<Job>> {
        let keys: Vec<_> = self
            .later
            .iter()
            .filter(|(_, job)| taken(job))
            .map(|(key, _)| *key)
            .collect();
        keys.iter()
            .filter_map(|key| self.later.remove(key))
            .collect()
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

    /// When something is to be done that no event tells of.
    fn next_due(&self) -> Option<Instant> {
        let later = self.later.first_key_value().map(|((at, _), _)| *at);
        let groups = self.groups.next_due().map(Instant::from_std);
        let gates = self.gates.values().filter_map(TenantGate::again_at).min();
        let brakes = self.lines.values().filter_map(|line| line.brake.until());
        let brakes = brakes.min();
        [later, groups, gates, brakes].into_iter().flatten().min()
    }

    fn due(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.later.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let job = entry.remove();
            if let Some(job) = self.admitted(job) {
                self.push(job.ticket.clone(), job);
            }
        }
        let members = self.groups.take_due(now.into_std());
        self.push_group(members);
        for gate in self.gates.values_mut() {
            gate.tick(now);
        }
        for line in self.lines.values_mut() {
            if line.brake.tick(now) {
                line.pace.hint();
            }
        }
    }

    /// Hints may be missed, and deadlines pass.
    fn tick(&mut self) {
        let now = Timestamp::now();
        let mut expired = self.groups.take_expired(now);
        for line in self.lines.values_mut() {
            if line.pace.halted() {
                line.pace.hint();
            }
            expired.extend(line.queue.take_expired(now));
        }
        for job in expired {
            self.start(job, Work::Expire);
        }
        self.lines.retain(|_, line| {
            !line.queue.is_empty()
                || line.claiming > 0
                || line.pace.halted()
                || line.brake.until().is_some()
        });
        self.gates.retain(|_, gate| !gate.is_idle());
    }

    async fn drain(mut self) {
        self.events.close();
        let bound = self.fleet.options.timings.drain;
        let mut left: Vec<Box<Job>> = Vec::new();
        let finished = tokio::time::timeout(bound, async {
            while let Some(done) = self.under_way.next().await {
                match done.placed {
                    Some(
                        Placed::NoneWarm(job)
                        | Placed::OverQuota(job)
                        | Placed::Refused(job, _)
                        | Placed::Later(job, _),
                    ) => left.push(job),
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
        left.extend(self.groups.drain());
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
