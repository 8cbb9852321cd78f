//! Builds the parts, runs them, and takes them down in order.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::RequestLimits;
use remuda_client::broker::Broker;
use remuda_lease::LeaseStore;
use remuda_telemetry::{Chain, Readiness, TaskGroup};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::credit::{Backlog, Grants};
use crate::dispatch::Dispatch;
use crate::error::DispatcherError;
use crate::fleet::Fleet;
use crate::leader::{self, Leadership, Order};
use crate::metrics::Metrics;
use crate::options::DispatcherOptions;
use crate::progress::HeldSet;
use crate::tenants::Tenants;
use crate::{
    advisories, cancel, credit, lane, progress, quota, reaper, registry, removal, streams, sweep,
    witness,
};

pub(crate) const PART_NATS: &str = "nats";
pub(crate) const PART_REDIS: &str = "redis";
/// How long parts may take to end once they are told to.
const END: Duration = Duration::from_secs(5);
/// How long placements under way may take before the pools go to others all the same.
const HAND_OVER: Duration = Duration::from_secs(2);

/// What must be up for a dispatcher to be ready.
pub fn readiness() -> Readiness {
    Readiness::new(&[PART_NATS, PART_REDIS])
}

/// Runs a dispatcher until `shutdown`. Errors come from the start alone: what is lost later is
/// waited for.
pub async fn run(
    options: DispatcherOptions,
    shutdown: CancellationToken,
) -> Result<(), DispatcherError> {
    run_with(options, shutdown, readiness()).await
}

/// As [`run`], with a readiness that the caller serves. Metrics are declared here: telemetry
/// must have been started.
pub async fn run_with(
    options: DispatcherOptions,
    shutdown: CancellationToken,
    readiness: Readiness,
) -> Result<(), DispatcherError> {
    options
        .validate()
        .map_err(|problems| DispatcherError::Options { problems })?;
    let broker = Broker::connect(&options.nats.broker())
        .await
        .map_err(DispatcherError::Connect)?;
    broker
        .ensure_streams(&options.streams.into())
        .await
        .map_err(DispatcherError::Streams)?;
    let lease = LeaseStore::connect(&options.redis)
        .await
        .map_err(DispatcherError::Lease)?;
    for warning in lease.suitability().await.map_err(DispatcherError::Lease)? {
        tracing::warn!("{warning}");
    }
    let host = nix::unistd::gethostname().unwrap_or_default();
    let (leadership, orders) = Leadership::new(leader::fresh_id(&host.to_string_lossy()));
    let fleet = Arc::new(Fleet {
        leadership,
        tenants: Tenants::new(&options.tenants),
        grants: Grants::default(),
        pools: options
            .pools
            .iter()
            .map(|pool| (pool.name.clone(), pool.clone()))
            .collect(),
        metrics: Metrics::new(options.pools.iter().map(|pool| &pool.name)),
        limits: RequestLimits::default(),
        held: HeldSet::default(),
        group: TaskGroup::new(),
        broker,
        lease,
        options,
        readiness,
        leaving: shutdown.clone(),
    });
    fleet.bootstrap().await?;
    serve(fleet, orders, shutdown).await
}

