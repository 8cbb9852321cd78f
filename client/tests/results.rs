//! Readers against a real nats-server that is killed, forgets its consumers, and loses what it had.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::pin::Pin;

use broker_schema::codec::{self, Format};
use broker_schema::{
    Epoch, ErrorCode, Frame, FrameKind, RunId, Step, TaskId, TaskRequest, Terminal,
};
use common::{LONG, Nats, output, sizes, terminal};
use futures::{Stream, StreamExt as _};
use remuda_client::broker::{Broker, Outgoing};
use remuda_client::{Client, ClientError, OutputEvent, Until};
use remuda_telemetry::TraceHeaders;
use tokio::time::timeout;

type Results = Pin<Box<dyn Stream<Item = Result<(u64, Terminal), ClientError>> + Send>>;

async fn put(broker: &Broker, run: &str, task: TaskId) {
    let terminal = Terminal {
        run: run.parse().unwrap(),
        ..terminal(task, "x")
    };
    broker
        .put_terminal(
            &terminal,
            Format::MessagePack,
            &TraceHeaders::default(),
            LONG,
        )
        .await
        .unwrap();
}

/// Stores `count` terminals of the run, each with one of another run before it.
async fn store(broker: &Broker, count: usize) -> Vec<TaskId> {
    let mut tasks = Vec::new();
    for _ in 0..count {
        put(broker, "other", TaskId::new()).await;
        let task = TaskId::new();
        put(broker, "run-1", task).await;
        tasks.push(task);
    }
    tasks
}

fn run() -> RunId {
    "run-1".parse().unwrap()
}

fn follow(client: &Client, from: Option<u64>) -> Results {
    Box::pin(client.results(&run(), from, Until::Dropped))
}

