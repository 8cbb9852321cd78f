//! Leadership of pools, on a real Redis.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::time::Duration;

use broker_schema::{DispatcherId, PoolId, Term};
use remuda_lease::{Lead, LeadRequest, Leads, LeaseStore};
use support::{Redis, until};

/// So long that it does not run out by itself in a test.
const LONG: Duration = Duration::from_secs(600);

struct Dispatcher {
    id: DispatcherId,
    store: LeaseStore,
    ttl: Duration,
    pools: Vec<PoolId>,
}

impl Dispatcher {
    fn new(name: &str, store: &LeaseStore, pools: &[&str]) -> Self {
        Self {
            id: name.parse().unwrap(),
            store: store.clone(),
            ttl: LONG,
            pools: pools.iter().map(|pool| pool.parse().unwrap()).collect(),
        }
    }

    async fn ask(&self, take: bool) -> Leads {
        let request = LeadRequest {
            dispatcher: &self.id,
            ttl: self.ttl,
            take,
            pools: &self.pools,
        };
        self.store.lead(&request).await.unwrap()
    }

    async fn lead(&self) -> Leads {
        self.ask(true).await
    }

    async fn step_down(&self, leaving: bool, pools: &[PoolId]) {
        let store = &self.store;
        store.step_down(&self.id, leaving, pools).await.unwrap();
    }
}

fn mine(leads: &Leads) -> Vec<(String, Term)> {
    leads
        .pools
        .iter()
        .filter_map(|(pool, lead)| match lead {
            Lead::Mine(term) => Some((pool.to_string(), *term)),
            _ => None,
        })
        .collect()
}

fn the_one(leads: &Leads) -> Option<Term> {
    mine(leads).first().map(|(_, term)| *term)
}

async fn start(redis: &Redis) -> LeaseStore {
    let store = redis.store(&redis.options()).await;
    assert_eq!(store.install_incarnation(1).await.unwrap(), 1);
    store
}

#[tokio::test]
async fn one_leads_until_it_stops_renewing_and_the_next_has_a_higher_term() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let mut a = Dispatcher::new("a", &store, &["py"]);
    let mut b = Dispatcher::new("b", &store, &["py"]);
    (a.ttl, b.ttl) = (Duration::from_millis(400), Duration::from_millis(400));
    let first = the_one(&a.lead().await).unwrap();
    let refused = b.lead().await;
    match &refused.pools[&b.pools[0]] {
        Lead::Other {
            dispatcher,
            remaining,
        } => {
            assert_eq!(dispatcher, &a.id);
            assert!(*remaining <= a.ttl);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        the_one(&a.lead().await),
        Some(first),
        "renewing keeps the term"
    );
    let second = until("the term runs out", async || the_one(&b.lead().await)).await;
    assert!(second > first);
    // Whoever was away too long does not get its old term back.
    assert_eq!(the_one(&a.lead().await), None);
    let leaders = store.leaders(&a.pools).await.unwrap();
    assert_eq!((&leaders[0].dispatcher, leaders[0].term), (&b.id, second));
}

#[tokio::test]
async fn stepping_down_lets_the_next_one_in_at_once() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let (a, b) = (
        Dispatcher::new("a", &store, &["py"]),
        Dispatcher::new("b", &store, &["py"]),
    );
    let first = the_one(&a.lead().await).unwrap();
    assert_eq!(the_one(&b.lead().await), None);
    // Not its own: nothing happens.
    b.step_down(false, &b.pools).await;
    assert_eq!(the_one(&a.lead().await), Some(first));
    a.step_down(true, &a.pools).await;
    assert_eq!(store.leaders(&a.pools).await.unwrap(), []);
    let taken = b.lead().await;
    assert!(the_one(&taken).unwrap() > first);
    assert_eq!(taken.dispatchers, 1, "the one that left counts no more");
}

