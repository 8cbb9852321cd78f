//! `remuda batch`: many tasks from a file of JSON lines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use broker_schema::{ErrorInfo, PoolId, RunId, TaskId, Terminal};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use remuda_client::{Client, ClientError, CreditStream, Pacer};
use remuda_lease::{LeaseOptions, LeaseStore};
use tokio::sync::mpsc;

use crate::batch::input::{Checked, InputError, Lines, check};
use crate::batch::line::{Defaults, Line};
use crate::batch::progress::{Counts, Progress};
use crate::batch::record::ResultLine;
use crate::batch::summary::Summary;
use crate::connect;
use crate::failure::{Failure, exit};
use crate::fleet::Fleet;
use crate::globals::Globals;
use crate::out;
use crate::up::Stop;

/// Runs the tasks of a file of JSON lines, each in a fresh sandbox
///
/// A line has "command": [..] or "steps": [..], and may have "tag" (any text,
/// which its result carries back), "files" ({path: content}), "env",
/// "timeout", "pool", "priority", `continue_on_failure`, "group", `group_size` and
/// `min_valid`. Results are JSON lines in the order in which tasks end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file; - is standard input, which is not checked beforehand
    file: PathBuf,
    /// The run that the results are kept under
    #[arg(long, value_name = "RUN")]
    run: RunId,
    /// The pool of lines that name none
    #[arg(
        long,
        value_name = "POOL",
        default_value = "default",
        env = "REMUDA_POOL"
    )]
    pool: PoolId,
    /// How long a task may take that does not say [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = super::run::parse_timeout)]
    timeout: Option<u64>,
    /// Most tasks that are submitted and have not ended
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    in_flight: u32,
    /// Keep no more tasks under way than keep --pool busy, by its credit
    #[arg(long)]
    paced: bool,
    /// Where results go instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Leave bad lines out instead of refusing them all
    #[arg(long)]
    keep_going: bool,
}

/// How often progress is shown, and how often the registry is asked.
const SHOW: Duration = Duration::from_millis(200);
const ASK: Duration = Duration::from_secs(1);
/// How long cancelling what is under way may take.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);
/// Lines that are read ahead.
const READ_AHEAD: usize = 64;

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let defaults = Defaults {
        tenant: globals.tenant.clone(),
        run: args.run.clone(),
        pool: args.pool.clone(),
        timeout_ms: args.timeout,
    };
    let checked = check_first(&args, &defaults).await?;
    let client = connect::client(globals, args.run.clone()).await?;
    let sink = Sink::open(args.out.as_deref())?;
    let pace = if args.paced {
        let credits = client.credits(&args.pool).await;
        Some(Pace {
            credits: credits.map_err(|error| connect::failure(&error))?,
            pacer: Pacer::new(args.in_flight as usize),
        })
    } else {
        None
    };
    let batch = Batch {
        client,
        sink,
        progress: Progress::start(checked.as_ref().map(|checked| checked.tasks)),
        counts: Counts {
            total: checked.map(|checked| checked.tasks),
            ..Counts::default()
        },
        summary: Summary::default(),
        under_way: HashSet::new(),
        bad_lines: 0,
        pace,
        args,
    };
    let lines = Lines::open(&batch.args.file, defaults).map_err(|error| Failure::chain(&error))?;
    Box::pin(batch.go(read_ahead(lines)?, globals)).await
}

/// Looks at a whole file before any of it is submitted. A stream cannot be
/// read twice.
async fn check_first(args: &Args, defaults: &Defaults) -> Result<Option<Checked>, Failure> {
    if args.file == Path::new("-") || !args.file.is_file() {
        return Ok(None);
    }
    let lines = Lines::open(&args.file, defaults.clone()).map_err(|e| Failure::chain(&e))?;
    let checked = tokio::task::spawn_blocking(move || check(lines))
        .await
        .map_err(|error| Failure::because("the file cannot be checked", &error))?
        .map_err(|error| Failure::chain(&error))?;
    for problem in &checked.problems {
        out::note(format_args!("error: {problem}"));
    }
    if checked.bad > 0 && !args.keep_going {
        return Err(Failure::new(format!(
            "{} of the lines cannot be submitted, so nothing was",
            checked.bad
        ))
        .code(broker_schema::ErrorCode::InvalidField)
        .mend("mend them, or leave them out with --keep-going"));
    }
    Ok(Some(checked))
}

