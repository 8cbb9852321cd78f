//! `remuda cancel`: asks for the end of a task.

use broker_schema::{RunId, TaskId};
use remuda_client::CancelState;

use crate::connect;
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;

/// Cancels a task; its terminal tells whether it ended first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The task's id
    task: TaskId,
    /// The task's run: lets one that nobody has seen yet end at once
    #[arg(long, value_name = "RUN")]
    run: Option<RunId>,
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let client = connect::client(globals, connect::fresh_run()?).await?;
    let state = client
        .cancel(args.task, args.run)
        .await
        .map_err(|error| connect::failure(&error))?;
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