#[tokio::test]
async fn dispatchers_share_the_pools() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let pools = ["_fleet", "a", "b", "c"];
    let (a, b) = (
        Dispatcher::new("a", &store, &pools),
        Dispatcher::new("b", &store, &pools),
    );
    assert_eq!(mine(&a.lead().await).len(), 4, "alone it leads all");
    assert_eq!(mine(&b.lead().await), []);
    let again = a.lead().await;
    assert_eq!((again.dispatchers, again.share), (2, 2));
    a.step_down(false, &a.pools[..2]).await;
    assert_eq!(
        mine(&a.lead().await).len(),
        2,
        "it does not take back what it gave away"
    );
    let taken: Vec<String> = mine(&b.lead().await)
        .into_iter()
        .map(|(pool, _)| pool)
        .collect();
    assert_eq!(taken, ["_fleet", "a"]);
    // Nobody with room left: what stays free is taken all the same.
    b.step_down(false, &b.pools[..2]).await;
    until("somebody takes what is free for long", async || {
        (mine(&a.lead().await).len() == 4).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_flush_begins_terms_that_were_never_there() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let a = Dispatcher::new("a", &store, &["py"]);
    let before = the_one(&a.lead().await).unwrap();
    redis.command(&["FLUSHALL"]).await;
    let after = a.lead().await;
    assert!(!after.in_force);
    assert_eq!(
        the_one(&after),
        None,
        "nothing is led without an incarnation"
    );
    assert_eq!(store.install_incarnation(2).await.unwrap(), 2);
    let new = the_one(&a.lead().await).unwrap();
    assert!(new > before);
    assert_eq!(new, Term::new(2, 1));
}

#[tokio::test]
async fn a_restart_keeps_leaders_and_gives_no_term_under_the_old_incarnation() {
    let mut redis = Redis::start_kept();
    let store = start(&redis).await;
    let (a, b) = (
        Dispatcher::new("a", &store, &["py"]),
        Dispatcher::new("b", &store, &["py", "other"]),
    );
    let before = the_one(&a.lead().await).unwrap();
    // Written now, not within the second.
    redis
        .command(&["CONFIG", "SET", "appendfsync", "always"])
        .await;
    assert_eq!(the_one(&a.lead().await), Some(before));
    redis.restart_kept();
    let store = redis.store(&redis.options()).await;
    let (a, b) = (
        Dispatcher {
            store: store.clone(),
            ..a
        },
        Dispatcher {
            store: store.clone(),
            ..b
        },
    );
    let renewed = a.lead().await;
    assert_eq!((renewed.in_force, the_one(&renewed)), (false, Some(before)));
    assert_eq!(mine(&b.lead().await), []);
    store.install_incarnation(2).await.unwrap();
    let taken = b.lead().await;
    let expected = ("other".to_owned(), Term::new(2, 2));
    assert_eq!(
        mine(&taken),
        [expected],
        "the counter goes on, the incarnation is new"
    );
}

#[tokio::test]
async fn a_clock_that_was_set_back_does_not_keep_the_dead() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let mut b = Dispatcher::new("b", &store, &["py"]);
    b.ttl = Duration::from_millis(200);
    // As a dispatcher leaves it that died before the clock went back by a day.
    let far = "99999999999999";
    for (field, value) in [
        ("dispatcher", "a"),
        ("incarnation", "1"),
        ("counter", "1"),
        ("until", far),
        ("ttl", "200"),
    ] {
        redis
            .command(&["HSET", "{remuda}:leader:py", field, value])
            .await;
    }
    redis
        .command(&["ZADD", "{remuda}:dispatchers", far, "a"])
        .await;
    redis.command(&["SET", "{remuda}:terms", "1"]).await;
    assert_eq!(b.lead().await.dispatchers, 1);
    until("its term runs out", async || the_one(&b.lead().await)).await;
}

#[tokio::test]
async fn one_that_is_not_willing_renews_and_takes_nothing() {
    let redis = Redis::start();
    let store = start(&redis).await;
    let (a, b) = (
        Dispatcher::new("a", &store, &["py"]),
        Dispatcher::new("b", &store, &["py"]),
    );
    assert_eq!(the_one(&a.ask(false).await), None);
    let term = the_one(&b.lead().await);
    assert!(term.is_some());
    assert_eq!(the_one(&b.ask(false).await), term);
}
