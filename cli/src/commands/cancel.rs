//! `remuda cancel`: asks for the end of a task, a group or a run.

use broker_schema::{GroupId, RunId, TaskId};
use remuda_client::{CancelState, ClientError};

use crate::connect;
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;

const EXAMPLE: &str = "\
Examples:
  remuda cancel 0197a3c2-7d4e-7b1a-8f00-0123456789ab
  remuda cancel --run grpo-7 --group prompt-12
  remuda cancel --run grpo-7

A run or group that was cancelled takes no more tasks for six hours: use another
name for the next one. Its sessions close.";

/// Cancels a task, a group of a run, or a whole run
///
/// Queued tasks end at once, running ones with all their processes. A task's
/// terminal tells whether it ended first.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The task's id
    #[arg(required_unless_present = "run")]
    task: Option<TaskId>,
    /// The run. With a task: lets one that nobody has seen yet end at once;
    /// without: all of the run, or of the group
    #[arg(long, value_name = "RUN")]
    run: Option<RunId>,
    /// All tasks of this group of the run
    #[arg(long, value_name = "GROUP", requires = "run", conflicts_with = "task")]
    group: Option<GroupId>,
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let client = connect::client(globals, connect::fresh_run()?).await?;
    let asked: Result<CancelState, ClientError> = match (args.task, args.run, args.group) {
        (Some(task), run, _) => client.cancel(task, run).await,
        (None, Some(run), Some(group)) => client.cancel_group(&run, &group).await,
        (None, Some(run), None) => client.cancel_run(&run).await,
        (None, None, _) => return Err(Failure::usage("give a task, or --run RUN")),
    };
    let state = asked.map_err(|error| connect::failure(&error))?;
    out::line(match state {
        CancelState::Cancelled => "cancelled",
        CancelState::Cancelling => "cancelling",
        CancelState::Finished => "finished",
        CancelState::Unknown => "unknown",
    })?;
    if state == CancelState::Unknown {
        out::note("no such task was seen; should it turn up, it is cancelled");
    }
    Ok(0)
}