async fn serve(
    fleet: Arc<Fleet>,
    orders: mpsc::UnboundedReceiver<Order>,
    shutdown: CancellationToken,
) -> Result<(), DispatcherError> {
    let subjects = fleet.broker.subjects();
    let leaders = subscribe(&fleet, "leaders", subjects.leader_hint(), None).await?;
    let offers = subscribe(&fleet, "offers", subjects.offer_hint(), None).await?;
    let hints = subscribe(&fleet, "lanes", subjects.lane_hint(), None).await?;
    let notices = subscribe(&fleet, "what is cancelled", subjects.cancel_hint(), None).await?;
    let cancels = subscribe(
        &fleet,
        "cancellations",
        subjects.cancels(),
        Some("dispatcher"),
    )
    .await?;
    let (events, received) = mpsc::channel(256);
    let lanes = fleet.group.child();
    let stop = CancellationToken::new();
    let release = CancellationToken::new();

    let group = &fleet.group;
    let dispatch = Dispatch::new(fleet.clone(), received, offers);
    let dispatch = group.spawn("dispatch", dispatch.run(stop.clone()));
    group.spawn("progress", progress::run(fleet.clone()));
    group.spawn("registry", registry::run(fleet.clone()));
    group.spawn("reaper", reaper::run(fleet.clone()));
    group.spawn("advisories", advisories::run(fleet.clone()));
    group.spawn("streams", streams::run(fleet.clone()));
    group.spawn("sweep", sweep::run(fleet.clone()));
    group.spawn("removal", removal::run(fleet.clone()));
    group.spawn("witness", witness::run(fleet.clone()));
    let leading = leader::run(fleet.clone(), orders, leaders, release.clone());
    group.spawn("leader", leading);
    group.spawn(
        "cancels",
        cancel::run(fleet.clone(), cancels, events.clone()),
    );
    let (backlog, waiting) = watch::channel(Backlog::new());
    group.spawn("credit", credit::run(fleet.clone(), backlog));
    group.spawn("quotas", quota::run(fleet.clone(), waiting, events.clone()));
    group.spawn(
        "cancelled elsewhere",
        cancel::listen(fleet.clone(), notices, events.clone()),
    );
    lanes.spawn(
        "lanes",
        lane::watch(fleet.clone(), hints, events, lanes.clone()),
    );
    fleet.note_servers(Ok(()));
    tracing::info!(
        nats = fleet.broker.url(),
        pools = fleet.pools.len(),
        dispatcher = %fleet.leadership.dispatcher(),
        "dispatcher runs"
    );

    shutdown.cancelled().await;
    tracing::info!("dispatcher stops: nothing new is fetched");
    fleet.readiness.set(PART_NATS, false);
    let timings = &fleet.options.timings;
    let ending = end(&fleet, &lanes, &stop, &release, dispatch);
    tokio::select! {
        biased;
        () = ending => remuda_telemetry::history::record(|| remuda_telemetry::history::Event::Left),
        () = fleet.broker.lost_for(timings.unreachable) => tracing::warn!(
            bound = ?timings.unreachable, "stopping without NATS: what is held comes again"
        ),
        () = tokio::time::sleep(timings.drain + timings.unreachable) => {
            tracing::warn!("stopping took too long: what is held comes again");
        }
    }
    release.cancel();
    if tokio::time::timeout(HAND_OVER, fleet.leadership.gone())
        .await
        .is_err()
    {
        tracing::warn!("what is led was not given up, others wait for the term's end");
    }
    fleet.group.cancel();
    Ok(())
}

async fn end(
    fleet: &Fleet,
    lanes: &TaskGroup,
    stop: &CancellationToken,
    release: &CancellationToken,
    mut dispatch: tokio::task::JoinHandle<()>,
) {
    // Stop fetching; then end what is under way and give the rest back; then let others lead;
    // then the others, who until now kept marking what is held.
    lanes.close_and_wait(END).await;
    stop.cancel();
    let under_way = tokio::time::timeout(HAND_OVER, &mut dispatch).await;
    release.cancel();
    let ended = match under_way {
        Ok(ended) => ended,
        Err(_) => dispatch.await,
    };
    if ended.is_err() {
        tracing::error!("the dispatch loop ended by a panic, requests come again");
    }
    fleet.group.close_and_wait(END).await;
    let flushed = tokio::time::timeout(END, fleet.broker.nats().flush()).await;
    match flushed {
        Ok(Ok(())) => tracing::info!("dispatcher stopped"),
        Ok(Err(error)) => tracing::warn!(error = %Chain(&error), "nats was not flushed"),
        Err(_) => tracing::warn!("nats was not flushed in time"),
    }
}

async fn subscribe(
    fleet: &Fleet,
    what: &'static str,
    subject: String,
    queue: Option<&str>,
) -> Result<async_nats::Subscriber, DispatcherError> {
    let nats = fleet.broker.nats();
    let subscribed = match queue {
        Some(queue) => nats.queue_subscribe(subject, queue.to_owned()).await,
        None => nats.subscribe(subject).await,
    };
    subscribed.map_err(|source| DispatcherError::Listen { what, source })
}
