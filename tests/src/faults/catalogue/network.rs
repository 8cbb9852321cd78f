//! Faults of the network between the parts.

use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;

use super::super::namespace::Way;
use super::super::scene::Scene;
use super::super::shape::Who;
use super::{Fault, Lengths, Need, SESSIONS};
use crate::proxy::Rules;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 19,
        name: "cut-nats",
        what: "packets between a worker and NATS dropped for longer than a lease holds",
        checks: "it ends what it cannot answer for",
        needs: &[Need::Namespaces],
        shape: |shape, _| shape.isolated = vec![0],
        strike: |scene| cut(scene, &[Server::Nats], Some(Way::Both)).boxed(),
        lengths: Lengths::one("a lease's life and 3 s"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 20,
        name: "cut-redis",
        what: "packets between a worker and Redis alone dropped for longer than a lease holds",
        checks: "it ends what it cannot renew",
        needs: &[Need::Namespaces],
        shape: |shape, _| shape.isolated = vec![0],
        strike: |scene| cut(scene, &[Server::Redis], Some(Way::Both)).boxed(),
        lengths: Lengths::one("a lease's life and 3 s"),
        forgiven: SESSIONS,
        ci: false,
    },
    Fault {
        number: 21,
        name: "cut-one-way",
        what: "packets of one direction between a worker and both servers dropped",
        checks: "it ends what it cannot renew",
        needs: &[Need::Namespaces],
        shape: |shape, _| shape.isolated = vec![0],
        strike: |scene| cut(scene, &[Server::Nats, Server::Redis], None).boxed(),
        lengths: Lengths::one("a lease's life and 3 s"),
        forgiven: SESSIONS,
        ci: false,
    },
    Fault {
        number: 22,
        name: "bad-line",
        what: "connections reset in the middle of messages, 1 byte a second, every byte sent twice",
        checks: "output is what the sandbox wrote",
        needs: &[],
        shape: |shape, _| {
            shape.proxied = vec![Who::Clients, Who::Worker(0), Who::Dispatcher(0)];
        },
        strike: |scene| bad_line(scene).boxed(),
        lengths: Lengths::one("8 to 12 s"),
        forgiven: SESSIONS,
        ci: true,
    },
    Fault {
        number: 23,
        name: "lost-acks",
        what: "the acknowledgements of published messages are dropped, everything else passes",
        checks: "output is what the sandbox wrote, one terminal",
        needs: &[],
        shape: |shape, _| {
            shape.proxied = vec![
                Who::Clients,
                Who::Worker(0),
                Who::Worker(1),
                Who::Dispatcher(0),
            ];
        },
        strike: |scene| lost_acks(scene).boxed(),
        lengths: Lengths::one("3 to 5 s for each kind"),
        forgiven: SESSIONS,
        ci: true,
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Nats,
    Redis,
}

/// Cuts the isolated worker off; the seed chooses the direction where none is
/// given.
async fn cut(scene: &mut Scene, servers: &[Server], way: Option<Way>) -> anyhow::Result<()> {
    scene.moment(10, 50).await;
    let way = way.unwrap_or_else(|| {
        if scene.random.chance(1, 2) {
            Way::Out
        } else {
            Way::In
        }
    });
    let namespace = scene.world.namespaces.get(&0).context("no namespace")?;
    let proxies = scene.world.proxies(Who::Worker(0))?;
    for server in servers {
        let port = match server {
            Server::Nats => proxies.nats.address().port(),
            Server::Redis => proxies.redis.address().port(),
        };
        namespace.drop_packets(port, way)?;
    }
    tokio::time::sleep(scene.past_ttl()).await;
    let namespace = scene.world.namespaces.get(&0).context("no namespace")?;
    namespace.heal()?;
    scene.note(format!("{way:?}"));
    Ok(())
}

async fn bad_line(scene: &mut Scene) -> anyhow::Result<()> {
    let everybody = [Who::Clients, Who::Worker(0), Who::Dispatcher(0)];
    scene.moment(5, 15).await;
    for who in everybody {
        scene.world.proxies(who)?.nats.tear(3);
    }
    scene.wait(1500, 2500).await;
    let crawl = Rules {
        rate: Some(1),
        ..Rules::default()
    };
    for who in everybody {
        let proxies = scene.world.proxies(who)?;
        proxies.nats.heal();
        proxies.nats.set(crawl.clone());
    }
    scene.wait(2000, 3000).await;
    let double = Rules {
        double: true,
        ..Rules::default()
    };
    for who in everybody {
        let proxies = scene.world.proxies(who)?;
        proxies.nats.set(double.clone());
        proxies.redis.tear(1);
        // What is connected is so by the old rules.
        proxies.nats.reset();
    }
    scene.wait(3000, 4000).await;
    let mut torn = 0;
    for who in everybody {
        let proxies = scene.world.proxies(who)?;
        proxies.nats.heal();
        proxies.redis.heal();
        proxies.nats.reset();
        torn += proxies.nats.done().torn;
    }
    scene.note(format!("{torn} connections torn"));
    Ok(())
}

async fn lost_acks(scene: &mut Scene) -> anyhow::Result<()> {
    let deaf = Rules {
        drop_pub_acks: true,
        ..Rules::default()
    };
    let kinds: [&[Who]; 3] = [
        &[Who::Worker(0), Who::Worker(1)],
        &[Who::Dispatcher(0)],
        &[Who::Clients],
    ];
    scene.moment(5, 15).await;
    let mut dropped = 0;
    for kind in kinds {
        for who in kind {
            scene.world.proxies(*who)?.nats.set(deaf.clone());
        }
        scene.wait(3000, 5000).await;
        for who in kind {
            let proxies = scene.world.proxies(*who)?;
            proxies.nats.heal();
            dropped += proxies.nats.done().dropped_acks;
        }
    }
    scene.note(format!("{dropped} acknowledgements dropped"));
    scene.demand(dropped > 0, "no acknowledgement was dropped");
    tokio::time::sleep(Duration::from_millis(100)).await;
    Ok(())
}
