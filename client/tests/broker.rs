//! The broker against a real nats-server.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::codec::Format;
use broker_schema::stream::{ConsumerDef, Sizes, lane_consumer, streams};
use broker_schema::{ErrorCode, TaskId};
use common::{LONG, Nats, sizes, terminal};
use remuda_client::broker::{Broker, BrokerError, BrokerOptions, Gate, Outgoing};
use remuda_telemetry::TraceHeaders;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::time::timeout;

fn lane(broker: &Broker) -> ConsumerDef {
    ConsumerDef {
        ack_wait: Duration::from_secs(5),
        ..lane_consumer(
            broker.subjects(),
            &"acme".parse().unwrap(),
            &"py".parse().unwrap(),
            broker_schema::Term(1),
            256,
        )
    }
}

async fn fill(broker: &Broker, def: &ConsumerDef, range: std::ops::Range<usize>) {
    let mut acks = Vec::new();
    for n in range {
        acks.push(
            broker
                .publish_windowed(Outgoing {
                    subject: def.filter.clone(),
                    message_id: Some(format!("m{n}")),
                    payload: n.to_string().into(),
                    ..Outgoing::default()
                })
                .await
                .unwrap(),
        );
    }
    for ack in acks {
        assert!(!ack.wait().await.unwrap().duplicate);
    }
}

