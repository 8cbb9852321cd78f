//! `remuda results`: the terminals of a run as JSON lines.

use broker_schema::{RunId, Terminal};
use futures::StreamExt as _;
use remuda_client::Until;
use serde::Serialize;

use crate::connect;
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;

const EXAMPLES: &str = "\
Examples:
  remuda results first | jq -r .outcome
  remuda results first --follow --from 1001";

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
    /// The first sequence to read: the last one read plus one
    #[arg(long, value_name = "SEQ", value_parser = clap::value_parser!(u64).range(1..))]
    from: Option<u64>,
}

#[derive(Serialize)]
struct Numbered<'a> {
    seq: u64,
    #[serde(flatten)]
    terminal: &'a Terminal,
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let client = connect::client(globals, args.run.clone()).await?;
    let until = if args.follow {
        Until::Dropped
    } else {
        Until::CaughtUp
    };
    let mut results = Box::pin(client.results(&args.run, args.from, until));
    let mut any = false;
    while let Some(item) = results.next().await {
        let (seq, terminal) = item.map_err(|error| connect::failure(&error))?;
        any = true;
        out::json(&Numbered {
            seq,
            terminal: &terminal,
        })?;
    }
    if !any {
        out::note(format_args!("no results of run {} from there on", args.run));
    }
    Ok(0)
}