/// The next `count`: their tasks, and the last sequence.
async fn read(results: &mut Results, count: usize) -> (Vec<TaskId>, u64) {
    let (mut tasks, mut last) = (Vec::new(), 0);
    for _ in 0..count {
        let (sequence, terminal) = timeout(LONG, results.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(sequence > last, "{sequence} came after {last}");
        last = sequence;
        tasks.push(terminal.task);
    }
    (tasks, last)
}

/// Waits until so many read.
async fn readers(broker: &Broker, count: usize) {
    let stream = &broker.streams().terminals;
    let asked = async {
        while broker.consumers(stream).await.unwrap().len() < count {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, asked).await.unwrap();
}

/// What nats-server does to readers that are away for long, and more.
async fn forget_readers(broker: &Broker) {
    let stream = &broker.streams().terminals;
    for consumer in broker.consumers(stream).await.unwrap() {
        broker
            .delete_consumer(stream, &consumer.durable)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_gets_everything_once_and_in_order_across_crashes() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker();
    let first = store(broker, 10).await;
    let mut from_start = follow(&client, None);
    let (mut seen, last) = read(&mut from_start, 4).await;
    // One that has yet to read its first message when the server goes.
    let mut from_end = follow(&client, Some(last + 1 + 12));
    tokio::select! {
        item = from_end.next() => panic!("nothing is there yet: {item:?}"),
        () = readers(broker, 2) => {}
    }

    nats.kill();
    nats.restart().await;
    let second = store(broker, 3).await;
    seen.extend(read(&mut from_start, 9).await.0);
    assert_eq!(seen, [first.clone(), second.clone()].concat());
    assert_eq!(read(&mut from_end, 3).await.0, second);

    forget_readers(broker).await;
    let third = store(broker, 3).await;
    assert_eq!(read(&mut from_start, 3).await.0, third);
    assert_eq!(read(&mut from_end, 3).await.0, third);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_was_away_goes_on_where_it_was() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let first = store(client.broker(), 6).await;
    let (seen, last) = read(&mut follow(&client, None), 4).await;
    assert_eq!(seen, first[..4]);
    nats.kill();
    nats.restart().await;
    let second = store(client.broker(), 6).await;

    let again = nats.client().await;
    let rest: Vec<TaskId> = again
        .results(&run(), Some(last + 1), Until::CaughtUp)
        .map(|item| item.unwrap().1.task)
        .collect()
        .await;
    assert_eq!(rest, [&first[4..], &second[..]].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_is_told_and_not_passed_over() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker();
    let tasks = store(broker, 6).await;
    let (_, last) = read(&mut follow(&client, None), 2).await;
    // As if they had grown too old.
    for task in &tasks[..4] {
        let subject = broker
            .subjects()
            .terminal(&"acme".parse().unwrap(), &run(), *task);
        assert_eq!(
            broker
                .purge(&broker.streams().terminals, &subject)
                .await
                .unwrap(),
            1
        );
    }
    let others = broker
        .subjects()
        .terminals_of_run(&"acme".parse().unwrap(), &"other".parse().unwrap());
    broker
        .purge(&broker.streams().terminals, &others)
        .await
        .unwrap();
    let gone = follow(&client, Some(last + 1)).next().await.unwrap();
    let gone = gone.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::ResultsRemoved);
    let text = remuda_telemetry::Chain(&gone).to_string();
    assert!(text.contains("go on from 10"), "{text}");
    assert_eq!(
        read(&mut follow(&client, Some(10)), 2).await.0,
        tasks[4..],
        "from where the error says"
    );

    let lost = follow(&client, Some(1000)).next().await.unwrap();
    assert_eq!(lost.unwrap_err().code(), ErrorCode::ResultsRemoved);
}

/// What a reader says that cannot go on, and that it then ends; `before` are the results that may
/// come first.
async fn told(results: &mut Results, before: &[TaskId]) -> String {
    loop {
        match timeout(LONG, results.next()).await.unwrap().unwrap() {
            Ok((_, terminal)) => assert!(
                before.contains(&terminal.task),
                "something was passed over: {terminal:?}"
            ),
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::ResultsRemoved);
                assert!(timeout(LONG, results.next()).await.unwrap().is_none());
                return remuda_telemetry::Chain(&error).to_string();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_lost_and_has_grown_again_is_not_taken_for_the_same() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let first = store(client.broker(), 5).await;
    let mut away = follow(&client, None);
    assert_eq!(read(&mut away, 5).await.0, first);
    let mut unread = follow(&client, None);

    nats.kill();
    nats.wipe();
    nats.restart().await;
    client.broker().ensure_streams(&sizes()).await.unwrap();
    let second = store(client.broker(), 8).await;
    let text = told(&mut away, &[]).await;
    assert!(text.contains("read from the beginning"), "{text}");
    assert_eq!(read(&mut follow(&client, None), 8).await.0, second);
    assert_eq!(read(&mut unread, 8).await.0, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_made_anew_under_a_reader_is_not_taken_for_the_same() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker();
    store(broker, 5).await;
    // The connection stands all the while.
    let anew = async |count: usize| {
        let stream = &broker.streams().terminals;
        broker.jetstream().delete_stream(stream).await.unwrap();
        broker.ensure_streams(&sizes()).await.unwrap();
        store(broker, count).await
    };
    let mut away = follow(&client, None);
    read(&mut away, 5).await;
    let second = anew(7).await;
    told(&mut away, &[]).await;
    assert_eq!(read(&mut follow(&client, None), 7).await.0, second);

    // One that waits for more than the new stream comes to have.
    let mut waiting = follow(&client, None);
    read(&mut waiting, 7).await;
    let (_, third) = tokio::join!(told(&mut waiting, &[]), anew(2));
    assert_eq!(read(&mut follow(&client, None), 2).await.0, third);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_while_a_reader_is_away_is_told() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker();
    let first = store(broker, 6).await;
    let mut results = follow(&client, None);
    assert_eq!(read(&mut results, 2).await.0, first[..2]);
    nats.kill();
    nats.restart().await;
    let second = store(broker, 4).await;
    for task in first.iter().chain(&second[..2]) {
        let subject = broker
            .subjects()
            .terminal(&"acme".parse().unwrap(), &run(), *task);
        let stream = &broker.streams().terminals;
        assert_eq!(broker.purge(stream, &subject).await.unwrap(), 1);
    }
    let others = broker
        .subjects()
        .terminals_of_run(&"acme".parse().unwrap(), &"other".parse().unwrap());
    broker
        .purge(&broker.streams().terminals, &others)
        .await
        .unwrap();
    // It may have had the rest of the first ones before the server went.
    let text = told(&mut results, &first[2..]).await;
    assert!(text.contains("go on from 18"), "{text}");
    assert_eq!(read(&mut follow(&client, Some(18)), 2).await.0, second[2..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_terminal_does_not_stop_a_reader() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker();
    let first = store(broker, 1).await;
    let forged = TaskId::new();
    let subject = broker
        .subjects()
        .terminal(&"acme".parse().unwrap(), &run(), forged);
    let garbage = Outgoing {
        subject,
        payload: "\u{0}garbage".into(),
        ..Outgoing::default()
    };
    broker.publish(garbage, LONG).await.unwrap();
    let second = store(broker, 1).await;
    let items: Vec<_> = client
        .results(&run(), None, Until::CaughtUp)
        .map(|item| item.map(|(_, terminal)| terminal.task).ok())
        .collect()
        .await;
    assert_eq!(items, [Some(first[0]), None, Some(second[0])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn named_readers_each_get_everything_and_are_remembered() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let first = store(client.broker(), 5).await;
    // In whatever order: what an earlier reader gave back comes when it comes.
    let read = async |client: &Client, name: &str, wanted: usize, repeats: &[TaskId]| {
        let name = broker_schema::Token::new(name).unwrap();
        let mut reader = client.consume(&run(), &name).await.unwrap();
        let mut tasks = BTreeSet::new();
        while tasks.len() < wanted {
            let delivered = timeout(LONG, reader.next()).await.unwrap().unwrap();
            let task = delivered.terminal().unwrap().task;
            assert!(repeats.contains(&task) || tasks.insert(task), "{task}");
            delivered.ack().await.unwrap();
        }
        reader.close().await;
        tasks
    };
    let all = |tasks: &[TaskId]| tasks.iter().copied().collect::<BTreeSet<_>>();
    let mut rewards = read(&client, "rewards", 2, &[]).await;
    assert_eq!(read(&client, "archive", 5, &[]).await, all(&first));
    let rest = read(&client, "rewards", 3, &[]).await;
    assert!(rewards.is_disjoint(&rest));
    rewards.extend(rest);
    assert_eq!(rewards, all(&first));

    nats.kill();
    nats.restart().await;
    let again = nats.client().await;
    let second = store(again.broker(), 2).await;
    for name in ["rewards", "archive"] {
        // What the server had noted last may be lost with it: at least once.
        let tasks = read(&again, name, 2, &first).await;
        assert_eq!(tasks, all(&second), "{name}");
    }
}

fn frame(attempt: u32, n: u64, data: &[u8]) -> Frame {
    Frame {
        attempt,
        epoch: Epoch::new(1, attempt),
        n,
        step: 0,
        kind: FrameKind::Stdout,
        data: data.into(),
        exit: None,
    }
}

async fn publish_frame(broker: &Broker, request: &TaskRequest, payload: Vec<u8>) {
    let message = Outgoing {
        subject: broker
            .subjects()
            .result(&request.tenant, &request.run, request.id),
        payload: payload.into(),
        ..Outgoing::default()
    };
    broker.publish(message, LONG).await.unwrap();
}

/// Attempts of one task whose frames are mixed up, from workers that do not know of each other,
/// and what an enemy would put among them.
#[tokio::test(flavor = "multi_thread")]
async fn output_of_the_attempt_that_won_is_exact_whatever_stands_between() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker().clone();
    let request = client.task(&"py".parse().unwrap(), vec![Step::command(["true"])]);
    let mut stream = client.stream(request.clone()).await.unwrap();
    let send = async |frame: Frame| {
        let payload = codec::encode(&frame, Format::MessagePack).unwrap();
        publish_frame(&broker, &request, payload).await;
    };
    for n in 0..20 {
        send(frame(1, n, b"an attempt that lost ")).await;
        send(frame(2, n, format!("piece {n} ").as_bytes())).await;
        if n == 7 {
            publish_frame(&broker, &request, b"\xc1 no frame at all".to_vec()).await;
            // Of an attempt that nobody made; and far ahead of what can be kept.
            send(frame(u32::MAX, 0, b"forged")).await;
            send(frame(2, u64::MAX, b"forged")).await;
        }
        // A repeat, and one of another content under a number that was used.
        send(frame(2, n, b"forged")).await;
        if n == 12 {
            nats.kill();
            nats.restart().await;
        }
    }
    let expected: Vec<u8> = (0..20)
        .flat_map(|n| format!("piece {n} ").into_bytes())
        .collect();
    let mut end = terminal(request.id, "");
    end.attempt = 2;
    end.frames = 20;
    end.steps[0].stdout = output(&expected);
    broker
        .put_terminal(&end, Format::MessagePack, &TraceHeaders::default(), LONG)
        .await
        .unwrap();
    let mut bytes = Vec::new();
    while let Some(event) = timeout(LONG, stream.next()).await.unwrap() {
        match event.unwrap() {
            OutputEvent::Output { bytes: more, .. } => bytes.extend_from_slice(&more),
            OutputEvent::Reset { .. } => bytes.clear(),
            OutputEvent::Done(done) => assert_eq!(done.attempt, 2),
            OutputEvent::StepExit { .. } => {}
        }
    }
    assert_eq!(
        String::from_utf8(bytes).unwrap(),
        String::from_utf8(expected).unwrap()
    );

    // The stored ones, from the middle on, as another process would read them.
    let frames: Vec<(u64, Frame)> = client
        .output(&run(), request.id, None, Until::CaughtUp)
        .map(Result::unwrap)
        .collect()
        .await;
    let middle = frames[frames.len() / 2].0;
    let rest: Vec<(u64, Frame)> = client
        .output(&run(), request.id, Some(middle), Until::CaughtUp)
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(rest, frames[frames.len() / 2..]);
}
