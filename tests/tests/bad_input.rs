//! Whatever is wrong with a request is told with a stable code, the field and
//! the reason, and the fleet goes on.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream;
use broker_schema::{
    Attribution, Blob, Command, ErrorCode, FileRead, Outcome, Step, StepKind, TaskId, TaskRequest,
    Terminal,
};
use futures::StreamExt as _;
use remuda_client::{Client, ClientError};
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    FLEET.get(default_config).await.unwrap()
}

async fn goes_on(fleet: &Fleet) {
    let finished = fleet.run(["echo", "goes on"]).await.unwrap();
    assert_eq!(finished.text(), "goes on\n", "{}", finished.stderr);
}

/// A stranger: a plain NATS client that speaks JSON, and gets it wrong.
struct Stranger {
    jetstream: jetstream::Context,
    /// Reads the answers.
    client: Client,
}

/// What is sent instead of a good request.
struct Sent {
    task: TaskId,
    run: String,
    subject: String,
    headers: HeaderMap,
    payload: Vec<u8>,
}

impl Stranger {
    async fn of(fleet: &Fleet, run: &str) -> Self {
        let nats = async_nats::connect(fleet.nats()).await.unwrap();
        Self {
            jetstream: jetstream::new(nats),
            client: fleet.client(run).await.unwrap(),
        }
    }

    /// A good request, and all that goes with it.
    fn good(&self) -> (Value, Sent) {
        let pool = "default".parse().unwrap();
        let request = self.client.task(&pool, vec![Step::command(["true"])]);
        let mut headers = HeaderMap::new();
        headers.insert("Content-Type", "application/json");
        headers.insert("Nats-Msg-Id", request.message_id().as_str());
        let sent = Sent {
            task: request.id,
            run: request.run.to_string(),
            subject: "remuda.req.default.default".into(),
            headers,
            payload: Vec::new(),
        };
        (serde_json::to_value(&request).unwrap(), sent)
    }

    async fn publish(&self, sent: &Sent) -> Result<(), String> {
        let publishing = self.jetstream.publish_with_headers(
            sent.subject.clone(),
            sent.headers.clone(),
            sent.payload.clone().into(),
        );
        let ack = publishing.await.map_err(|error| format!("{error:?}"))?;
        ack.await.map(drop).map_err(|error| format!("{error:?}"))
    }

    async fn terminal(&self, sent: &Sent) -> Terminal {
        let broker = self.client.broker();
        let (tenant, run) = (self.client.tenant(), sent.run.parse().unwrap());
        let what = format!("terminal of {} in run {}", sent.subject, sent.run);
        eventually(&what, PATIENCE, async || {
            match broker.terminal_of(tenant, &run, sent.task).await {
                Ok(Some(terminal)) => Ok(terminal),
                other => Err(format!("{other:?}")),
            }
        })
        .await
        .unwrap()
    }
}

type Spoil = fn(&mut Value, &mut Sent);
type Case = (
    &'static str,
    Spoil,
    ErrorCode,
    Option<&'static str>,
    &'static str,
);

fn command(request: &mut Value) -> &mut Value {
    &mut request["steps"][0]["action"]["command"]
}

/// What the payload is when it is not the request.
fn raw(sent: &mut Sent, payload: &[u8]) {
    sent.payload = payload.to_vec();
    sent.run = "unknown".into();
}

