//! Tenants, quotas, groups, credit, and cancelling more than one task, between a real nats-server
//! and a real Redis.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{
    Attribution, CancelCause, CancelRequest, Credit, ErrorCode, GroupId, Outcome, RunId,
    SessionOptions, TaskId, TaskRequest, TenantId,
};
use futures::StreamExt as _;
use remuda_dispatcher::TenantOptions;
use remuda_lease::{Finished, Vote};
use remuda_telemetry::TraceHeaders;
use support::{FakeWorker, Fleet, task, until};

fn limits(name: &str) -> TenantOptions {
    serde_json::from_value(serde_json::json!({ "name": name })).unwrap()
}

/// A fleet whose dispatcher has this to say about tenants.
async fn fleet_with(tenants: Vec<TenantOptions>) -> Fleet {
    let mut fleet = Box::pin(Fleet::start()).await;
    if !tenants.is_empty() {
        fleet.stop_dispatcher().await;
        fleet.options.tenants = tenants;
        Box::pin(fleet.start_dispatcher()).await;
    }
    fleet
}

fn in_run(run: &str) -> TaskRequest {
    TaskRequest {
        run: run.parse().unwrap(),
        ..task()
    }
}

fn member(group: &str, size: u32) -> TaskRequest {
    TaskRequest {
        group: Some(group.parse().unwrap()),
        group_size: Some(size),
        ..task()
    }
}

