//! The client against a real nats-server and workers made of a few lines.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::stream::{ConsumerDef, lane_consumer, worker_consumer};
use broker_schema::{
    Blob, Command, Epoch, ErrorCode, Frame, FrameKind, Outcome, Placement, SandboxId, SandboxRef,
    Step, StepKind, TaskRequest, Terminal,
};
use common::{LONG, Nats, answer, output, sizes, terminal};
use futures::StreamExt as _;
use remuda_client::broker::{Broker, Outgoing};
use remuda_client::{
    CancelReply, CancelState, Client, ClientError, ClientOptions, OutputEvent, Until,
};
use remuda_telemetry::{TaskGroup, TraceHeaders};
use tokio::time::timeout;

fn lane(broker: &Broker) -> ConsumerDef {
    lane_consumer(
        broker.subjects(),
        &"acme".parse().unwrap(),
        &"py".parse().unwrap(),
        broker_schema::Term(1),
        256,
    )
}

fn sandbox() -> SandboxRef {
    SandboxRef {
        sandbox: SandboxId::new(),
        worker: "w1".parse().unwrap(),
        epoch: Epoch::new(1, 1),
    }
}

fn task(client: &Client) -> TaskRequest {
    client.task(&"py".parse().unwrap(), vec![Step::command(["true"])])
}

async fn put(broker: &Broker, terminal: &Terminal) {
    let trace = TraceHeaders::default();
    broker
        .put_terminal(terminal, Format::MessagePack, &trace, LONG)
        .await
        .unwrap();
}

/// Answers requests as a dispatcher and worker in one would.
async fn serve_requests(broker: Broker, group: &TaskGroup) {
    let mut puller = broker.puller(&lane(&broker)).await.unwrap();
    let _handle = group.spawn("fake fleet", async move {
        loop {
            puller.want(16);
            let delivery = puller.next().await.unwrap();
            let request: TaskRequest =
                codec::decode(&delivery.payload, delivery.format().unwrap()).unwrap();
            let terminal = Terminal {
                run: request.run.clone(),
                request_digest: broker_schema::digest::sha256_hex(&delivery.payload),
                ..terminal(request.id, "hello")
            };
            put(&broker, &terminal).await;
            delivery.ack_soon().await.unwrap();
        }
    });
}

