//! `remuda task submit`: the tasks of a file, one after the other.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use broker_schema::{Outcome, PoolId, RunId, Step, StepResult, TaskRequest, Terminal};
use remuda_client::Client;

use crate::connect;
use crate::ending;
use crate::failure::{Failure, exit};
use crate::globals::Globals;
use crate::live;
use crate::out;
use crate::quantile::human;
use crate::table::{Align, Table};
use crate::task_file::{self, TaskDoc};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Runs the tasks of a YAML or JSON file, one after the other
    Submit(Args),
}

const EXAMPLE: &str = "\
Example of a file:
  name: greet
  timeout: 10s
  retries: 2           # further attempts, each in a fresh sandbox
  ttlSecondsAfterFinished: 3600   # its results are removed after an hour
  steps:
    - {type: FilePatch, path: hello.py, content: \"print('hi')\"}
    - {type: Command, command: [python3, hello.py]}

Exits with 1 unless every task succeeds.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The file; - is standard input
    file: PathBuf,
    /// The pool of tasks that name none [default: default]
    #[arg(long, value_name = "POOL", env = "REMUDA_POOL")]
    pool: Option<PoolId>,
    /// The run of tasks that name none [default: one of its own]
    #[arg(long, value_name = "RUN")]
    run: Option<RunId>,
    /// text: live output and a summary; json: each terminal as one line
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// More than any file of tasks has.
const MOST_FILE_BYTES: u64 = 64 << 20;

pub(crate) async fn run(command: Command, globals: &Globals) -> Result<u8, Failure> {
    let Command::Submit(args) = command;
    let text = read(&args.file)?;
    let file = args.file.display().to_string();
    let docs = task_file::parse(&file, &text)
        .map_err(|error| Failure::chain(&error).code(broker_schema::ErrorCode::InvalidField))?;
    let own_run = args.run.clone().map_or_else(connect::fresh_run, Ok)?;
    let client = connect::client(globals, own_run).await?;
    let mut failed = false;
    for doc in docs {
        failed |= submit(&client, doc, &args).await? != Outcome::Succeeded;
    }
    Ok(if failed { exit::FAILED } else { 0 })
}

async fn submit(client: &Client, doc: TaskDoc, args: &Args) -> Result<Outcome, Failure> {
    for note in &doc.notes {
        out::note(format_args!("note: {note}"));
    }
    let name = doc.name.clone();
    let steps: Vec<Step> = doc.steps.clone();
    let request = request(client, doc, args)?;
    let text = args.output == Format::Text;
    let terminal = live::follow(client, request, text).await?;
    if text {
        tell(name.as_deref(), &steps, &terminal);
    } else {
        out::json(&terminal)?;
    }
    Ok(terminal.outcome)
}

fn request(client: &Client, doc: TaskDoc, args: &Args) -> Result<TaskRequest, Failure> {
    let pool = match doc.pool.or_else(|| args.pool.clone()) {
        Some(pool) => pool,
        None => PoolId::new("default").map_err(|error| Failure::chain(&error))?,
    };
    let client = match doc.run {
        Some(run) => client.with_run(run),
        None => client.clone(),
    };
    let mut request = client.task(&pool, doc.steps);
    request.priority = doc.priority;
    request.timeout_ms = doc.timeout_ms;
    request.continue_on_failure = doc.continue_on_failure;
    request.env = doc.env;
    request.retries = doc.retries;
    request.ttl_seconds_after_finished = doc.ttl_seconds_after_finished;
    Ok(request)
}

fn read(path: &Path) -> Result<String, Failure> {
    let name = path.display();
    let failed = |error: std::io::Error| {
        Failure::because(format_args!("{name} cannot be read"), &error)
            .mend("give a YAML or JSON file of tasks, or - for standard input")
    };
    let mut text = String::new();
    let source: Box<dyn std::io::Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(failed)?)
    };
    source
        .take(MOST_FILE_BYTES)
        .read_to_string(&mut text)
        .map_err(failed)?;
    Ok(text)
}

fn tell(name: Option<&str>, steps: &[Step], terminal: &Terminal) {
    out::note(summary(steps, terminal));
    for text in [ending::tell_dropped(terminal), ending::tell(terminal)]
        .into_iter()
        .flatten()
    {
        out::note(text);
    }
    let wall = Duration::from_micros(terminal.usage.wall_us);
    let attempts = match terminal.attempt {
        0 | 1 => String::new(),
        attempt => format!(" in attempt {attempt}"),
    };
    out::note(format_args!(
        "{}: {}{attempts} after {}, task {}",
        name.unwrap_or("task"),
        terminal.outcome,
        human(wall.as_micros() as u64),
        terminal.task
    ));
}

/// One row for each step that the file has.
fn summary(steps: &[Step], terminal: &Terminal) -> Table {
    let mut table = Table::new([
        ("STEP", Align::Left),
        ("TYPE", Align::Left),
        ("EXIT", Align::Right),
        ("WALL", Align::Right),
        ("STDOUT", Align::Right),
        ("STDERR", Align::Right),
    ]);
    for (index, step) in steps.iter().enumerate() {
        let name = if step.name.is_empty() {
            index.to_string()
        } else {
            step.name.clone()
        };
        let kind = step.action.name().to_owned();
        let (ended, numbers) = match terminal.steps.get(index) {
            Some(result) => (exit_of(result), numbers(result)),
            None => ("not run".to_owned(), Default::default()),
        };
        let [wall, stdout, stderr] = numbers;
        table.row([name, kind, ended, wall, stdout, stderr]);
    }
    table
}

fn numbers(result: &StepResult) -> [String; 3] {
    [
        human(result.usage.wall_us),
        result.stdout.bytes.to_string(),
        result.stderr.bytes.to_string(),
    ]
}

fn exit_of(result: &StepResult) -> String {
    if result.timed_out {
        "timed out".to_owned()
    } else if result.oom_killed {
        "out of memory".to_owned()
    } else {
        match result.exit.signal {
            Some(signal) => format!("signal {signal}"),
            None => result.exit.code.to_string(),
        }
    }
}
