//! What no honest party would send: each is refused or set aside, told in a log and counted, and
//! the fleet goes on.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{
    Epoch, ErrorCode, Frame, FrameKind, Outcome, Placement, SandboxId, SandboxRef, Step, TaskId,
    TaskRequest, Terminal, Timestamp, WorkerId,
};
use remuda_client::broker::Outgoing;
use remuda_client::{Client, ClientError, OutputEvent};
use remuda_lease::{LeaseOptions, LeaseStore, Renewal};
use remuda_telemetry::TraceHeaders;
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};
use remuda_tests::wait::eventually;

const PATIENCE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    FLEET.get(default_config).await.unwrap()
}

async fn registry(fleet: &Fleet) -> LeaseStore {
    let options = LeaseOptions {
        url: fleet.redis().to_owned(),
        ..LeaseOptions::default()
    };
    LeaseStore::connect(&options).await.unwrap()
}

fn task(client: &Client, command: &[&str]) -> TaskRequest {
    let pool = "default".parse().unwrap();
    client.task(&pool, vec![Step::command(command.iter().copied())])
}

fn said(terminal: &Terminal) -> String {
    let stdout = terminal.steps[0].stdout.whole().unwrap();
    String::from_utf8(stdout.to_vec()).unwrap()
}

async fn goes_on(client: &Client) {
    let running = client.run(task(client, &["echo", "goes on"]));
    let terminal = tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        terminal.outcome,
        Outcome::Succeeded,
        "{}",
        terminal.evidence
    );
    assert_eq!(said(&terminal), "goes on\n");
}

/// Publishes whatever it is told to wherever it is told to.
async fn forge(client: &Client, subject: String, payload: Vec<u8>) {
    let outgoing = Outgoing {
        subject,
        payload: payload.into(),
        ..Outgoing::default()
    };
    client.broker().publish(outgoing, PATIENCE).await.unwrap();
}

/// Waits until a part has counted more than before.
async fn counts(fleet: &Fleet, part: &str, name: &str, labels: &str, before: f64) {
    eventually("higher count", PATIENCE, async || {
        match fleet.counted(part, name, labels).await {
            Ok(now) if now > before => Ok(()),
            other => Err(format!("{name} {other:?}, {before} before")),
        }
    })
    .await
    .unwrap();
}

async fn the_worker(store: &LeaseStore) -> WorkerId {
    let workers = store.workers().await.unwrap();
    workers[0].record.worker.clone()
}

#[tokio::test]
async fn a_terminal_for_a_task_never_asked_for() {
    let fleet = fleet().await;
    let client = fleet.client("forged-terminals").await.unwrap();
    let (broker, dead) = (client.broker(), "remuda_dispatcher_dead_lettered");
    let lettered = fleet
        .counted("dispatcher", dead, "id_conflict")
        .await
        .unwrap();

    // Somebody claims to know how a task ended before it was asked for.
    let request = task(&client, &["echo", "mine"]);
    let mut forged = client
        .run(task(&client, &["echo", "forged"]))
        .await
        .unwrap();
    forged.task = request.id;
    forged.request_digest = "0".repeat(64);
    let (format, trace) = (Format::MessagePack, TraceHeaders::default());
    broker
        .put_terminal(&forged, format, &trace, PATIENCE)
        .await
        .unwrap();
    // It is not taken for the answer, and does not become one: the id is spent.
    let answer = client.run(request).await;
    assert!(
        matches!(answer, Err(ClientError::IdConflict { .. })),
        "{answer:?}"
    );
    counts(&fleet, "dispatcher", dead, "id_conflict", lettered).await;

    // And what is no terminal at all stands in nobody's way.
    let lettered = fleet
        .counted("dispatcher", dead, "unparsable_payload")
        .await
        .unwrap();
    let request = task(&client, &["echo", "mine"]);
    let subject = broker
        .subjects()
        .terminal(&request.tenant, &request.run, request.id);
    forge(&client, subject, b"\xc1\x00 no terminal".to_vec()).await;
    let finished = eventually("result", PATIENCE, async || {
        // The client says that it cannot read what stands there, until it is set aside.
        match client.run(request.clone()).await {
            Ok(terminal) => Ok(terminal),
            Err(error) => Err(error.to_string()),
        }
    })
    .await
    .unwrap();
    assert_eq!(said(&finished), "mine\n");
    counts(&fleet, "dispatcher", dead, "unparsable_payload", lettered).await;
    goes_on(&client).await;
}

