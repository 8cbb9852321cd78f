//! Faults of those who submit and read.

use std::time::Duration;

use anyhow::Context as _;
use broker_schema::{Frame, Priority, TaskId};
use futures::{FutureExt as _, StreamExt as _};
use remuda_client::{Client, Until};

use super::super::plan::{PlannedTask, Size, Work};
use super::super::scene::Scene;
use super::super::shape::Who;
use super::{Fault, Lengths, NOTHING};
use crate::proxy::Rules;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        number: 24,
        name: "reader-away",
        what: "readers of a run's terminals and of one task's output stop midway, and resume by sequence",
        checks: "no gap, no repeat, no reorder",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| reader_away(scene).boxed(),
        lengths: Lengths::two("20 s", "5 min"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 25,
        name: "reader-flooded",
        what: "a reader with room for 64 messages, and one behind a slow line, under a flood of frames",
        checks: "what was missed is seen to be missing and is read again; the others go on",
        needs: &[],
        shape: |shape, _| shape.proxied = vec![Who::Clients],
        strike: |scene| flooded(scene).boxed(),
        lengths: Lengths::one("8 floods of 4 MB"),
        forgiven: NOTHING,
        ci: false,
    },
    Fault {
        number: 30,
        name: "cancel-race",
        what: "tasks that are cancelled in the moment in which they finish",
        checks: "one terminal each, which says succeeded or cancelled",
        needs: &[],
        shape: |shape, full| {
            shape.load = Size {
                tasks: 10,
                sessions: 0,
                over: Duration::from_secs(if full { 600 } else { 8 }),
                ..Size::default()
            };
        },
        strike: |scene| cancel_race(scene).boxed(),
        lengths: Lengths::two("300 races", "10,000 races"),
        forgiven: NOTHING,
        ci: true,
    },
    Fault {
        number: 31,
        name: "many-pullers",
        what: "700 strangers pull from the dispatchers' consumer, and give back what they get",
        checks: "no starvation",
        needs: &[],
        shape: |_, _| {},
        strike: |scene| pullers(scene).boxed(),
        lengths: Lengths::one("700 pulls for 6 s"),
        forgiven: NOTHING,
        ci: false,
    },
];

fn added(work: Work, cancel_after: Option<Duration>, streamed: bool) -> PlannedTask {
    PlannedTask {
        at: Duration::ZERO,
        work,
        priority: Priority::Normal,
        cancel_after,
        twice: false,
        streamed,
    }
}

async fn reader_away(scene: &mut Scene) -> anyhow::Result<()> {
    const LINES: u64 = 500_000;
    let run = scene.client().run_id().clone();
    scene.moment(5, 20).await;
    let first = 60_000_000;
    let work = Work::Output {
        first,
        last: first + LINES,
    };
    scene.load.add(added(work.clone(), None, false))?;
    // The first half of both, by readers that then go away.
    let reader = scene.world.client(run.as_str()).await?;
    let mut results = Box::pin(reader.results(&run, None, Until::Dropped));
    let mut read = Vec::new();
    let half = scene.world.shape().load.tasks / 3;
    while read.len() < half {
        let item = tokio::time::timeout(Duration::from_secs(60), results.next()).await;
        let item = item.context("no terminal came")?.context("reading ended")?;
        read.push(item.map(|(sequence, terminal)| (sequence, terminal.task))?);
    }
    drop((results, reader));
    let away = Duration::from_secs(if scene.full { 300 } else { 20 });
    tokio::time::sleep(away).await;

    let reader = scene.world.client(run.as_str()).await?;
    let from = read.last().map(|(sequence, _)| sequence + 1);
    let rest = results_of(&reader, from).await?;
    let whole = results_of(&reader, None).await?;
    read.extend(rest);
    let shown = format!("{} read in two parts, {} in one", read.len(), whole.len());
    scene.note(shown.clone());
    scene.demand(whole.starts_with(&read), shown);

    let seen = scene.load.notebook.all().into_iter();
    let task = seen
        .filter(|seen| seen.what.starts_with(&format!("Output {{ first: {first},")))
        .map(|seen| seen.task)
        .next()
        .context("the large output was not submitted")?;
    scene
        .until("terminal of the large output", |counts| counts.ended > half)
        .await?;
    let expected = work.expected().stdout;
    let frames = frames_of(&reader, task, None).await?;
    let middle = frames.get(frames.len() / 2).map(|(sequence, _)| *sequence);
    let mut parts: Vec<(u64, Frame)> = frames
        .iter()
        .filter(|(sequence, _)| middle.is_none_or(|middle| *sequence < middle))
        .cloned()
        .collect();
    parts.extend(frames_of(&reader, task, middle).await?);
    scene.demand(
        parts == frames,
        "output that is read in two parts is not what it is in one",
    );
    let last = frames.iter().map(|(_, frame)| frame.attempt).max();
    let bytes: Vec<u8> = frames
        .iter()
        .filter(|(_, frame)| Some(frame.attempt) == last)
        .flat_map(|(_, frame)| frame.data.as_slice().to_vec())
        .collect();
    scene.demand(
        bytes == expected,
        format!(
            "{} bytes of output, expected {}",
            bytes.len(),
            expected.len()
        ),
    );
    Ok(())
}

async fn results_of(reader: &Client, from: Option<u64>) -> anyhow::Result<Vec<(u64, TaskId)>> {
    let run = reader.run_id().clone();
    let mut results = Box::pin(reader.results(&run, from, Until::CaughtUp));
    let mut read = Vec::new();
    while let Some(item) = results.next().await {
        read.push(item.map(|(sequence, terminal)| (sequence, terminal.task))?);
    }
    Ok(read)
}

