//! Follows one task: its output to ours as it comes, Ctrl-C to its end.

use broker_schema::{FrameKind, TaskRequest, Terminal};
use remuda_client::{CancelState, Client, OutputEvent};

use crate::connect;
use crate::failure::{Failure, exit};
use crate::out;
use crate::up::Stop;

/// Submits a task, writes its output to ours byte for byte, and waits for its
/// terminal. Told to stop, it cancels the task; told again, it leaves.
pub(crate) async fn follow(
    client: &Client,
    request: TaskRequest,
    show: bool,
) -> Result<Terminal, Failure> {
    let (task, run) = (request.id, request.run.clone());
    let mut stop = Stop::listen()?;
    let mut output = {
        let submitting = client.stream(request);
        tokio::select! {
            biased;
            // Not known to be accepted, so it is cancelled where it turns up.
            () = stop.told() => {
                let _ = client.cancel(task, Some(run)).await;
                return Err(Failure::silent(exit::INTERRUPTED));
            }
            output = submitting => output.map_err(|error| connect::failure(&error))?,
        }
    };
    let mut told = false;
    loop {
        let event = tokio::select! {
            biased;
            () = stop.told() => {
                if told {
                    return Err(Failure::silent(exit::INTERRUPTED));
                }
                told = true;
                cancel(client, task, run.clone()).await;
                continue;
            }
            event = output.next() => event,
        };
        let event = event
            .ok_or_else(|| Failure::new("the output ended without a terminal"))?
            .map_err(|error| connect::failure(&error))?;
        let written = match event {
            OutputEvent::Output { bytes, kind, .. } if show => match kind {
                FrameKind::Stderr => out::error_bytes(&bytes),
                _ => out::bytes(&bytes),
            },
            OutputEvent::Reset { attempt } if show => {
                out::note(format_args!(
                    "remuda: attempt {attempt} starts over, what came before is void"
                ));
                Ok(())
            }
            OutputEvent::Done(terminal) => return Ok(*terminal),
            _ => Ok(()),
        };
        if let Err(failure) = written {
            // Nobody reads it: nobody wants it to run on.
            let _ = client.cancel(task, Some(run)).await;
            return Err(failure);
        }
    }
}

async fn cancel(client: &Client, task: broker_schema::TaskId, run: broker_schema::RunId) {
    match client.cancel(task, Some(run)).await {
        Ok(CancelState::Finished) => {}
        Ok(_) => out::note("remuda: cancelling; once more leaves at once"),
        Err(error) => out::note(connect::failure(&error)),
    }
}
