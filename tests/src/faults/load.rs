//! Submits a plan, reads what becomes of it, and keeps what was seen.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use broker_schema::{FrameKind, PoolId, TaskId, TaskRequest, Terminal};
use remuda_client::{Client, ClientError, OutputEvent};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::plan::{Expected, Plan, PlannedTask};
use super::session;
use super::world::World;

/// Between two tries at something that a fault prevents.
pub(super) const PAUSE: Duration = Duration::from_millis(200);

/// What was seen of one task.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) task: TaskId,
    pub(crate) what: String,
    /// Of a session: its number.
    pub(crate) session: Option<usize>,
    pub(crate) expected: Expected,
    pub(crate) retries: u8,
    /// Somebody asked for its end.
    pub(crate) cancelled: bool,
    /// What was submitted, where it can be submitted again.
    pub(crate) request: Option<TaskRequest>,
    /// When the stream said that it has it.
    pub(crate) accepted: Option<Instant>,
    pub(crate) terminal: Option<Terminal>,
    pub(crate) ended: Option<Instant>,
    /// What its reader got while it ran.
    pub(crate) streamed: Option<Vec<u8>>,
    /// What is wrong and will not pass.
    pub(crate) error: Option<String>,
}

/// How far a load is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) accepted: usize,
    pub(crate) ended: usize,
}

/// Everything that was seen. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Notebook {
    seen: Arc<Mutex<Vec<Seen>>>,
    counts: watch::Sender<Counts>,
}

impl Default for Notebook {
    fn default() -> Self {
        Self {
            seen: Arc::default(),
            counts: watch::Sender::new(Counts::default()),
        }
    }
}

/// A task's line in the notebook.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line(usize);

impl Notebook {
    fn lock(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a task's line.
    pub(crate) fn open(&self, task: TaskId, what: String, expected: Expected, retries: u8) -> Line {
        let mut seen = self.lock();
        seen.push(Seen {
            task,
            what,
            session: None,
            expected,
            retries,
            cancelled: false,
            request: None,
            accepted: None,
            terminal: None,
            ended: None,
            streamed: None,
            error: None,
        });
        Line(seen.len() - 1)
    }

    pub(crate) fn update(&self, line: Line, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.lock().get_mut(line.0) {
            change(seen);
        }
    }

    pub(crate) fn accepted(&self, line: Line) {
        self.update(line, |seen| seen.accepted = Some(Instant::now()));
        self.counts.send_modify(|counts| counts.accepted += 1);
    }

    /// It was not accepted after all; when it was thought to be.
    pub(crate) fn take_back(&self, line: Line) -> Option<Instant> {
        self.lock().get_mut(line.0)?.accepted.take()
    }

    pub(crate) fn ended(&self, line: Line, terminal: Terminal) {
        self.update(line, |seen| {
            seen.terminal = Some(terminal);
            seen.ended = Some(Instant::now());
        });
        self.counts.send_modify(|counts| counts.ended += 1);
    }

    pub(crate) fn failed(&self, line: Line, error: &ClientError) {
        let text = chain(error);
        self.update(line, |seen| seen.error = Some(text));
        // Nothing more will come of it.
        self.counts.send_modify(|counts| counts.ended += 1);
    }

    pub(crate) fn counts(&self) -> watch::Receiver<Counts> {
        self.counts.subscribe()
    }

    pub(crate) fn all(&self) -> Vec<Seen> {
        self.lock().clone()
    }
}

/// An error and its sources.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Whether trying again may help: everything but what is wrong for good.
pub(super) fn passes(error: &ClientError) -> bool {
    match error {
        ClientError::Connect(source)
        | ClientError::Submit { source, .. }
        | ClientError::Terminal { source, .. }
        | ClientError::Output { source, .. }
        | ClientError::Results { source, .. } => source.retryable(),
        ClientError::Cancel { .. } => true,
        _ => false,
    }
}

/// A plan that is being submitted.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) notebook: Notebook,
    pub(crate) began: Instant,
    tasks: JoinSet<()>,
    clients: [Client; 2],
}

/// Who submits, and where it is written down.
#[derive(Debug, Clone)]
pub(super) struct Submitter {
    pub(super) client: Client,
    /// Somebody else with the same requests.
    pub(super) other: Client,
    pub(super) notebook: Notebook,
    pub(super) pool: PoolId,
    pub(super) began: Instant,
}

impl Load {
    /// Begins; everything goes on by itself.
    pub(crate) async fn start(world: &World, run: &str, plan: Plan) -> anyhow::Result<Self> {
        let clients = [world.client(run).await?, world.client(run).await?];
        let notebook = Notebook::default();
        let began = Instant::now();
        let submitter = Submitter {
            client: clients[0].clone(),
            other: clients[1].clone(),
            notebook: notebook.clone(),
            pool: "default".parse()?,
            began,
        };
        let mut tasks = JoinSet::new();
        for planned in plan.tasks {
            tasks.spawn(one(submitter.clone(), planned));
        }
        for (number, planned) in plan.sessions.into_iter().enumerate() {
            tasks.spawn(session::drive(submitter.clone(), number, planned));
        }
        Ok(Self {
            notebook,
            began,
            tasks,
            clients,
        })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.clients[0]
    }