async fn frames_of(
    reader: &Client,
    task: TaskId,
    from: Option<u64>,
) -> anyhow::Result<Vec<(u64, Frame)>> {
    let run = reader.run_id().clone();
    let mut output = Box::pin(reader.output(&run, task, from, Until::CaughtUp));
    let mut frames = Vec::new();
    while let Some(item) = output.next().await {
        frames.push(item?);
    }
    Ok(frames)
}

async fn flooded(scene: &mut Scene) -> anyhow::Result<()> {
    const FLOODS: u64 = 8;
    const LINES: u64 = 450_000;
    scene.moment(5, 20).await;
    // One that has room for 64 messages and reads none while they come.
    let nats = async_nats::ConnectOptions::new()
        .subscription_capacity(64)
        .connect(scene.world.nats.url())
        .await?;
    let broker = scene.client().broker().clone();
    let subjects = broker.subjects();
    let (tenant, run) = (
        scene.client().tenant().clone(),
        scene.client().run_id().clone(),
    );
    let live = subjects.live(&subjects.results_of_run(&tenant, &run));
    let mut small = nats.subscribe(live).await?;
    nats.flush().await?;
    // And everything that the submitters read comes slowly for a while.
    scene.world.proxies(Who::Clients)?.nats.set(Rules {
        rate: Some(200_000),
        ..Rules::default()
    });
    for flood in 0..FLOODS {
        let first = 50_000_000 + flood * 1_000_000;
        let work = Work::Output {
            first,
            last: first + LINES,
        };
        scene.load.add(added(work, None, true))?;
    }
    tokio::time::sleep(Duration::from_secs(8)).await;
    scene.world.proxies(Who::Clients)?.nats.heal();
    let goal = scene.world.shape().load.tasks / 2;
    scene
        .until("half of the load's ends", |counts| counts.ended >= goal)
        .await?;
    let mut got = 0;
    while let Some(Some(_)) = small.next().now_or_never() {
        got += 1;
    }
    let name = broker.streams().results.clone();
    let stream = broker.jetstream().get_stream(name).await?;
    let stored = stream.cached_info().state.messages;
    scene.note(format!(
        "{got} of {stored} live copies reached the small reader"
    ));
    Ok(())
}

async fn cancel_race(scene: &mut Scene) -> anyhow::Result<()> {
    // Bounded, or the queue would decide and not the race.
    const AT_ONCE: usize = 24;
    let races = if scene.full { 10_000 } else { 300 };
    for race in 0..races {
        let open = {
            let counts = scene.load.notebook.counts();
            let counts = *counts.borrow();
            counts.accepted.saturating_sub(counts.ended)
        };
        if open >= AT_ONCE {
            let limit = scene.load.notebook.counts().borrow().ended + 1;
            scene
                .until("end of a race", |counts| counts.ended >= limit)
                .await?;
        }
        let work = Work::Sleep {
            mark: 70_000_000 + race,
            time: scene.random.millis(0, 60),
        };
        // Around the time that a task takes.
        let after = scene.random.millis(0, 200);
        scene.load.add(added(work, Some(after), false))?;
        tokio::task::yield_now().await;
        scene.wait(0, 20).await;
    }
    let seen = scene.load.notebook.all();
    let cancelled = seen
        .iter()
        .filter_map(|seen| seen.terminal.as_ref())
        .filter(|terminal| terminal.outcome == broker_schema::Outcome::Cancelled)
        .count();
    scene.note(format!("{races} races, {cancelled} cancelled up to now"));
    Ok(())
}

async fn pullers(scene: &mut Scene) -> anyhow::Result<()> {
    const PULLERS: usize = 700;
    scene.moment(10, 30).await;
    let client = scene.client().clone();
    let broker = client.broker();
    let name_of_stream = broker.streams().requests.clone();
    let stream = broker.jetstream().get_stream(&name_of_stream).await?;
    let mut names = stream.consumer_names();
    let mut pulls = Vec::new();
    while let Some(name) = names.next().await {
        let name = name?;
        if !name.starts_with("lane-") {
            continue;
        }
        let nats = async_nats::connect(scene.world.nats.url()).await?;
        for _ in 0..PULLERS {
            let inbox = nats.new_inbox();
            let answers = nats.subscribe(inbox.clone()).await?;
            let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{name_of_stream}.{name}");
            let request = serde_json::json!({"batch": 1, "expires": 5_000_000_000_u64});
            nats.publish_with_reply(subject, inbox, request.to_string().into())
                .await?;
            pulls.push((nats.clone(), answers));
        }
    }
    let count = pulls.len();
    let (mut returned, mut refused) = (0, 0);
    let until = tokio::time::Instant::now() + Duration::from_secs(6);
    while tokio::time::Instant::now() < until {
        for (nats, answers) in &mut pulls {
            while let Some(Some(message)) = answers.next().now_or_never() {
                match (message.status, message.reply) {
                    (None, Some(reply)) => {
                        nats.publish(reply, "-NAK".into()).await?;
                        returned += 1;
                    }
                    _ => refused += 1,
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    scene.note(format!(
        "{count} pulls: {returned} given back, {refused} told to go"
    ));
    scene.demand(count >= PULLERS, "no consumer to pull from was found");
    Ok(())
}
