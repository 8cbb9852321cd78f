//! A leader among consumers that somebody else makes and removes.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use broker_schema::codec::{self, Format};
use broker_schema::stream::{ConsumerDef, lane_consumer, lane_term};
use broker_schema::{ErrorCode, PoolId, Term};
use support::{FakeWorker, Fleet, task, until};

fn py() -> PoolId {
    "py".parse().unwrap()
}

/// The lane that the test's tasks are in, in a term.
fn lane(fleet: &Fleet, term: Term) -> ConsumerDef {
    let subjects = fleet.broker.subjects();
    lane_consumer(subjects, &"acme".parse().unwrap(), &py(), term, 256)
}

async fn lanes(fleet: &Fleet) -> Vec<String> {
    let requests = &fleet.broker.streams().requests;
    let consumers = fleet.broker.consumers(requests).await.unwrap();
    consumers
        .into_iter()
        .map(|consumer| consumer.durable)
        .collect()
}

async fn term(fleet: &Fleet) -> Term {
    until("somebody leads", async || {
        let leaders = fleet.lease.leaders(&[py()]).await.unwrap();
        leaders.first().map(|leader| leader.term)
    })
    .await
}

/// A task goes its way, once.
async fn works(fleet: &Fleet, worker: &mut FakeWorker) {
    let task = task();
    worker.offer(fleet, 1).await;
    fleet.submit(&task).await;
    let (placement, delivery) = worker.placement(fleet).await;
    assert_eq!((placement.task.id, placement.attempt), (task.id, 1));
    delivery.ack().await.unwrap();
    fleet.requests_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_whose_consumer_is_removed_comes_back_in_the_same_term() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    works(&fleet, &mut worker).await;
    let own = lane(&fleet, term(&fleet).await).durable;
    assert_eq!(lanes(&fleet).await, [own.as_str()]);
    // One that waits here, and comes again.
    let waiting = task();
    fleet.submit(&waiting).await;
    let requests = fleet.broker.streams().requests.clone();
    until("it is fetched", async || {
        let consumers = fleet.broker.consumers(&requests).await.unwrap();
        consumers
            .iter()
            .any(|lane| lane.ack_pending == 1)
            .then_some(())
    })
    .await;
    assert!(fleet.broker.delete_consumer(&requests, &own).await.unwrap());
    until("it is back", async || {
        (lanes(&fleet).await == [own.as_str()]).then_some(())
    })
    .await;
    worker.offer(&fleet, 1).await;
    let (placement, delivery) = worker.placement(&fleet).await;
    assert_eq!((placement.task.id, placement.attempt), (waiting.id, 1));
    delivery.ack().await.unwrap();
    works(&fleet, &mut worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_of_earlier_leaders_and_of_nobody_are_removed_and_later_ones_only_when_sure() {
    let mut fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    works(&fleet, &mut worker).await;
    let first = term(&fleet).await;
    fleet.stop_dispatcher().await;
    assert_eq!(
        fleet.lease.leaders(&[py()]).await.unwrap(),
        [],
        "it gave up what it led"
    );
    assert_eq!(
        lanes(&fleet).await,
        [lane(&fleet, first).durable],
        "the next one removes it"
    );

    // One that an earlier version left, one that a lost Redis knew, one that is nobody's.
    let requests = fleet.broker.streams().requests.clone();
    let impostors = [
        "lane-acme-py".to_owned(),
        lane(&fleet, Term(u64::MAX)).durable,
        "a-strangers".to_owned(),
    ];
    let mut before = lane(&fleet, first).durable;
    for impostor in impostors {
        fleet
            .broker
            .delete_consumer(&requests, &before)
            .await
            .unwrap();
        let def = ConsumerDef {
            durable: impostor.clone(),
            ..lane(&fleet, first)
        };
        fleet.broker.ensure_consumer(&def).await.unwrap();
        fleet.start_dispatcher().await;
        works(&fleet, &mut worker).await;
        let now = term(&fleet).await;
        assert!(now > first);
        assert_eq!(
            lanes(&fleet).await,
            [lane(&fleet, now).durable],
            "{impostor}"
        );
        fleet.stop_dispatcher().await;
        before = lane(&fleet, now).durable;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_nobody_has_is_answered_by_the_fleets_leader() {
    let fleet = Fleet::start().await;
    let mut stray = task();
    stray.pool = "nope".parse().unwrap();
    fleet.submit(&stray).await;
    let terminal = fleet.terminal("r1", stray.id).await;
    assert_eq!(terminal.error.unwrap().code, ErrorCode::UnknownPool);
    let whole_fleet: PoolId = "_fleet".parse().unwrap();
    let leaders = fleet.lease.leaders(&[whole_fleet]).await.unwrap();
    let terms: Vec<_> = lanes(&fleet)
        .await
        .iter()
        .filter_map(|name| lane_term(name))
        .collect();
    assert_eq!(terms, [leaders[0].term]);
    // Another dispatcher has it: it is left to that one.
    let pool: PoolId = "elsewhere".parse().unwrap();
    let id = "another".parse().unwrap();
    let request = remuda_lease::LeadRequest {
        dispatcher: &id,
        ttl: std::time::Duration::from_secs(600),
        take: true,
        pools: std::slice::from_ref(&pool),
    };
    let led = fleet.lease.lead(&request).await.unwrap();
    assert!(
        matches!(led.pools[&pool], remuda_lease::Lead::Mine(_)),
        "{led:?}"
    );
    let mut theirs = task();
    theirs.pool = pool;
    let payload = codec::encode(&theirs, Format::MessagePack).unwrap();
    let subject = "remuda.req.acme.elsewhere";
    fleet
        .publish(subject, None, Format::MessagePack, payload)
        .await;
    // The next request of the fleet's own shows that it was passed by.
    let mut other = task();
    other.pool = "nope-either".parse().unwrap();
    fleet.submit(&other).await;
    fleet.terminal("r1", other.id).await;
    let requests = &fleet.broker.streams().requests;
    assert_eq!(fleet.stored(requests, subject).await, 1);
}