    /// One more task, beside the plan.
    pub(crate) fn add(&mut self, planned: PlannedTask) -> anyhow::Result<()> {
        let submitter = Submitter {
            client: self.clients[0].clone(),
            other: self.clients[1].clone(),
            notebook: self.notebook.clone(),
            pool: "default".parse()?,
            began: self.began,
        };
        self.tasks.spawn(one(submitter, planned));
        Ok(())
    }

    /// Submits everything once more that was submitted up to now, as somebody
    /// does who does not know what became of it; how much that was.
    pub(crate) async fn resubmit(&self) -> usize {
        let requests = self.notebook.all().into_iter();
        let mut count = 0;
        for request in requests.filter_map(|seen| seen.request) {
            while let Err(error) = self.clients[1].submit(request.clone()).await {
                if !passes(&error) {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
            count += 1;
        }
        count
    }

    /// Waits until everything has ended, at most for `patience`; whether it has.
    pub(crate) async fn finish(&mut self, patience: Duration) -> bool {
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                if let Err(error) = ended
                    && error.is_panic()
                {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
        };
        tokio::time::timeout(patience, all).await.is_ok()
    }
}

/// One task, from its moment to its terminal.
async fn one(submitter: Submitter, planned: PlannedTask) {
    tokio::time::sleep_until(submitter.began + planned.at).await;
    let request = TaskRequest {
        priority: planned.priority,
        ..planned.work.request(&submitter.client, &submitter.pool)
    };
    let line = submitter.notebook.open(
        request.id,
        format!("{:?}", planned.work),
        planned.work.expected(),
        planned.work.retries(),
    );
    let kept = request.clone();
    submitter
        .notebook
        .update(line, |seen| seen.request = Some(kept));
    if planned.streamed {
        stream(&submitter, line, request, planned.cancel_after).await;
        return;
    }
    let mut submitted = loop {
        match submitter.client.submit(request.clone()).await {
            Ok(submitted) => break submitted,
            Err(error) if passes(&error) => tokio::time::sleep(PAUSE).await,
            Err(error) => return submitter.notebook.failed(line, &error),
        }
    };
    submitter.notebook.accepted(line);
    if planned.twice {
        // What comes of this one does not matter: the first is followed.
        let _ = submitter.other.submit(request.clone()).await;
    }
    let terminal = async {
        loop {
            match submitted.terminal().await {
                Err(error) if passes(&error) => tokio::time::sleep(PAUSE).await,
                done => return done,
            }
        }
    };
    let cancel = cancel(&submitter, line, &request, planned.cancel_after);
    tokio::pin!(cancel);
    let ended = tokio::select! {
        ended = terminal => ended,
        () = &mut cancel => return,
    };
    match ended {
        Ok(terminal) => submitter.notebook.ended(line, terminal),
        Err(error) => submitter.notebook.failed(line, &error),
    }
}

/// Asks for the end of a task when it is time, until somebody has heard it.
/// Never returns: the terminal decides.
async fn cancel(submitter: &Submitter, line: Line, request: &TaskRequest, after: Option<Duration>) {
    if let Some(after) = after {
        tokio::time::sleep(after).await;
        submitter
            .notebook
            .update(line, |seen| seen.cancelled = true);
        let ask = || {
            submitter
                .client
                .cancel(request.id, Some(request.run.clone()))
        };
        while ask().await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }
    std::future::pending::<()>().await;
}

/// The same with its output read while it runs. A reader that fails reads
/// again from the beginning: the request is the same.
async fn stream(submitter: &Submitter, line: Line, request: TaskRequest, after: Option<Duration>) {
    let notebook = &submitter.notebook;
    let reading = async {
        let mut accepted = false;
        loop {
            let mut output = match submitter.client.stream(request.clone()).await {
                Ok(output) => output,
                Err(error) if passes(&error) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Err(error) => return notebook.failed(line, &error),
            };
            if !std::mem::replace(&mut accepted, true) {
                notebook.accepted(line);
            }
            let mut read = Vec::new();
            while let Some(event) = output.next().await {
                match event {
                    Ok(OutputEvent::Output {
                        kind: FrameKind::Stdout,
                        bytes,
                        ..
                    }) => read.extend_from_slice(&bytes),
                    Ok(OutputEvent::Reset { .. }) => read.clear(),
                    Ok(OutputEvent::Done(terminal)) => {
                        notebook.update(line, |seen| seen.streamed = Some(read));
                        return notebook.ended(line, *terminal);
                    }
                    Ok(_) => {}
                    Err(error) if passes(&error) => break,
                    Err(error) => return notebook.failed(line, &error),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = reading => {}
        () = cancel(submitter, line, &request, after) => {}
    }
}
