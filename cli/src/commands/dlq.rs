//! `remuda dlq`: what nobody could act on, and its way back.

use std::time::{Duration, UNIX_EPOCH};

use broker_schema::{PoolId, RunId};
use remuda_client::Client;
use remuda_client::broker::{Body, Broker, BrokerError, DeadLetter, RequeueError, Requeued};
use serde_json::{Value, json};

use super::ps::Format;
use crate::connect;
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;
use crate::table::{Align, Table};

pub(super) const EXAMPLES: &str = "\
Examples:
  remuda dlq list --all-tenants
  remuda dlq show 17
  remuda dlq requeue 17 18
  remuda dlq requeue --all --pool py";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists dead letters, the oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// Most to list
        #[arg(long, value_name = "N", default_value = "1000")]
        limit: usize,
        /// How to print it
        #[arg(short, long, value_name = "FORMAT", default_value = "table")]
        output: Format,
        /// The same as `--output json`: one object a line
        #[arg(long)]
        json: bool,
    },
    /// Shows one dead letter: why it is one, its headers, what it says
    Show {
        /// Its sequence, as `remuda dlq list` tells it
        #[arg(value_name = "SEQ")]
        sequence: u64,
        /// Write the payload's bytes and nothing else
        #[arg(long)]
        raw: bool,
    },
    /// Asks for their tasks again and takes them out
    ///
    /// A task that has its terminal keeps it and goes on under a new id, with all its attempts; the
    /// id is printed. A deadline that has passed begins anew.
    Requeue {
        /// Their sequences
        #[arg(
            value_name = "SEQ",
            required_unless_present = "all",
            conflicts_with = "all"
        )]
        sequences: Vec<u64>,
        /// All that `remuda dlq list` would list with the same filters
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        which: Which,
        /// Also what cannot be read, and tasks of sessions
        #[arg(long)]
        force: bool,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// Of every tenant, not only of --tenant
    #[arg(short = 'A', long)]
    all_tenants: bool,
    /// Of one pool
    #[arg(long, value_name = "POOL")]
    pool: Option<PoolId>,
}

pub(crate) async fn run(command: Command, globals: &Globals) -> Result<u8, Failure> {
    let client = connect::client(globals, connect::fresh_run()?).await?;
    match command {
        Command::List {
            which,
            limit,
            output,
            json,
        } => {
            list(
                &client,
                globals,
                &which,
                limit,
                json || output == Format::Json,
            )
            .await
        }
        Command::Show { sequence, raw } => show(client.broker(), sequence, raw).await,
        Command::Requeue {
            sequences,
            all,
            which,
            force,
            json,
        } => {
            let sequences = if all {
                let mut every = Letters::new(&client, globals, &which);
                let mut sequences = Vec::new();
                while let Some(letter) = every.next().await? {
                    sequences.push(letter.sequence);
                }
                sequences
            } else {
                sequences
            };
            requeue(client.broker(), &sequences, force, json).await
        }
    }
}

/// Dead letters one after the other: they may be large.
struct Letters<'a> {
    broker: &'a Broker,
    globals: &'a Globals,
    which: &'a Which,
    from: u64,
}

impl<'a> Letters<'a> {
    fn new(client: &'a Client, globals: &'a Globals, which: &'a Which) -> Self {
        Self {
            broker: client.broker(),
            globals,
            which,
            from: 1,
        }
    }

    async fn next(&mut self) -> Result<Option<DeadLetter>, Failure> {
        let tenant = (!self.which.all_tenants).then_some(&self.globals.tenant);
        let pool = self.which.pool.as_ref();
        let found = self
            .broker
            .next_dead_letter(tenant, pool, self.from)
            .await
            .map_err(|error| failure(&error))?;
        if let Some(letter) = &found {
            self.from = letter.sequence + 1;
        }
        Ok(found)
    }
}

async fn list(
    client: &Client,
    globals: &Globals,
    which: &Which,
    limit: usize,
    json: bool,
) -> Result<u8, Failure> {
    let mut letters = Letters::new(client, globals, which);
    let mut table = Table::new([
        ("SEQ", Align::Right),
        ("TIME", Align::Left),
        ("TENANT", Align::Left),
        ("POOL", Align::Left),
        ("TASK", Align::Left),
        ("CODE", Align::Left),
        ("REASON", Align::Left),
    ]);
    let mut listed = 0;
    while let Some(letter) = letters.next().await? {
        if listed == limit {
            out::note(format_args!("there are more: raise --limit {limit}"));
            break;
        }
        listed += 1;
        if json {
            out::json(&summary(&letter))?;
            continue;
        }
        table.row([
            letter.sequence.to_string(),
            time_of(&letter),
            letter.tenant.to_string(),
            letter.pool.to_string(),
            letter
                .task
                .map_or_else(|| "-".to_owned(), |task| task.to_string()),
            letter.code.clone(),
            shortened(&letter.reason, 80),
        ]);
    }
    match (listed, json) {
        (0, _) => {
            let whose = if which.all_tenants {
                "of any tenant".to_owned()
            } else {
                format!("of tenant {}, --all-tenants looks further", globals.tenant)
            };
            out::note(format_args!("no dead letters {whose}"));
        }
        (_, true) => {}
        (_, false) => out::line(table)?,
    }
    Ok(0)
}