#[tokio::test]
async fn streams_are_made_compared_and_resized() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    broker.ensure_streams(&sizes()).await.unwrap();

    let larger = Sizes {
        results_bytes: 128 << 20,
        results_age: Duration::from_secs(3600),
        ..sizes()
    };
    broker.ensure_streams(&larger).await.unwrap();
    let found = broker
        .jetstream()
        .get_stream(&broker.streams().results)
        .await
        .unwrap();
    assert_eq!(found.cached_info().config.max_bytes, 128 << 20);
    assert_eq!(
        found.cached_info().config.max_age,
        Duration::from_secs(3600)
    );

    // A gate that lets a second terminal in is no gate.
    let mut config = broker
        .jetstream()
        .get_stream(&broker.streams().terminals)
        .await
        .unwrap()
        .cached_info()
        .config
        .clone();
    config.max_messages_per_subject = 2;
    broker.jetstream().update_stream(config).await.unwrap();
    let error = broker.ensure_streams(&larger).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StreamMismatch);
    assert_eq!(
        error.to_string(),
        "stream REMUDA_TERM has max_msgs_per_subject 2, expected 1: it was made by something \
         else, remove it or use another prefix"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_may_make_the_streams_at_once() {
    let nats = Nats::start().await;
    let broker = Broker::connect(&nats.options()).await.unwrap();
    let makers = (0..8).map(|_| {
        let broker = broker.clone();
        async move { broker.ensure_streams(&sizes()).await }
    });
    for made in futures::future::join_all(makers).await {
        made.unwrap();
    }
    let names = streams(broker.subjects(), &sizes()).len();
    let account = broker.jetstream().query_account().await.unwrap();
    assert_eq!(account.streams, names);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_writers_passes_the_gate() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    for _ in 0..10 {
        let task = TaskId::new();
        let writers = (0..32).map(|n| {
            let broker = broker.clone();
            remuda_telemetry::task::spawn("writer", async move {
                let terminal = terminal(task, &format!("writer {n}"));
                let gate = broker
                    .put_terminal(
                        &terminal,
                        Format::MessagePack,
                        &TraceHeaders::default(),
                        LONG,
                    )
                    .await
                    .unwrap();
                (terminal, gate)
            })
        });
        let mut winners = Vec::new();
        let mut losers = Vec::new();
        for ended in futures::future::join_all(writers).await {
            match ended.unwrap() {
                (terminal, Gate::Won) => winners.push(terminal),
                (_, Gate::Lost(theirs)) => losers.push(theirs),
            }
        }
        assert_eq!((winners.len(), losers.len()), (1, 31));
        assert!(losers.iter().all(|theirs| **theirs == winners[0]));
        let run = "run-1".parse().unwrap();
        let stored = broker
            .terminal_of(&"acme".parse().unwrap(), &run, task)
            .await
            .unwrap();
        assert_eq!(stored.as_ref(), Some(&winners[0]));
        // The winner may say it again.
        let again = broker
            .put_terminal(
                &winners[0],
                Format::MessagePack,
                &TraceHeaders::default(),
                LONG,
            )
            .await
            .unwrap();
        assert_eq!(again, Gate::Won);
    }
}

#[tokio::test]
async fn the_gate_holds_across_a_crash() {
    let mut nats = Nats::start().await;
    let broker = nats.broker().await;
    let first = terminal(TaskId::new(), "first");
    let second = terminal(first.task, "second");
    let put = async |terminal| {
        let trace = TraceHeaders::default();
        broker
            .put_terminal(terminal, Format::MessagePack, &trace, LONG)
            .await
            .unwrap()
    };
    assert_eq!(put(&first).await, Gate::Won);
    nats.kill();
    nats.restart().await;
    assert_eq!(put(&second).await, Gate::Lost(Box::new(first.clone())));
    assert_eq!(put(&first).await, Gate::Won);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_puller_survives_a_crash_and_takes_each_message_once() {
    const COUNT: usize = 1000;
    let mut nats = Nats::start().await;
    let broker = nats.broker().await;
    let def = lane(&broker);
    let mut puller = broker.puller(&def).await.unwrap();
    fill(&broker, &def, 0..COUNT).await;
    let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
    let mut acked_before = Vec::new();
    while seen.len() < COUNT {
        if seen.len() == COUNT / 2 && acked_before.is_empty() {
            acked_before.extend(seen.keys().copied());
            nats.kill();
            nats.restart().await;
        }
        puller.want(8);
        let delivery = timeout(LONG, puller.next()).await.unwrap().unwrap();
        *seen.entry(delivery.stream_sequence).or_default() += 1;
        if let Err(error) = delivery.ack().await {
            // The server forgot that it had delivered it: it comes again.
            assert!(error.retryable() && !acked_before.is_empty(), "{error:?}");
        }
    }
    assert!(
        acked_before.iter().all(|sequence| seen[sequence] == 1),
        "an acknowledged message came again"
    );
    // What was in hand at the crash comes again until an ack of it is heeded;
    // nothing else does.
    let last_acked = acked_before.iter().max().copied().unwrap();
    let repeated: Vec<u64> = seen
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(sequence, _)| *sequence)
        .collect();
    let in_hand = last_acked + 1..=last_acked + 8;
    assert!(
        repeated.iter().all(|sequence| in_hand.contains(sequence)),
        "{repeated:?} came again, in hand were {in_hand:?}"
    );
    let emptied = async {
        while !broker
            .subject_counts(&def.stream, ">")
            .await
            .unwrap()
            .is_empty()
        {
            puller.want(8);
            if let Ok(delivery) = timeout(Duration::from_millis(50), puller.next()).await {
                delivery.unwrap().ack().await.unwrap();
            }
        }
    };
    timeout(LONG, emptied).await.unwrap();
}

#[tokio::test]
async fn a_puller_never_has_more_than_it_wants() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    let def = lane(&broker);
    fill(&broker, &def, 0..50).await;
    let mut puller = broker.puller(&def).await.unwrap();
    puller.want(3);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(timeout(LONG, puller.next()).await.unwrap().unwrap());
    }
    assert!(
        timeout(Duration::from_millis(200), puller.next())
            .await
            .is_err()
    );
    let mut consumer = broker
        .jetstream()
        .get_consumer_from_stream::<async_nats::jetstream::consumer::pull::Config, _, _>(
            &def.durable,
            &def.stream,
        )
        .await
        .unwrap();
    let info = consumer.info().await.unwrap();
    assert_eq!((info.num_ack_pending, info.num_waiting), (3, 0));
    // A message that was handed back comes again at once, to whoever wants it.
    held[0].nak(Duration::ZERO).await.unwrap();
    puller.want(50);
    let again = loop {
        let delivery = timeout(Duration::from_secs(4), puller.next())
            .await
            .unwrap()
            .unwrap();
        if delivery.stream_sequence == held[0].stream_sequence {
            break delivery;
        }
    };
    assert_eq!(again.delivered, 2);
}

#[tokio::test]
async fn a_puller_makes_a_removed_consumer_again() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    let def = lane(&broker);
    let mut puller = broker.puller(&def).await.unwrap();
    puller.want(2);
    // Gets the pull to the server.
    assert!(
        timeout(Duration::from_millis(100), puller.next())
            .await
            .is_err()
    );
    assert!(
        broker
            .delete_consumer(&def.stream, &def.durable)
            .await
            .unwrap()
    );
    assert!(
        !broker
            .delete_consumer(&def.stream, &def.durable)
            .await
            .unwrap()
    );
    fill(&broker, &def, 0..1).await;
    let delivery = timeout(LONG, puller.next()).await.unwrap().unwrap();
    assert_eq!(&delivery.payload[..], b"0");
}