async fn cancel(fleet: &Fleet, request: &CancelRequest) -> serde_json::Value {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Content-Type", "application/json");
    let payload = serde_json::to_vec(request).unwrap();
    let subject = fleet.broker.subjects().cancel(&request.tenant);
    let nats = fleet.broker.nats();
    let reply = nats
        .request_with_headers(subject, headers, payload.into())
        .await
        .unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

fn acme() -> TenantId {
    "acme".parse().unwrap()
}

fn r1() -> RunId {
    "r1".parse().unwrap()
}

/// The tasks of the next `count` placements.
async fn placed(worker: &mut FakeWorker, fleet: &Fleet, count: usize) -> Vec<TaskId> {
    let mut tasks = Vec::new();
    for _ in 0..count {
        let (placement, delivery) = worker.placement(fleet).await;
        delivery.ack().await.unwrap();
        tasks.push(placement.task.id);
    }
    tasks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_waits_for_its_last_member_and_not_for_ever() {
    let mut fleet = Fleet::start().await;
    fleet.stop_dispatcher().await;
    fleet.options.timings.group_hold = Duration::from_secs(20);
    fleet.start_dispatcher().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let members = [member("g", 3), member("g", 3), member("g", 3)];
    fleet.submit(&members[0]).await;
    fleet.submit(&members[1]).await;
    let other = in_run("r2");
    fleet.submit(&other).await;
    worker.offer(&fleet, 4).await;
    // Two of three wait, and stand in nobody's way.
    assert_eq!(placed(&mut worker, &fleet, 1).await, [other.id]);
    fleet.submit(&members[2]).await;
    let got: BTreeSet<TaskId> = placed(&mut worker, &fleet, 3).await.into_iter().collect();
    assert_eq!(got, members.iter().map(|task| task.id).collect());

    fleet.stop_dispatcher().await;
    fleet.options.timings.group_hold = Duration::from_millis(300);
    fleet.start_dispatcher().await;
    let alone = member("h", 3);
    fleet.submit(&alone).await;
    worker.offer(&fleet, 1).await;
    assert_eq!(placed(&mut worker, &fleet, 1).await, [alone.id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_with_results_enough_is_ended_by_flags_alone() {
    let fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let members: Vec<TaskRequest> = (0..5)
        .map(|_| TaskRequest {
            min_valid: Some(1),
            ..member("g", 5)
        })
        .collect();
    for member in &members {
        fleet.submit(member).await;
    }
    worker.offer(&fleet, 1).await;
    let (first, delivery) = worker.placement(&fleet).await;
    delivery.ack().await.unwrap();
    let (tenant, run, group): (_, _, GroupId) = (acme(), r1(), "g".parse().unwrap());
    let finished = Finished {
        tenant: &tenant,
        task: first.task.id,
        vote: Some(Vote {
            run: &run,
            group: &group,
            min_valid: 1,
        }),
    };
    let (sandbox, epoch) = (first.sandbox.sandbox, first.sandbox.epoch);
    let done = fleet
        .lease
        .finish(&worker.id, sandbox, epoch, Some(&finished), false);
    assert!(done.await.unwrap().enough);
    // Nobody tells the dispatcher; a claim finds the flag.
    for member in members.iter().filter(|member| member.id != first.task.id) {
        let terminal = fleet.terminal("r1", member.id).await;
        assert_eq!(terminal.outcome, Outcome::Cancelled);
        let why = CancelCause::Enough { valid: 1 }.evidence();
        assert!(terminal.evidence.contains(&why), "{}", terminal.evidence);
    }
    fleet.requests_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_counts_whose_worker_died_before_it_could_count_it() {
    let fleet = Fleet::start().await;
    // A terminal as that worker stored it, made of another one.
    let cancelled = task();
    fleet.submit(&cancelled).await;
    let request = CancelRequest::task(acme(), cancelled.id, Some(r1()));
    cancel(&fleet, &request).await;
    let mut terminal = fleet.terminal("r1", cancelled.id).await;
    let members: Vec<TaskRequest> = (0..3)
        .map(|_| TaskRequest {
            min_valid: Some(1),
            ..member("g", 3)
        })
        .collect();
    terminal.task = members[0].id;
    terminal.outcome = Outcome::Succeeded;
    terminal.attribution = Attribution::Policy;
    terminal.request_digest = String::new();
    let (format, trace) = (Format::MessagePack, TraceHeaders::default());
    let patience = Duration::from_secs(10);
    let put = fleet
        .broker
        .put_terminal(&terminal, format, &trace, patience);
    put.await.unwrap();
    // Its request comes again, with those of the others.
    for member in &members {
        fleet.submit(member).await;
    }
    for member in &members[1..] {
        let terminal = fleet.terminal("r1", member.id).await;
        let why = CancelCause::Enough { valid: 1 }.evidence();
        assert!(terminal.evidence.contains(&why), "{}", terminal.evidence);
    }
    let first = fleet.terminal("r1", members[0].id).await;
    assert_eq!(first.outcome, Outcome::Succeeded);
    fleet.requests_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_and_a_group_are_cancelled_and_stay_so() {
    let mut fleet = Fleet::start().await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    let run: Vec<TaskRequest> = (0..20).map(|_| in_run("r2")).collect();
    let held = TaskRequest {
        run: "r2".parse().unwrap(),
        ..member("x", 9)
    };
    let group: Vec<TaskRequest> = (0..3).map(|_| member("g", 1)).collect();
    let other = task();
    let all = run.iter().chain([&held]).chain(&group).chain([&other]);
    for task in all {
        fleet.submit(task).await;
    }
    let reply = cancel(&fleet, &CancelRequest::run(acme(), "r2".parse().unwrap())).await;
    assert_eq!(reply["state"], "cancelling", "{reply}");
    for task in run.iter().chain([&held]) {
        let terminal = fleet.terminal("r2", task.id).await;
        assert_eq!(terminal.outcome, Outcome::Cancelled);
        let why = CancelCause::Run.evidence();
        assert!(terminal.evidence.contains(&why), "{}", terminal.evidence);
    }
    let request = CancelRequest::group(acme(), r1(), "g".parse().unwrap());
    assert_eq!(cancel(&fleet, &request).await["state"], "cancelling");
    for task in &group {
        let terminal = fleet.terminal("r1", task.id).await;
        assert_eq!(terminal.outcome, Outcome::Cancelled);
        let why = CancelCause::Group.evidence();
        assert!(terminal.evidence.contains(&why), "{}", terminal.evidence);
    }
    // What was not meant goes on.
    worker.offer(&fleet, 1).await;
    assert_eq!(placed(&mut worker, &fleet, 1).await, [other.id]);
    // A dispatcher that heard of nothing finds the flag.
    fleet.stop_dispatcher().await;
    fleet.start_dispatcher().await;
    let late = in_run("r2");
    fleet.submit(&late).await;
    let terminal = fleet.terminal("r2", late.id).await;
    assert_eq!(terminal.outcome, Outcome::Cancelled);
    fleet.requests_settled().await;
    // Neither a missing field nor a foreign tenant widens anything.
    let mut odd = serde_json::json!({"tenant": "acme", "run": "r1"});
    let request: CancelRequest = serde_json::from_value(odd.clone()).unwrap();
    assert_eq!(cancel(&fleet, &request).await["error"]["field"], "task");
    odd["scope"] = "group".into();
    let request: CancelRequest = serde_json::from_value(odd).unwrap();
    assert_eq!(cancel(&fleet, &request).await["error"]["field"], "group");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_dispatcher_answers_the_one_that_holds_a_task_ends_it() {
    let fleet = Fleet::start().await;
    let second = fleet.second_dispatcher().await;
    let tasks: Vec<TaskRequest> = (0..16).map(|_| task()).collect();
    for task in &tasks {
        fleet.submit(task).await;
    }
    until("everything is queued", async || {
        let credit = fleet.lease.credits().await.unwrap();
        let credit = credit.get(&"py".parse().unwrap())?.clone();
        (credit.queued == 16).then_some(())
    })
    .await;
    // Without the run only the one that holds it can end it at once; either may be asked.
    let mut at_once = 0;
    for task in &tasks {
        let request = CancelRequest::task(acme(), task.id, None);
        let reply = cancel(&fleet, &request).await;
        // Cancelling: it was being looked for a sandbox for at that moment.
        match reply["state"].as_str() {
            Some("cancelled") => at_once += 1,
            Some("cancelling") => {}
            _ => panic!("{reply}"),
        }
        let terminal = fleet.terminal("r1", task.id).await;
        assert_eq!(terminal.outcome, Outcome::Cancelled);
    }
    assert!(at_once > 8, "{at_once} of 16");
    let never = CancelRequest::task(acme(), TaskId::new(), None);
    assert_eq!(cancel(&fleet, &never).await["state"], "unknown");
    fleet.requests_settled().await;
    second.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_requests_beyond_the_quota_are_refused() {
    let mut own = limits("acme");
    own.max_queued = Some(3);
    let fleet = fleet_with(vec![own]).await;
    let tasks: Vec<TaskRequest> = (0..12).map(|_| task()).collect();
    for task in &tasks {
        fleet.submit(task).await;
    }
    let other = TaskRequest {
        tenant: "other".parse().unwrap(),
        ..task()
    };
    fleet.submit(&other).await;
    for task in &tasks[3..] {
        let terminal = fleet.terminal("r1", task.id).await;
        let error = terminal.error.unwrap();
        assert_eq!(
            (terminal.outcome, error.code),
            (Outcome::Rejected, ErrorCode::QuotaExceeded)
        );
        for part in ["acme", "max_queued is 3"] {
            assert!(error.message.contains(part), "{error}");
        }
    }
    // The oldest wait on, and are placed.
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    worker.offer(&fleet, 4).await;
    let got: BTreeSet<TaskId> = placed(&mut worker, &fleet, 4).await.into_iter().collect();
    let kept = tasks[..3].iter().chain([&other]);
    assert_eq!(got, kept.map(|task| task.id).collect());
    fleet.requests_settled().await;
    // A group that could never wait as a whole is told so at once; one that partly could goes
    // as a whole.
    let large = member("large", 4);
    fleet.submit(&large).await;
    let error = fleet.terminal("r1", large.id).await.error.unwrap();
    assert_eq!(error.field.as_deref(), Some("group_size"), "{error}");
    let waiting = [task(), task()];
    for task in &waiting {
        fleet.submit(task).await;
    }
    let group = [member("g", 3), member("g", 3)];
    for task in &group {
        fleet.submit(task).await;
    }
    for task in &group {
        let terminal = fleet.terminal("r1", task.id).await;
        let code = terminal.error.unwrap().code;
        assert_eq!(code, ErrorCode::QuotaExceeded, "{}", terminal.evidence);
    }
    worker.offer(&fleet, 2).await;
    let got: BTreeSet<TaskId> = placed(&mut worker, &fleet, 2).await.into_iter().collect();
    assert_eq!(got, waiting.iter().map(|task| task.id).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_submitted_again_is_neither_refused_nor_counted() {
    let mut own = limits("acme");
    own.max_queued = Some(1);
    let fleet = fleet_with(vec![own]).await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    worker.offer(&fleet, 1).await;
    let (running, waiting) = (task(), task());
    fleet.submit(&running).await;
    assert_eq!(placed(&mut worker, &fleet, 1).await, [running.id]);
    fleet.submit(&waiting).await;
    // As a server stores it that has forgotten the id.
    let again = async |task: &TaskRequest| {
        let subject = fleet.broker.subjects().request(&task.tenant, &task.pool);
        let payload = codec::encode(task, Format::MessagePack).unwrap();
        fleet
            .publish(&subject, None, Format::MessagePack, payload)
            .await;
    };
    again(&running).await;
    again(&waiting).await;
    // What is too much is refused, a second time after every one of them was looked at.
    for _ in 0..2 {
        let beyond = task();
        fleet.submit(&beyond).await;
        let terminal = fleet.terminal("r1", beyond.id).await;
        assert_eq!(terminal.outcome, Outcome::Rejected);
    }
    for task in [&running, &waiting] {
        let terminal = fleet.broker.terminal_of(&acme(), &r1(), task.id).await;
        assert_eq!(terminal.unwrap(), None);
    }
    let streams = fleet.broker.streams();
    until("the one that waits and two copies are left", async || {
        let left = fleet.stored(&streams.requests, "remuda.req.>").await;
        (left == 3).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_at_its_quota_waits_and_others_pass_by() {
    let mut own = limits("acme");
    own.max_running = Some(1);
    let mut sessions = limits("keeper");
    (sessions.max_sandboxes, sessions.max_sessions) = (Some(2), Some(1));
    let mut nothing = limits("*");
    nothing.max_sandboxes = Some(0);
    let fleet = fleet_with(vec![own, sessions, nothing]).await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    worker.offer(&fleet, 8).await;
    let (first, second) = (task(), task());
    fleet.submit(&first).await;
    assert_eq!(placed(&mut worker, &fleet, 1).await, [first.id]);
    fleet.submit(&second).await;
    // The other tenant passes by; its session counts against its share.
    let keeper = |keep: bool| TaskRequest {
        tenant: "keeper".parse().unwrap(),
        keep_alive: keep.then(SessionOptions::default),
        ..task()
    };
    let opening = keeper(true);
    fleet.submit(&opening).await;
    let (session, delivery) = worker.placement(&fleet).await;
    delivery.ack().await.unwrap();
    assert_eq!(session.task.id, opening.id);
    let refused = keeper(true);
    fleet.submit(&refused).await;
    let broker = &fleet.broker;
    let tenant = "keeper".parse().unwrap();
    let terminal = until("a refusal", async || {
        let stored = broker.terminal_of(&tenant, &r1(), refused.id).await;
        stored.unwrap()
    })
    .await;
    let error = terminal.error.unwrap();
    assert_eq!(error.code, ErrorCode::QuotaExceeded);
    for part in ["keeper", "1 sessions", "max_sessions is 1"] {
        assert!(error.message.contains(part), "{error}");
    }
    let shut_out = TaskRequest {
        tenant: "nobody".parse().unwrap(),
        ..task()
    };
    fleet.submit(&shut_out).await;
    let tenant = "nobody".parse().unwrap();
    let terminal = until("a refusal", async || {
        let stored = broker.terminal_of(&tenant, &r1(), shut_out.id).await;
        stored.unwrap()
    })
    .await;
    assert!(terminal.evidence.contains("max_sandboxes is 0"));
    // One has ended: the one that waited goes.
    let used = fleet.lease.tenant_use(&acme()).await.unwrap();
    assert_eq!(used.running, 1);
    let leases = fleet.lease.leases().await.unwrap();
    let held = leases.iter().find(|lease| lease.task == Some(first.id));
    let held = &held.unwrap().sandbox;
    let done = Some((&first.tenant, first.id));
    let released = fleet
        .lease
        .release(&worker.id, held.sandbox, held.epoch, done);
    assert!(released.await.unwrap());
    assert_eq!(placed(&mut worker, &fleet, 1).await, [second.id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_are_served_by_their_weights() {
    let mut heavy = limits("heavy");
    heavy.weight = 3;
    let fleet = fleet_with(vec![heavy]).await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    for _ in 0..24 {
        for tenant in ["heavy", "light"] {
            let task = TaskRequest {
                tenant: tenant.parse().unwrap(),
                ..task()
            };
            fleet.submit(&task).await;
        }
    }
    // All of them are here before anything is offered.
    let requests = &fleet.broker.streams().requests;
    until("everything is queued", async || {
        let credit = fleet.lease.credits().await.unwrap();
        let queued = credit.get(&"py".parse().unwrap())?.queued;
        let stored = fleet.stored(requests, "remuda.req.>").await;
        (queued == 48 && stored == 48).then_some(())
    })
    .await;
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..16 {
        worker.offer(&fleet, 1).await;
        let (placement, delivery) = worker.placement(&fleet).await;
        delivery.ack().await.unwrap();
        *counts.entry(placement.task.tenant.to_string()).or_default() += 1;
    }
    assert!((11..=13).contains(&counts["heavy"]), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credit_says_what_is_free_and_what_waits() {
    let fleet = Fleet::start().await;
    let subject = fleet.broker.subjects().credit(&"py".parse().unwrap());
    let mut told = fleet.broker.nats().subscribe(subject).await.unwrap();
    let mut next = async |what: &str, wanted: &dyn Fn(&Credit) -> bool| {
        let find = async {
            loop {
                let message = told.next().await.unwrap();
                let credit: Credit = codec::decode(&message.payload, Format::MessagePack).unwrap();
                if wanted(&credit) {
                    return credit;
                }
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(30), find).await;
        found.unwrap_or_else(|_| panic!("never: {what}"))
    };
    let idle = next("an idle pool", &|credit| credit.queued == 0).await;
    assert_eq!((idle.free, idle.leased), (0, 0));
    assert_eq!(idle.max, 64);
    for _ in 0..5 {
        fleet.submit(&task()).await;
    }
    next("five that wait", &|credit| credit.queued == 5).await;
    let mut worker = FakeWorker::join(&fleet, "w1").await;
    worker.offer(&fleet, 7).await;
    placed(&mut worker, &fleet, 5).await;
    let after = next("what is left", &|credit| {
        credit.leased == 5 && credit.queued == 0
    })
    .await;
    assert_eq!((after.free, after.expected_wait_ms), (2, Some(0)));
    let kept = fleet.lease.credits().await.unwrap();
    assert_eq!(kept[&"py".parse().unwrap()].pool.as_str(), "py");
}
