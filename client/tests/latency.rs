//! How long the ways of a message take. Prints; run with `--ignored --nocapture`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::stream::worker_consumer;
use broker_schema::{Epoch, Placement, SandboxId, SandboxRef, Step};
use common::{LONG, Nats, answer};
use remuda_client::broker::Outgoing;
use remuda_telemetry::{TaskGroup, TraceHeaders};
use tokio::time::Instant;

const ROUNDS: usize = 2000;

#[expect(clippy::print_stdout, reason = "what it is for")]
fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[times.len() * share / 100];
    println!(
        "{what}: p50 {:?}, p90 {:?}, p99 {:?}",
        at(50),
        at(90),
        at(99)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures; run by hand, optimised, on a quiet machine"]
async fn latencies() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker().clone();
    let subject = broker
        .subjects()
        .request(&"acme".parse().unwrap(), &"py".parse().unwrap());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let since = Instant::now();
        let message = Outgoing {
            subject: subject.clone(),
            payload: vec![0; 300].into(),
            ..Outgoing::default()
        };
        broker.publish(message, LONG).await.unwrap();
        times.push(since.elapsed());
    }
    report("publish to PubAck", times);

    let group = TaskGroup::new();
    let worker = nats.broker().await;
    let def = worker_consumer(worker.subjects(), &"w1".parse().unwrap(), 4);
    let mut puller = worker.puller(&def).await.unwrap();
    let _worker = group.spawn("worker", async move {
        loop {
            puller.want(4);
            let delivery = puller.next().await.unwrap();
            let placement: Placement =
                codec::decode(&delivery.payload, delivery.format().unwrap()).unwrap();
            let terminal = answer(&placement, "out");
            worker
                .put_terminal(
                    &terminal,
                    Format::MessagePack,
                    &TraceHeaders::default(),
                    LONG,
                )
                .await
                .unwrap();
            delivery.ack_soon().await.unwrap();
        }
    });
    let session = client.session(
        "py".parse().unwrap(),
        SandboxRef {
            sandbox: SandboxId::new(),
            worker: "w1".parse().unwrap(),
            epoch: Epoch::new(1, 1),
        },
    );
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let since = Instant::now();
        session.run(vec![Step::command(["true"])]).await.unwrap();
        times.push(since.elapsed());
    }
    report("session step: publish, fetch, terminal, live copy", times);
    group.cancel();
}