/// Reads on a thread of its own, no further ahead than is needed.
fn read_ahead(lines: Lines) -> Result<mpsc::Receiver<Result<Line, InputError>>, Failure> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    std::thread::Builder::new()
        .name("batch-lines".to_owned())
        .spawn(move || {
            for line in lines {
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        })
        .map_err(|error| Failure::because("the reader cannot be started", &error))?;
    Ok(receiver)
}

struct Batch {
    args: Args,
    client: Client,
    sink: Sink,
    progress: Progress,
    counts: Counts,
    summary: Summary,
    under_way: HashSet<TaskId>,
    bad_lines: u64,
    pace: Option<Pace>,
}

/// How fast to submit.
struct Pace {
    credits: CreditStream,
    pacer: Pacer,
}

impl Pace {
    /// Waits for the next credit; for ever where nobody paces.
    async fn next(pace: &mut Option<Self>, under_way: usize) {
        let Some(pace) = pace else {
            return std::future::pending().await;
        };
        match pace.credits.next().await {
            Some(credit) => pace.pacer.observe(&credit, under_way),
            None => std::future::pending().await,
        }
    }
}

/// One task's end.
struct Ended {
    tag: Option<String>,
    task: TaskId,
    result: Result<Terminal, ClientError>,
}

impl Batch {
    async fn go(
        mut self,
        mut lines: mpsc::Receiver<Result<Line, InputError>>,
        globals: &Globals,
    ) -> Result<u8, Failure> {
        let mut stop = Stop::listen()?;
        let running = Running::watch(globals, self.args.run.clone()).await;
        let mut show = tokio::time::interval(SHOW);
        let mut tasks = FuturesUnordered::new();
        let mut reading = true;
        let mut refused = None;
        while reading || !tasks.is_empty() {
            let paced = self.pace.as_ref();
            let room = tasks.len() < self.args.in_flight as usize
                && paced.is_none_or(|pace| pace.pacer.allows(tasks.len()));
            let under_way = tasks.len();
            tokio::select! {
                biased;
                () = stop.told() => return self.interrupted().await,
                Some(ended) = tasks.next(), if !tasks.is_empty() => self.ended(ended)?,
                line = lines.recv(), if reading && room => match line {
                    Some(Ok(line)) => {
                        self.under_way.insert(line.request.id);
                        self.counts.submitted += 1;
                        tasks.push(run_one(self.client.clone(), line));
                    }
                    Some(Err(error)) => {
                        self.bad_lines += 1;
                        // In a file that was checked they have been told.
                        let fatal = !error.is_one_line() || !self.args.keep_going;
                        if fatal {
                            reading = false;
                            refused = Some(error);
                        } else if self.counts.total.is_none() {
                            self.progress.say(format_args!("error: {error}"));
                        }
                    }
                    None => reading = false,
                },
                () = Pace::next(&mut self.pace, under_way) => {}
                _ = show.tick() => {
                    self.counts.running = running.as_ref().and_then(Running::count);
                    self.progress.show(&self.counts);
                }
            }
        }
        self.sink.flush()?;
        self.summary.finish(self.progress.finish());
        out::note(&self.summary);
        if let Some(error) = refused {
            return Err(Failure::chain(&error)
                .code(broker_schema::ErrorCode::InvalidField)
                .mend("what stands before it was run, what follows was not"));
        }
        if self.bad_lines > 0 {
            out::note(format_args!("{} bad lines were left out", self.bad_lines));
        }
        let complete = self.summary.complete() && self.bad_lines == 0;
        Ok(if complete { 0 } else { exit::FAILED })
    }