/// Answers placements; counts what it was sent.
async fn serve_placements(broker: Broker, group: &TaskGroup) -> Arc<AtomicUsize> {
    let def = worker_consumer(broker.subjects(), &"w1".parse().unwrap(), 4);
    let mut puller = broker.puller(&def).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let _handle = group.spawn("fake worker", async move {
        loop {
            puller.want(4);
            let delivery = puller.next().await.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            let placement: Placement =
                codec::decode(&delivery.payload, delivery.format().unwrap()).unwrap();
            assert_eq!(placement.task.session.as_ref(), Some(&placement.sandbox));
            put(&broker, &answer(&placement, "stepped")).await;
            delivery.ack_soon().await.unwrap();
        }
    });
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_run_alone_and_by_the_hundred() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let group = TaskGroup::new();
    serve_requests(client.broker().clone(), &group).await;

    let terminal = timeout(LONG, client.run(task(&client)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(terminal.steps[0].stdout.whole(), Some(&b"hello"[..]));

    let requests: Vec<TaskRequest> = (0..300).map(|_| task(&client)).collect();
    let mut ids: Vec<_> = requests.iter().map(|request| request.id).collect();
    let results = client.submit_many(futures::stream::iter(requests), 32);
    let mut done: Vec<_> = timeout(LONG, results.collect::<Vec<_>>())
        .await
        .unwrap()
        .into_iter()
        .map(|(id, result)| {
            assert_eq!(result.unwrap().task, id);
            id
        })
        .collect();
    ids.sort();
    done.sort();
    assert_eq!(ids, done);

    // The same, as stored: all, then from a place on.
    let all: Vec<_> = client
        .results(client.run_id(), None, Until::CaughtUp)
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(all.len(), 301);
    let rest: Vec<_> = client
        .results(client.run_id(), Some(all[200].0 + 1), Until::CaughtUp)
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(rest, all[201..]);
    let none = client.results(&"other".parse().unwrap(), None, Until::CaughtUp);
    assert_eq!(timeout(LONG, none.count()).await.unwrap(), 0);
    group.cancel();
}

#[tokio::test]
async fn bad_requests_do_not_leave_the_process() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let empty = client.task(
        &"py".parse().unwrap(),
        vec![Step::command(Vec::<&str>::new())],
    );
    let error = client.submit(empty).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::EmptyArgv);

    let foreign = TaskRequest {
        tenant: "other".parse().unwrap(),
        ..task(&client)
    };
    let error = client.submit(foreign).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SubjectMismatch);

    let mut large = task(&client);
    large.steps[0].action = StepKind::Command(Command {
        argv: vec!["cat".into()],
        stdin: Blob(vec![0; 5 << 20]),
        ..Command::default()
    });
    let error = client.submit(large).await.unwrap_err();
    assert!(
        matches!(error, ClientError::TooLarge { size, .. } if size > 5 << 20),
        "{error:?}"
    );

    let first = task(&client);
    let mut second = first.clone();
    second.continue_on_failure = true;
    assert!(!client.submit(first.clone()).await.unwrap().ack().duplicate);
    assert!(client.submit(first).await.unwrap().ack().duplicate);
    let error = client.submit(second.clone()).await.unwrap_err();
    assert!(matches!(error, ClientError::IdConflict { .. }), "{error:?}");

    // From another process the conflict shows in the terminal.
    let other = nats.client().await;
    let mut submitted = other.submit(second.clone()).await.unwrap();
    let mut theirs = terminal(second.id, "first");
    theirs.request_digest = "0".repeat(64);
    put(client.broker(), &theirs).await;
    let error = timeout(LONG, submitted.terminal())
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, ClientError::IdConflict { .. }), "{error:?}");

    let counts = client
        .broker()
        .subject_counts("REMUDA_REQ", ">")
        .await
        .unwrap();
    assert_eq!(counts.values().sum::<usize>(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_found_without_its_live_copy() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let request = task(&client);
    // Stored before anybody listens.
    put(client.broker(), &terminal(request.id, "early")).await;
    let found = timeout(LONG, client.run(request)).await.unwrap().unwrap();
    assert_eq!(found.steps[0].stdout.whole(), Some(&b"early"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_request_is_published_again() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let mut submitted = client.submit(task(&client)).await.unwrap();
    // The stream is lost with everything in it, also what ids it knew.
    client
        .broker()
        .jetstream()
        .delete_stream("REMUDA_REQ")
        .await
        .unwrap();
    client
        .broker()
        .ensure_streams(&common::sizes())
        .await
        .unwrap();
    let group = TaskGroup::new();
    serve_requests(client.broker().clone(), &group).await;
    let terminal = timeout(LONG, submitted.terminal()).await.unwrap().unwrap();
    assert_eq!(terminal.task, submitted.task());
    group.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_to_nobody_fails_in_time_and_names_the_server() {
    let mut nats = Nats::start().await;
    let options = ClientOptions {
        broker: nats.options(),
        patience: Duration::from_millis(500),
        ..ClientOptions::new("acme".parse().unwrap(), "run-1".parse().unwrap())
    };
    let client = Client::connect(options).await.unwrap();
    client.broker().ensure_streams(&sizes()).await.unwrap();
    nats.kill();
    timeout(LONG, client.broker().lost_for(Duration::from_millis(100)))
        .await
        .unwrap();
    let error = timeout(LONG, client.submit(task(&client)))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::NatsUnreachable);
    let text = remuda_telemetry::Chain(&error).to_string();
    for part in [nats.url().as_str(), "could not be reached", "start it"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    nats.restart().await;
    assert!(timeout(LONG, client.broker().regained()).await.unwrap());
    let lost = client.broker().lost_for(Duration::ZERO);
    assert!(timeout(Duration::from_millis(50), lost).await.is_err());
    assert!(client.submit(task(&client)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_straight_to_its_worker() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let group = TaskGroup::new();
    let count = serve_placements(client.broker().clone(), &group).await;
    let session = client.session("py".parse().unwrap(), sandbox());
    for _ in 0..20 {
        let terminal = timeout(LONG, session.run(vec![Step::command(["true"])]))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(terminal.steps[0].stdout.whole(), Some(&b"stepped"[..]));
    }
    let closed = timeout(LONG, session.close()).await.unwrap().unwrap();
    assert_eq!(closed.outcome, Outcome::Succeeded);
    assert_eq!(count.load(Ordering::SeqCst), 21, "a task was placed twice");
    group.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_survives_a_crash_of_the_server() {
    let mut nats = Nats::start().await;
    let client = nats.client().await;
    let group = TaskGroup::new();
    let session = client.session("py".parse().unwrap(), sandbox());
    // Published, not answered, then everything that was sent live is gone.
    let waiting = group.spawn("caller", {
        let session = session.clone();
        async move { session.run(vec![Step::command(["true"])]).await }
    });
    let placed = async {
        while client
            .broker()
            .subject_counts("REMUDA_RUN", ">")
            .await
            .unwrap()
            .is_empty()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, placed).await.unwrap();
    nats.kill();
    let during = group.spawn("caller", {
        let session = session.clone();
        async move { session.run(vec![Step::command(["true"])]).await }
    });
    nats.restart().await;
    let count = serve_placements(client.broker().clone(), &group).await;
    for caller in [waiting, during] {
        let terminal = timeout(LONG, caller).await.unwrap().unwrap().unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded);
    }
    assert_eq!(count.load(Ordering::SeqCst), 2, "a task was placed twice");
    group.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_worker_is_gone_ends() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let session = client.session("py".parse().unwrap(), sandbox());
    let request = session.task(vec![Step::command(["true"])]);
    let lost = Terminal {
        outcome: Outcome::SandboxLost,
        ..terminal(request.id, "")
    };
    let group = TaskGroup::new();
    let broker = client.broker().clone();
    let _reaper = group.spawn("reaper", async move {
        while broker
            .subject_counts("REMUDA_RUN", ">")
            .await
            .unwrap()
            .is_empty()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        put(&broker, &lost).await;
    });
    let terminal = timeout(LONG, session.run_task(request))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(terminal.outcome, Outcome::SandboxLost);
}

fn frame(attempt: u32, n: u64, kind: FrameKind, data: &[u8]) -> Frame {
    Frame {
        attempt,
        epoch: Epoch::new(1, attempt),
        n,
        step: 0,
        kind,
        data: data.into(),
        exit: None,
    }
}

async fn send_frame(broker: &Broker, request: &TaskRequest, frame: &Frame) {
    let message = Outgoing {
        subject: broker
            .subjects()
            .result(&request.tenant, &request.run, request.id),
        message_id: Some(frame.message_id(&request.tenant, request.id)),
        payload: codec::encode(frame, Format::MessagePack).unwrap().into(),
        ..Outgoing::default()
    };
    broker.publish(message, LONG).await.unwrap();
}

async fn read(
    client: &Client,
    request: TaskRequest,
) -> (Vec<u8>, Vec<OutputEvent>, Option<ClientError>) {
    let mut events = Vec::new();
    let mut bytes = Vec::new();
    let mut output = client.stream(request).await.unwrap();
    while let Some(event) = timeout(LONG, output.next()).await.unwrap() {
        match event {
            Err(error) => return (bytes, events, Some(error)),
            Ok(event) => {
                match &event {
                    OutputEvent::Output { bytes: more, .. } => bytes.extend_from_slice(more),
                    OutputEvent::Reset { .. } => bytes.clear(),
                    _ => {}
                }
                events.push(event);
            }
        }
    }
    (bytes, events, None)
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_whole_whatever_came_live() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker().clone();
    let request = task(&client);
    // Stored before anybody listens: an attempt that failed, and the first
    // half of the one that counts.
    let pieces: Vec<Vec<u8>> = (0..40u8).map(|n| vec![n; 1000]).collect();
    send_frame(
        &broker,
        &request,
        &frame(1, 0, FrameKind::Stdout, b"given up"),
    )
    .await;
    for (n, piece) in (0..20).zip(&pieces) {
        send_frame(&broker, &request, &frame(2, n, FrameKind::Stdout, piece)).await;
    }
    let group = TaskGroup::new();
    let (sender, asked) = (broker.clone(), request.clone());
    let rest = pieces.clone();
    let mut puller = broker.puller(&lane(&broker)).await.unwrap();
    let _producer = group.spawn("producer", async move {
        puller.want(1);
        puller.next().await.unwrap().ack().await.unwrap();
        for (n, piece) in (20..).zip(&rest[20..]) {
            send_frame(&sender, &asked, &frame(2, n, FrameKind::Stdout, piece)).await;
        }
        let mut end = terminal(asked.id, "");
        end.attempt = 2;
        end.frames = 40;
        end.steps[0].stdout = output(&rest.concat());
        put(&sender, &end).await;
    });
    let (bytes, events, error) = read(&client, request).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(bytes, pieces.concat());
    assert!(matches!(events.last(), Some(OutputEvent::Done(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn short_output_comes_from_the_terminal() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let group = TaskGroup::new();
    serve_requests(client.broker().clone(), &group).await;
    let (bytes, events, error) = read(&client, task(&client)).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(bytes, b"hello");
    assert_eq!(events.len(), 3, "{events:?}");
    group.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_output_is_an_error() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let broker = client.broker().clone();
    let request = task(&client);
    send_frame(&broker, &request, &frame(1, 0, FrameKind::Stdout, b"other")).await;
    let mut end = terminal(request.id, "");
    end.frames = 1;
    end.steps[0].stdout = output(b"bytes");
    put(&broker, &end).await;
    let (_, _, error) = read(&client, request).await;
    assert!(
        matches!(error, Some(ClientError::OutputDamaged { .. })),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_asks_the_dispatcher() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let request = task(&client);
    let error = client.cancel(request.id, None).await.unwrap_err();
    assert!(error.to_string().contains("no dispatcher"), "{error}");
    let broker = client.broker().clone();
    let mut asked = broker
        .nats()
        .subscribe(broker.subjects().cancels())
        .await
        .unwrap();
    let group = TaskGroup::new();
    let _dispatcher = group.spawn("dispatcher", async move {
        let message = asked.next().await.unwrap();
        let reply = CancelReply {
            state: CancelState::Cancelling,
            error: None,
        };
        let payload = codec::encode(&reply, Format::MessagePack).unwrap();
        broker
            .nats()
            .publish(message.reply.unwrap(), payload.into())
            .await
            .unwrap();
    });
    let state = client.cancel(request.id, Some(request.run)).await.unwrap();
    assert_eq!(state, CancelState::Cancelling);
}
