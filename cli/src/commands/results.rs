//! `remuda results`: the terminals of a run as JSON lines.

use std::time::Duration;

use broker_schema::{RunId, Terminal, Token};
use futures::StreamExt as _;
use remuda_client::{Client, ClientError, Until};
use serde::Serialize;

use crate::connect;
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;

const EXAMPLES: &str = "\
Examples:
  remuda results first | jq -r .outcome
  remuda results first --follow --from 1001
  remuda results first --durable rewards";

/// Prints the results of a run, one JSON object a line, each with the sequence
/// to go on from.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The run's name
    run: RunId,
    /// Wait for more when all that is there has been read
    #[arg(short, long)]
    follow: bool,
    /// The first sequence to read: the last one read plus one. Not after
    /// nats-server has lost its data: sequences begin anew then
    #[arg(long, value_name = "SEQ", value_parser = clap::value_parser!(u64).range(1..))]
    from: Option<u64>,
    /// Go on where the reader of this name left off; the server remembers where
    /// that was. A result may be printed again after a crash
    #[arg(long, value_name = "NAME", conflicts_with = "from", value_parser = Token::new)]
    durable: Option<Token>,
}

/// How long to wait for a result before looking whether there is any.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Numbered<'a> {
    seq: u64,
    #[serde(flatten)]
    terminal: &'a Terminal,
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let client = connect::client(globals, args.run.clone()).await?;
    let any = match &args.durable {
        Some(name) => by_name(&client, &args, name).await?,
        None => by_place(&client, &args).await?,
    };
    if !any {
        out::note(format_args!("no results of run {} from there on", args.run));
    }
    Ok(0)
}

async fn by_place(client: &Client, args: &Args) -> Result<bool, Failure> {
    let until = if args.follow {
        Until::Dropped
    } else {
        Until::CaughtUp
    };
    let mut results = Box::pin(client.results(&args.run, args.from, until));
    let mut any = false;
    while let Some(item) = results.next().await {
        match item {
            Ok((seq, terminal)) => print(seq, &terminal)?,
            Err(error) if error.unreadable() => tell_unreadable(&error),
            Err(error) => return Err(connect::failure(&error)),
        }
        any = true;
    }
    Ok(any)
}

async fn by_name(client: &Client, args: &Args, name: &Token) -> Result<bool, Failure> {
    let failure = |error: ClientError| connect::failure(&error);
    let mut reader = client.consume(&args.run, name).await.map_err(failure)?;
    let (mut any, mut more) = (false, args.follow);
    while more || reader.unread().await.map_err(failure)? {
        // Another process under this name may have what is left.
        let Ok(delivered) = tokio::time::timeout(LOOK_AGAIN, reader.next()).await else {
            continue;
        };
        let delivered = delivered.map_err(failure)?;
        match delivered.terminal() {
            Ok(terminal) => print(delivered.sequence(), &terminal)?,
            Err(error) => tell_unreadable(&error),
        }
        any = true;
        more = args.follow || delivered.pending() > 0;
        // Not before it is out of our hands.
        delivered.ack().await.map_err(failure)?;
    }
    reader.close().await;
    Ok(any)
}

fn print(seq: u64, terminal: &Terminal) -> Result<(), Failure> {
    out::json(&Numbered { seq, terminal })
}

fn tell_unreadable(error: &ClientError) {
    out::note(format_args!("left out: {}", remuda_telemetry::Chain(error)));
}