const CASES: &[Case] = &[
    (
        "an unknown pool",
        |request, sent| {
            request["pool"] = json!("nowhere");
            sent.subject = "remuda.req.default.nowhere".into();
        },
        ErrorCode::UnknownPool,
        Some("pool"),
        "there is no pool nowhere, the pools are: default",
    ),
    (
        "a pool that is no token in the subject",
        |request, sent| {
            request["pool"] = json!("default");
            sent.subject = "remuda.req.default.p@ol".into();
        },
        ErrorCode::InvalidToken,
        Some("subject"),
        "p@ol",
    ),
    (
        "a tenant that is no token in the payload",
        |request, _| request["tenant"] = json!("a tenant"),
        ErrorCode::InvalidToken,
        Some("tenant"),
        "[A-Za-z0-9_-]",
    ),
    (
        "another pool in the payload than in the subject",
        |request, _| request["pool"] = json!("other"),
        ErrorCode::SubjectMismatch,
        Some("pool"),
        "is other, but the request was published for default",
    ),
    (
        "another tenant in the payload than in the subject",
        |request, _| request["tenant"] = json!("other"),
        ErrorCode::SubjectMismatch,
        Some("tenant"),
        "is other, but the request was published for default",
    ),
    (
        "text that is no JSON",
        |_, sent| raw(sent, b"{ no JSON"),
        ErrorCode::UnparsablePayload,
        None,
        "key must be a string",
    ),
    (
        "bytes that are no MessagePack",
        |_, sent| {
            sent.headers.insert("Content-Type", "application/msgpack");
            raw(sent, &[0xc1; 100]);
        },
        ErrorCode::UnparsablePayload,
        None,
        "",
    ),
    (
        "no bytes at all",
        |_, sent| raw(sent, b""),
        ErrorCode::UnparsablePayload,
        None,
        "EOF",
    ),
    (
        "lists in lists in lists",
        |_, sent| raw(sent, &[b'['; 100_000]),
        ErrorCode::UnparsablePayload,
        Some("[0]"),
        "expected a string",
    ),
    (
        "another content type",
        |_, sent| sent.headers.insert("Content-Type", "text/html"),
        ErrorCode::UnparsablePayload,
        Some("Content-Type"),
        "text/html",
    ),
    (
        "a schema from before the first",
        |_, sent| sent.headers.insert("Remuda-Schema", "0"),
        ErrorCode::UnsupportedSchema,
        Some("Remuda-Schema"),
        "versions from 1",
    ),
    (
        "text where a number belongs",
        |request, _| request["timeout_ms"] = json!("soon"),
        ErrorCode::UnparsablePayload,
        Some("timeout_ms"),
        "soon",
    ),
    (
        "a field that is missing",
        |request, _| drop(request.as_object_mut().unwrap().remove("steps")),
        ErrorCode::UnparsablePayload,
        None,
        "steps",
    ),
    (
        "an unknown step type",
        |request, _| request["steps"][0]["action"] = json!({"teleport": {}}),
        ErrorCode::UnknownStepType,
        Some("steps[0].action"),
        "teleport",
    ),
    (
        "no steps",
        |request, _| request["steps"] = json!([]),
        ErrorCode::InvalidField,
        Some("steps"),
        "has no steps",
    ),
    (
        "an empty argv",
        |request, _| command(request)["argv"] = json!([]),
        ErrorCode::EmptyArgv,
        Some("steps[0].action.command.argv"),
        "names no program",
    ),
    (
        "a NUL in an argument",
        |request, _| command(request)["argv"] = json!(["echo", "a\u{0}b"]),
        ErrorCode::NulByte,
        Some("steps[0].action.command.argv[1]"),
        "holds a NUL byte",
    ),
    (
        "a path that climbs out of the sandbox",
        |request, _| {
            request["steps"][0]["action"] = json!({"file_patch": {"path": "../x", "content": ""}});
        },
        ErrorCode::PathEscapes,
        Some("steps[0].action.file_patch.path"),
        "\"../x\" leads out of the sandbox",
    ),
    (
        "a folder outside the sandbox",
        |request, _| command(request)["work_dir"] = json!("/../.."),
        ErrorCode::PathEscapes,
        Some("steps[0].action.command.work_dir"),
        "leads out of the sandbox",
    ),
    (
        "a time-out of zero",
        |request, _| request["timeout_ms"] = json!(0),
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "is zero, leave it out for the default",
    ),
    (
        "a step's time-out of zero",
        |request, _| command(request)["timeout_ms"] = json!(0),
        ErrorCode::InvalidTimeout,
        Some("steps[0].action.command.timeout_ms"),
        "is zero",
    ),
    (
        "a time-out of a year",
        |request, _| request["timeout_ms"] = json!(365_u64 * 86_400_000),
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "at most 86400000 ms",
    ),
    (
        "more than one problem",
        |request, _| {
            request["timeout_ms"] = json!(0);
            command(request)["argv"] = json!([]);
        },
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "(and 1 more problems)",
    ),
];

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