#[tokio::test]
async fn frames_from_an_attempt_that_is_not_the_one_that_counts() {
    let fleet = fleet().await;
    let client = fleet.client("forged-frames").await.unwrap();
    let program = "for n in 1 2 3 4 5 6; do echo line $n; sleep 0.1; done";
    let request = task(&client, &["sh", "-c", program]);
    let subject = client
        .broker()
        .subjects()
        .result(&request.tenant, &request.run, request.id);
    let forged = |attempt, n| {
        let frame = Frame {
            attempt,
            epoch: Epoch::new(0, 1),
            n,
            step: 0,
            kind: FrameKind::Stdout,
            data: "forged".into(),
            exit: None,
        };
        codec::encode(&frame, Format::MessagePack).unwrap()
    };
    let mut output = client.stream(request).await.unwrap();
    let mut stdout = Vec::new();
    let mut done = None;
    while let Some(event) = output.next().await {
        match event.unwrap() {
            OutputEvent::Output { bytes, .. } => {
                // Behind the first that is real: of an attempt before it and of one that nobody
                // made, and what is no frame.
                if stdout.is_empty() {
                    for payload in [forged(0, 0), forged(7, 0), forged(7, 1), vec![0xc1; 9]] {
                        forge(&client, subject.clone(), payload).await;
                    }
                }
                stdout.extend_from_slice(&bytes);
            }
            OutputEvent::Reset { .. } => stdout.clear(),
            OutputEvent::StepExit { .. } => {}
            OutputEvent::Done(terminal) => done = Some(terminal),
        }
    }
    let terminal = done.unwrap();
    assert_eq!(
        (terminal.outcome, terminal.attempt),
        (Outcome::Succeeded, 1)
    );
    let expected = "line 1\nline 2\nline 3\nline 4\nline 5\nline 6\n";
    assert_eq!(String::from_utf8(stdout).unwrap(), expected);
    goes_on(&client).await;
}

#[tokio::test]
async fn placements_that_no_dispatcher_made() {
    let fleet = fleet().await;
    let client = fleet.client("forged-placements").await.unwrap();
    let worker = the_worker(&registry(&fleet).await).await;
    let subjects = client.broker().subjects();
    let sandbox = SandboxRef {
        sandbox: SandboxId::new(),
        worker: worker.clone(),
        epoch: Epoch::new(1, 1),
    };
    let place = |task: TaskRequest, named: &SandboxRef| Placement {
        request_digest: "0".repeat(64),
        attempt: 1,
        sandbox: named.clone(),
        dispatched_at: Timestamp::now(),
        task,
    };
    let subject = subjects.placement(&worker, client.tenant(), sandbox.sandbox);

    // Garbage at the head of the queue.
    let unreadable = "remuda_worker_placements_unreadable";
    let before = fleet.counted("worker", unreadable, "").await.unwrap();
    for payload in [&b"\xc1"[..], b"", b"{\"task\":"] {
        forge(&client, subject.clone(), payload.to_vec()).await;
    }
    counts(&fleet, "worker", unreadable, "", before + 2.0).await;

    // Another worker's name, another tenant's, another sandbox in the payload than in the subject.
    let attempts = "remuda_worker_placements_refused";
    let before = fleet.counted("worker", attempts, "").await.unwrap();
    let other_worker = SandboxRef {
        worker: "somebody-else".parse().unwrap(),
        ..sandbox.clone()
    };
    let other_sandbox = SandboxRef {
        sandbox: SandboxId::new(),
        ..sandbox.clone()
    };
    for named in [&other_worker, &other_sandbox] {
        let request = task(&client, &["echo", "must not run"]);
        let (run, id) = (request.run.clone(), request.id);
        let placement = place(request, named);
        let payload = codec::encode(&placement, Format::MessagePack).unwrap();
        forge(&client, subject.clone(), payload).await;
        let terminal = terminal_of(&client, &run, id).await;
        assert_eq!(terminal.outcome, Outcome::Rejected, "{terminal:?}");
        assert_eq!(terminal.error.unwrap().code, ErrorCode::SubjectMismatch);
    }
    counts(&fleet, "worker", attempts, "", before + 1.0).await;

    // All agree, and no such sandbox was ever claimed: it goes the way of every request.
    let request = task(&client, &["echo", "properly"]);
    let (run, id) = (request.run.clone(), request.id);
    let payload = codec::encode(&place(request, &sandbox), Format::MessagePack).unwrap();
    forge(&client, subject, payload).await;
    let terminal = terminal_of(&client, &run, id).await;
    assert_eq!(terminal.outcome, Outcome::Succeeded, "{terminal:?}");
    let real = terminal.sandbox.unwrap();
    assert_ne!(real.sandbox, sandbox.sandbox);
    assert!(real.epoch > sandbox.epoch);
    goes_on(&client).await;
}