    fn ended(&mut self, ended: Ended) -> Result<(), Failure> {
        self.under_way.remove(&ended.task);
        self.counts.submitted = self.counts.submitted.saturating_sub(1);
        self.counts.done += 1;
        let line = match ended.result {
            Ok(terminal) => {
                self.summary.add(&terminal);
                ResultLine::of(ended.tag, &terminal)
            }
            Err(error) => {
                self.summary.add_unknown();
                let told = remuda_telemetry::Chain(&error).to_string();
                self.progress.say(format_args!("error: {told}"));
                let info = ErrorInfo::new(error.code(), told);
                ResultLine::without_terminal(ended.tag, ended.task, info)
            }
        };
        let sink = &mut self.sink;
        self.progress.aside(|| sink.write(&line))
    }

    /// Nobody waits any more: what is under way is cancelled.
    async fn interrupted(mut self) -> Result<u8, Failure> {
        self.sink.flush()?;
        let left = self.under_way.len();
        let client = &self.client;
        let run = &self.args.run;
        let cancel = futures::stream::iter(std::mem::take(&mut self.under_way))
            .for_each_concurrent(64, |task| async move {
                if let Err(error) = client.cancel(task, Some(run.clone())).await {
                    tracing::debug!(%task, %error, "not cancelled");
                }
            });
        let cancelled = tokio::time::timeout(CANCEL_PATIENCE, cancel).await.is_ok();
        self.summary.finish(self.progress.finish());
        out::note(&self.summary);
        let how = if cancelled { "cancelled" } else { "left alone" };
        out::note(format_args!(
            "interrupted: {left} tasks under way were {how}; `remuda results {run}` shows all ends"
        ));
        Ok(exit::INTERRUPTED)
    }
}

async fn run_one(client: Client, line: Line) -> Ended {
    let task = line.request.id;
    let request = broker_schema::TaskRequest {
        submitted_at: broker_schema::Timestamp::now(),
        ..line.request
    };
    Ended {
        tag: line.tag,
        task,
        result: Box::pin(client.run(request)).await,
    }
}

/// Where result lines go.
enum Sink {
    Stdout,
    File {
        path: PathBuf,
        file: BufWriter<File>,
    },
}

impl Sink {
    fn open(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Ok(Self::Stdout);
        };
        let file = File::create(path).map_err(|error| {
            Failure::because(format_args!("{} cannot be written", path.display()), &error)
        })?;
        Ok(Self::File {
            path: path.to_owned(),
            file: BufWriter::new(file),
        })
    }

    fn write(&mut self, line: &ResultLine) -> Result<(), Failure> {
        match self {
            Self::Stdout => out::json(line),
            Self::File { path, file } => {
                let written = serde_json::to_writer(&mut *file, line)
                    .map_err(std::io::Error::from)
                    .and_then(|()| file.write_all(b"\n"));
                written.map_err(|error| lost(path, &error))
            }
        }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        match self {
            Self::Stdout => Ok(()),
            Self::File { path, file } => file.flush().map_err(|error| lost(path, &error)),
        }
    }
}

fn lost(path: &Path, error: &std::io::Error) -> Failure {
    Failure::because(format_args!("{} cannot be written", path.display()), error)
}

/// How many tasks of the run hold a sandbox, as the registry has it. A number
/// for people: where it cannot be had it is left out.
struct Running {
    count: Arc<Mutex<Option<u64>>>,
    _watch: AbortOnDrop,
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Running {
    async fn watch(globals: &Globals, run: RunId) -> Option<Self> {
        let fleet = Fleet::locate(globals).ok()?;
        let options = LeaseOptions {
            url: fleet.redis?,
            prefix: fleet.prefix,
            pool_size: 1,
            ..LeaseOptions::default()
        };
        let store = LeaseStore::connect(&options).await.ok()?;
        let tenant = globals.tenant.clone();
        let count = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&count);
        let watch = remuda_telemetry::task::spawn("batch running", async move {
            loop {
                let leases = store.leases().await.ok();
                *lock(&shared) = leases.map(|leases| {
                    let ours = leases
                        .iter()
                        .filter(|lease| lease.run == run && lease.tenant == tenant);
                    ours.count() as u64
                });
                tokio::time::sleep(ASK).await;
            }
        });
        Some(Self {
            count,
            _watch: AbortOnDrop(watch),
        })
    }

    fn count(&self) -> Option<u64> {
        *lock(&self.count)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