#[tokio::test]
async fn the_client_refuses_before_it_publishes() {
    let fleet = fleet().await;
    let client = fleet.client("checked").await.unwrap();
    let pool = "default".parse().unwrap();
    let cases: [(Step, ErrorCode, &str); 4] = [
        (
            Step::command::<&str>([]),
            ErrorCode::EmptyArgv,
            "steps[0].action.command.argv: names no program",
        ),
        (
            Step::command(["echo", "\0"]),
            ErrorCode::NulByte,
            "steps[0].action.command.argv[1]: holds a NUL byte",
        ),
        (
            Step::write("../x", ""),
            ErrorCode::PathEscapes,
            "steps[0].action.file_patch.path: \"../x\" leads out",
        ),
        (
            Step {
                name: String::new(),
                action: StepKind::Command(Command {
                    argv: vec![Blob::from(&b"true"[..])],
                    timeout_ms: Some(0),
                    ..Command::default()
                }),
            },
            ErrorCode::InvalidTimeout,
            "steps[0].action.command.timeout_ms: is zero",
        ),
    ];
    for (step, code, told) in cases {
        let error = client
            .submit(client.task(&pool, vec![step]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), code);
        let ClientError::Invalid { source, .. } = error else {
            panic!("{error}");
        };
        assert!(source.to_string().contains(told), "{source}");
    }
}

#[tokio::test]
async fn the_command_line_says_what_and_where() {
    let fleet = fleet().await;
    let cases: [(&[&str], i32, &[&str]); 5] = [
        (
            &["run", "--pool", "nowhere", "--", "true"],
            125,
            &["rejected: pool: there is no pool nowhere", "[unknown_pool]"],
        ),
        (
            &["run", "--pool", "no/where", "--", "true"],
            2,
            &["--pool", "[A-Za-z0-9_-]"],
        ),
        (
            &["run", "--", ""],
            125,
            &["steps[0].action.command.argv", "[empty_argv]"],
        ),
        (
            &["run", "--work-dir", "../..", "--", "true"],
            125,
            &["steps[0].action.command.work_dir", "[path_escapes]"],
        ),
        (
            &["run", "--timeout", "0s", "--", "true"],
            2,
            &["--timeout", "is zero, leave it out"],
        ),
    ];
    for (args, code, told) in cases {
        let finished = fleet.remuda(args).await.unwrap();
        assert_eq!(finished.code(), code, "{args:?}: {finished:?}");
        for part in told {
            assert!(finished.stderr.contains(part), "{args:?}: {finished:?}");
        }
    }
    goes_on(&fleet).await;
}

fn shell(script: &str) -> Step {
    Step::command(["sh", "-c", script])
}

fn read(path: &str) -> Step {
    Step {
        name: String::new(),
        action: StepKind::FileRead(FileRead {
            path: path.into(),
            ..FileRead::default()
        }),
    }
}

/// The links are made by the code that runs: no check beforehand sees them.
#[tokio::test]
async fn links_lead_nowhere_outside_the_sandbox() {
    let fleet = fleet().await;
    let secret = fleet.data().join("secret");
    std::fs::write(&secret, "of the host").unwrap();
    let client = fleet.client("links").await.unwrap();
    let pool = "default".parse().unwrap();
    let secret = secret.display().to_string();
    // Beneath a folder that the sandbox does not have.
    let up = format!("{}{secret}", "../".repeat(40));
    let cases = [
        (
            format!("ln -s {secret} link"),
            read("link"),
            ErrorCode::NotAFile,
        ),
        (
            format!("ln -s {up} link"),
            read("link"),
            ErrorCode::NotAFile,
        ),
        (
            format!("ln -s $(dirname {up}) link"),
            read("link/secret"),
            ErrorCode::FileNotFound,
        ),
        (
            format!("ln -s $(dirname {secret}) link"),
            Step::write("link/secret", "changed"),
            ErrorCode::FileNotFound,
        ),
        (
            "ln -s /proc/self/root/etc link".into(),
            read("link/passwd"),
            ErrorCode::NotAFile,
        ),
        (
            "ln -s /proc/self/cwd link".into(),
            Step::write("link/x", "changed"),
            ErrorCode::NotAFile,
        ),
        (
            "ln -s /usr link".into(),
            Step::write("link/x", "changed"),
            ErrorCode::PermissionDenied,
        ),
    ];
    for (script, step, code) in cases {
        let request = client.task(&pool, vec![shell(&script), step]);
        let terminal = client.run(request).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Failed, "{script}: {terminal:?}");
        assert_eq!(terminal.attribution, Attribution::Policy, "{script}");
        let error = terminal.error.unwrap();
        assert_eq!(error.code, code, "{script}: {error}");
        assert!(error.message.contains("link"), "{script}: {error}");
    }
    let kept = std::fs::read_to_string(fleet.data().join("secret")).unwrap();
    assert_eq!(kept, "of the host");
    goes_on(&fleet).await;
}
