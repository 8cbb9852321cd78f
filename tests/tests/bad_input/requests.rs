//! Requests that are published all the same.

use async_nats::HeaderMap;
use broker_schema::{Attribution, ErrorCode, Outcome, Step, TaskRequest};
use futures::StreamExt as _;
use remuda_client::ClientError;
use remuda_tests::wait::eventually;
use serde_json::json;

use super::cases::{CASES, command};
use super::stranger::Stranger;
use super::{PATIENCE, fleet, goes_on};

#[tokio::test]
async fn each_is_answered_by_a_rejection_that_says_why() {
    let fleet = fleet().await;
    let stranger = Stranger::of(&fleet, "bad").await;
    let mut sent = Vec::new();
    for (what, spoil, ..) in CASES {
        let (mut request, mut message) = stranger.good();
        spoil(&mut request, &mut message);
        if message.run == "bad" {
            message.payload = serde_json::to_vec(&request).unwrap();
        }
        stranger
            .publish(&message)
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        sent.push(message);
    }
    for ((what, _, code, field, reason), message) in CASES.iter().zip(&sent) {
        let terminal = stranger.terminal(message).await;
        assert_eq!(terminal.outcome, Outcome::Rejected, "{what}: {terminal:?}");
        assert_eq!(terminal.attribution, Attribution::User, "{what}");
        assert_eq!(terminal.attempt, 0, "{what}");
        let error = terminal.error.unwrap();
        assert_eq!(error.code, *code, "{what}: {error}");
        assert_eq!(error.field.as_deref(), *field, "{what}: {error}");
        assert!(error.message.contains(reason), "{what}: {error}");
    }
    goes_on(&fleet).await;
    // Nothing of it is left to be looked at for ever.
    eventually("empty queue", PATIENCE, async || {
        let requests = stranger.jetstream.get_stream("REMUDA_REQ").await.unwrap();
        match requests.cached_info().state.messages {
            0 => Ok(()),
            left => Err(format!("{left} requests are left")),
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused_where_it_is_published() {
    let fleet = fleet().await;
    let stranger = Stranger::of(&fleet, "large").await;
    for (size, told) in [
        (
            broker_schema::stream::MAX_REQUEST_BYTES + 1,
            "exceeds maximum",
        ),
        (broker_schema::stream::MAX_PAYLOAD_BYTES + 1, "MaxPayload"),
    ] {
        let (_, mut message) = stranger.good();
        message.payload = vec![b' '; size];
        let error = stranger.publish(&message).await.unwrap_err();
        assert!(error.contains(told), "{size}: {error}");
    }

    let client = fleet.client("large").await.unwrap();
    let big = Step::write("x", vec![0; broker_schema::stream::MAX_REQUEST_BYTES]);
    let request = client.task(&"default".parse().unwrap(), vec![big]);
    let error = client.submit(request).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::RequestTooLarge);
    assert!(error.to_string().contains("at most 4194304"), "{error}");

    let file = fleet.data().join("big");
    std::fs::write(&file, vec![0; 4 << 20]).unwrap();
    let big = format!("{}:x", file.display());
    let args = ["run", "--file", &big, "--", "true"];
    let finished = fleet.remuda(args).await.unwrap();
    assert_eq!(finished.code(), 125, "{finished:?}");
    assert!(
        finished.stderr.contains("[request_too_large]"),
        "{finished:?}"
    );
    goes_on(&fleet).await;
}

#[tokio::test]
async fn an_id_used_twice_with_other_content_changes_nothing() {
    let fleet = fleet().await;
    let stranger = Stranger::of(&fleet, "twice").await;
    let nats = async_nats::connect(fleet.nats()).await.unwrap();
    let mut dead = nats.subscribe("remuda.dlq.default.default").await.unwrap();

    let (request, mut message) = stranger.good();
    message.payload = serde_json::to_vec(&request).unwrap();
    stranger.publish(&message).await.unwrap();
    let first = stranger.terminal(&message).await;
    assert_eq!(first.outcome, Outcome::Succeeded);

    // By somebody who sends no message id: the server knows no better.
    let mut other = request.clone();
    command(&mut other)["argv"] = json!(["false"]);
    let mut again = HeaderMap::new();
    again.insert("Content-Type", "application/json");
    message.headers = again;
    message.payload = serde_json::to_vec(&other).unwrap();
    stranger.publish(&message).await.unwrap();
    let letter = tokio::time::timeout(PATIENCE, dead.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&letter.payload[..], &message.payload[..]);
    let headers: Vec<String> = letter
        .headers
        .unwrap()
        .iter()
        .map(|(name, values)| format!("{name}: {values:?}"))
        .collect();
    let headers = headers.join("\n");
    assert!(headers.contains("id_conflict"), "{headers}");
    assert!(headers.contains(&first.request_digest), "{headers}");
    assert_eq!(stranger.terminal(&message).await, first);

    // By clients: one that remembers the id, and one that learns of it.
    let known: TaskRequest = serde_json::from_value(other).unwrap();
    let client = fleet.client("twice").await.unwrap();
    for _ in 0..2 {
        let error = client.run(known.clone()).await.unwrap_err();
        assert!(matches!(error, ClientError::IdConflict { .. }), "{error}");
        assert_eq!(error.code(), ErrorCode::IdConflict);
    }
    let changed = TaskRequest {
        timeout_ms: Some(1),
        ..known
    };
    let error = client.submit(changed).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::IdConflict);
    goes_on(&fleet).await;
}