#[tokio::test]
async fn closing_a_puller_gives_back_what_it_holds() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    let def = lane(&broker);
    fill(&broker, &def, 0..4).await;
    let mut puller = broker.puller(&def).await.unwrap();
    puller.want(4);
    let taken = timeout(LONG, puller.next()).await.unwrap().unwrap();
    timeout(LONG, puller.close()).await.unwrap();
    let mut other = broker.puller(&def).await.unwrap();
    other.want(3);
    // Well within the ack wait.
    for _ in 0..3 {
        let delivery = timeout(Duration::from_secs(4), other.next())
            .await
            .unwrap()
            .unwrap();
        assert_ne!(delivery.stream_sequence, taken.stream_sequence);
    }
}

#[tokio::test]
async fn incarnations_only_grow() {
    let mut nats = Nats::start().await;
    let broker = nats.broker().await;
    let first = broker.next_incarnation().await.unwrap();
    nats.kill();
    nats.restart().await;
    let second = broker.next_incarnation().await.unwrap();
    assert!(second > first);

    // Lost with all that it had given out: what comes then is beyond it, from the second on that
    // follows the last one.
    let beyond = async {
        loop {
            let stream = &broker.streams().incarnation;
            broker.jetstream().delete_stream(stream).await.unwrap();
            broker.ensure_streams(&sizes()).await.unwrap();
            if broker.next_incarnation().await.unwrap() > second {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LONG, beyond).await.unwrap();
}

#[tokio::test]
async fn full_and_too_large_are_told_apart() {
    let nats = Nats::start().await;
    let broker = nats.broker().await;
    let tiny = Sizes {
        requests_bytes: 64 * 1024,
        ..sizes()
    };
    broker.ensure_streams(&tiny).await.unwrap();
    let message = |size: usize| Outgoing {
        subject: broker
            .subjects()
            .request(&"acme".parse().unwrap(), &"py".parse().unwrap()),
        payload: vec![0; size].into(),
        ..Outgoing::default()
    };
    let short = Duration::from_millis(200);
    let error = broker
        .publish(message(128 * 1024), short)
        .await
        .unwrap_err();
    assert!(matches!(error, BrokerError::Full { .. }), "{error:?}");
    let error = broker.publish(message(5 << 20), LONG).await.unwrap_err();
    assert!(matches!(error, BrokerError::TooLarge { .. }), "{error:?}");
    let error = broker.publish(message(9 << 20), LONG).await.unwrap_err();
    assert!(matches!(error, BrokerError::TooLarge { .. }), "{error:?}");
}

#[tokio::test]
async fn nobody_there_and_no_jetstream_are_named() {
    let options = BrokerOptions {
        url: "nats://joe:s3cret@127.0.0.1:1".to_owned(),
        ..BrokerOptions::default()
    };
    let error = Broker::connect(&options).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NatsUnreachable);
    let text = error.info().to_string();
    assert!(
        text.contains("nats://127.0.0.1:1") && text.contains("nats-server -js"),
        "{text}"
    );
    assert!(!text.contains("s3cret"), "{text}");
}

/// A server that greets with a version and answers pings.
async fn greeter(version: &'static str) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _handle = remuda_telemetry::task::spawn("greeter", async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (reader, mut writer) = stream.into_split();
            let info = format!(
                "INFO {{\"server_id\":\"A\",\"server_name\":\"old one\",\"version\":\"{version}\",\
                 \"proto\":1,\"headers\":true,\"max_payload\":1048576,\"jetstream\":true}}\r\n"
            );
            writer.write_all(info.as_bytes()).await.unwrap();
            let mut lines = BufReader::new(reader).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if line.starts_with("PING") && writer.write_all(b"PONG\r\n").await.is_err() {
                    break;
                }
            }
        }
    });
    format!("nats://{address}")
}

#[tokio::test]
async fn an_old_server_is_refused() {
    for version in ["2.9.10", "2.10.26", "unknown"] {
        let options = BrokerOptions {
            url: greeter(version).await,
            ..BrokerOptions::default()
        };
        let error = Broker::connect(&options).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::NatsTooOld);
        let text = error.to_string();
        for part in ["old one", version, "2.10.27", &options.url] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