async fn terminal_of(client: &Client, run: &broker_schema::RunId, task: TaskId) -> Terminal {
    eventually("terminal", PATIENCE, async || {
        match client
            .broker()
            .terminal_of(client.tenant(), run, task)
            .await
        {
            Ok(Some(terminal)) => Ok(terminal),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_worker_that_says_it_is_another() {
    let fleet = fleet().await;
    let client = fleet.client("forged-workers").await.unwrap();
    let store = registry(&fleet).await;
    let before = store.workers().await.unwrap();
    let mut forged = before[0].record.clone();
    forged.pid += 1;
    forged.slots = 0;
    forged.host = "nowhere".to_owned();
    assert!(store.register(&forged).await.is_err());
    assert!(store.heartbeat(&forged).await.is_err());
    let refused = "remuda_dispatcher_registry_refused";
    counts(&fleet, "dispatcher", refused, "heartbeat", 0.0).await;
    let now = store.workers().await.unwrap();
    assert_eq!(now[0].record.host, before[0].record.host);

    // It offers what is not there, in the name of one that is and of one that is not.
    let pool = "default".parse().unwrap();
    let made_up: Vec<SandboxId> = (0..3).map(|_| SandboxId::new()).collect();
    let incarnation = store.incarnation().await.unwrap().unwrap();
    let nobody = "nobody".parse().unwrap();
    let offered = store.offer(&nobody, incarnation, &pool, &made_up).await;
    assert_eq!(offered.unwrap(), remuda_lease::Offered::Unregistered);
    let real = &before[0].record.worker;
    store
        .offer(real, incarnation, &pool, &made_up)
        .await
        .unwrap();
    for _ in 0..8 {
        goes_on(&client).await;
    }
}

#[tokio::test]
async fn renewals_and_releases_of_somebody_elses_lease() {
    let fleet = fleet().await;
    let client = fleet.client("forged-renewals").await.unwrap();
    let store = registry(&fleet).await;
    let request = task(&client, &["sleep", "25"]);
    let id = request.id;
    let mut submitted = client.submit(request).await.unwrap();
    let lease = eventually("lease", PATIENCE, async || {
        let leases = store.leases().await.unwrap();
        let found = leases.into_iter().find(|lease| lease.task == Some(id));
        found.ok_or("it is not leased yet")
    })
    .await
    .unwrap()
    .sandbox;

    let refused = "remuda_dispatcher_registry_refused";
    let before = fleet
        .counted("dispatcher", refused, "renewal")
        .await
        .unwrap();
    let nobody: WorkerId = "nobody".parse().unwrap();
    let wrong = Epoch(lease.epoch.0 + 1);
    for (worker, epoch) in [
        (&nobody, lease.epoch),
        (&lease.worker, wrong),
        (&lease.worker, Epoch(0)),
    ] {
        let renewed = store.renew(worker, &[(lease.sandbox, epoch)]).await;
        assert_eq!(renewed.unwrap(), [Renewal::Lost], "{worker} {epoch}");
        store
            .release(worker, lease.sandbox, epoch, None)
            .await
            .unwrap();
    }
    counts(&fleet, "dispatcher", refused, "renewal", before).await;
    let kept = store.leases().await.unwrap();
    let kept = kept.iter().find(|kept| kept.sandbox == lease);
    assert_eq!(kept.unwrap().task, Some(id), "its lease is as it was");
    client.cancel(id, None).await.unwrap();
    let terminal = submitted.terminal().await.unwrap();
    assert_eq!(terminal.outcome, Outcome::Cancelled);
    goes_on(&client).await;
}

#[tokio::test]
async fn clocks_that_are_a_day_off() {
    let fleet = fleet().await;
    let client = fleet.client("clocks").await.unwrap();
    let now = Timestamp::now();
    let far = [
        Timestamp(0),
        Timestamp(now.0 - DAY.as_micros() as u64),
        now.plus(DAY),
        Timestamp(u64::MAX),
    ];
    for submitted_at in far {
        let request = TaskRequest {
            submitted_at,
            ..task(&client, &["true"])
        };
        let terminal = client.run(request).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{submitted_at}");
        assert_eq!(terminal.times.queued, submitted_at, "as it was said");
        let started = terminal.times.started.unwrap();
        assert!(started >= now && started < now.plus(DAY), "{started}");
    }
    for deadline in [now.plus(DAY), now.plus(DAY * 10_000), Timestamp(u64::MAX)] {
        let request = TaskRequest {
            deadline: Some(deadline),
            ..task(&client, &["true"])
        };
        let terminal = client.run(request).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Succeeded, "{deadline}");
    }
    // Asked for with a clock a day behind: it says which of the two times to look at.
    let yesterday = Timestamp(now.0 - DAY.as_micros() as u64);
    let request = TaskRequest {
        submitted_at: yesterday,
        deadline: Some(yesterday.plus(Duration::from_secs(60))),
        ..task(&client, &["true"])
    };
    let terminal = client.run(request).await.unwrap();
    assert_eq!(terminal.outcome, Outcome::Expired);
    let error = terminal.error.unwrap();
    assert_eq!(error.code, ErrorCode::DeadlineExpired);
    assert_eq!(error.field.as_deref(), Some("deadline"));
    goes_on(&client).await;
}

#[tokio::test]
async fn garbage_at_the_head_of_the_requests() {
    let fleet = fleet().await;
    let client = fleet.client("garbage").await.unwrap();
    let dead = "remuda_dispatcher_dead_lettered";
    let before = fleet
        .counted("dispatcher", dead, "unparsable_payload")
        .await
        .unwrap();
    let subject = client
        .broker()
        .subjects()
        .request(client.tenant(), &"default".parse().unwrap());
    let nested = vec![0x91; 100_000];
    for payload in [&b"\xc1"[..], b"", &nested, b"\x85\xa2id"] {
        forge(&client, subject.clone(), payload.to_vec()).await;
    }
    goes_on(&client).await;
    counts(
        &fleet,
        "dispatcher",
        dead,
        "unparsable_payload",
        before + 3.0,
    )
    .await;
}