async fn show(broker: &Broker, sequence: u64, raw: bool) -> Result<u8, Failure> {
    let letter = find(broker, sequence).await?;
    if raw {
        out::bytes(&letter.message.payload)?;
        return Ok(0);
    }
    let mut shown = summary(&letter);
    let headers: serde_json::Map<String, Value> = letter
        .message
        .headers
        .iter()
        .map(|(name, values)| {
            let values: Vec<&str> = values.iter().map(async_nats::HeaderValue::as_str).collect();
            (name.to_string(), json!(values.join(", ")))
        })
        .collect();
    shown["headers"] = Value::Object(headers);
    match letter.body() {
        Body::Request(request) => shown["request"] = json!(request),
        Body::Placement(placement) => shown["placement"] = json!(placement),
        Body::Unreadable(error) => {
            shown["unreadable"] = json!(error);
            let start = &letter.message.payload[..letter.message.payload.len().min(256)];
            shown["begins_with"] = json!(start.escape_ascii().to_string());
            shown["bytes"] = json!(letter.message.payload.len());
        }
    }
    let text = serde_json::to_string_pretty(&shown)
        .map_err(|error| Failure::because("the letter cannot be written as JSON", &error))?;
    out::line(text)?;
    Ok(0)
}

async fn requeue(
    broker: &Broker,
    sequences: &[u64],
    force: bool,
    json: bool,
) -> Result<u8, Failure> {
    if sequences.is_empty() {
        out::note("no dead letters to send again");
    }
    let mut refused = 0;
    for sequence in sequences {
        let letter = find(broker, *sequence).await?;
        match broker.requeue(&letter, force).await {
            Ok(requeued) if json => out::json(&requeued_json(&requeued))?,
            Ok(requeued) => out::line(told(&requeued))?,
            Err(error @ RequeueError::Broker { .. }) => return Err(Failure::chain(&error)),
            Err(error) => {
                refused += 1;
                let forced = matches!(
                    &error,
                    RequeueError::Refused { refusal, .. } if refusal.can_be_forced()
                );
                let mend = if forced { ", --force does it" } else { "" };
                out::note(format_args!("{error}{mend}"));
            }
        }
    }
    if refused > 0 {
        return Err(Failure::new(format!(
            "{refused} of {} dead letters stay",
            sequences.len()
        )));
    }
    Ok(0)
}

async fn find(broker: &Broker, sequence: u64) -> Result<DeadLetter, Failure> {
    let found = broker
        .dead_letter(sequence)
        .await
        .map_err(|error| failure(&error))?;
    found.ok_or_else(|| {
        Failure::new(format!("there is no dead letter {sequence}"))
            .mend("see `remuda dlq list --all-tenants`")
    })
}

fn told(requeued: &Requeued) -> String {
    let sequence = requeued.sequence;
    let run = requeued.run.as_ref().map_or("unknown", RunId::as_str);
    let deadline = if requeued.new_deadline {
        "; its deadline begins anew"
    } else {
        ""
    };
    match requeued.task {
        Some((old, new)) if old == new => {
            format!("{sequence}: task {new} of run {run} is queued again{deadline}")
        }
        Some((old, new)) => format!(
            "{sequence}: queued again as the new task {new} of run {run}: {old} has its terminal, \
             or is another request's id{deadline}"
        ),
        None => format!(
            "{sequence}: its bytes were published again to {}",
            requeued.subject
        ),
    }
}

fn requeued_json(requeued: &Requeued) -> Value {
    json!({
        "seq": requeued.sequence,
        "subject": requeued.subject,
        "task": requeued.task.map(|(_, new)| new),
        "was": requeued.task.map(|(old, _)| old),
        "run": requeued.run,
        "new_deadline": requeued.new_deadline,
    })
}

fn summary(letter: &DeadLetter) -> Value {
    json!({
        "seq": letter.sequence,
        "time": letter.time,
        "tenant": letter.tenant,
        "pool": letter.pool,
        "task": letter.task,
        "code": letter.code,
        "reason": letter.reason,
        "subject": letter.subject,
    })
}

fn time_of(letter: &DeadLetter) -> String {
    let since = Duration::from_micros(letter.time.0);
    // What comes from a header may be any number.
    UNIX_EPOCH
        .checked_add(since)
        .filter(|_| since < Duration::from_secs(200_000_000_000))
        .map_or_else(
            || letter.time.0.to_string(),
            |time| humantime::format_rfc3339_seconds(time).to_string(),
        )
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

fn failure(error: &BrokerError) -> Failure {
    Failure::chain(error).code(error.code())
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::TaskId;

    #[test]
    fn a_new_id_is_told() {
        let (old, new) = (TaskId::new(), TaskId::new());
        let mut requeued = Requeued {
            sequence: 4,
            subject: "remuda.req.a.b".to_owned(),
            task: Some((old, new)),
            run: Some("r1".parse().unwrap()),
            new_deadline: true,
        };
        let text = told(&requeued);
        assert!(
            text.contains(&new.to_string()) && text.contains(&old.to_string()),
            "{text}"
        );
        assert!(text.contains("deadline"), "{text}");
        requeued.task = Some((old, old));
        requeued.new_deadline = false;
        let text = told(&requeued);
        assert!(
            !text.contains("new task") && !text.contains("deadline"),
            "{text}"
        );
    }

    #[test]
    fn long_reasons_are_cut_between_characters() {
        assert_eq!(shortened("short", 80), "short");
        let cut = shortened(&"ä".repeat(100), 80);
        assert_eq!(cut.chars().count(), 80);
    }
}
