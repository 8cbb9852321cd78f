//! What a running command says, from either kind of sandbox.

use remuda_proto::v1;
use remuda_proto::v1::execute_event::Event;
use tokio::sync::mpsc;

use crate::sidecar_client::CallError;

/// The events of one command in order. Dropping it kills the command.
#[derive(Debug)]
pub struct Events {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Sidecar(Box<tonic::Streaming<v1::ExecuteEvent>>),
    Fake(mpsc::Receiver<Result<Event, CallError>>),
}

impl Events {
    pub(super) fn sidecar(stream: tonic::Streaming<v1::ExecuteEvent>) -> Self {
        Self {
            source: Source::Sidecar(Box::new(stream)),
        }
    }

    pub(super) fn fake(events: mpsc::Receiver<Result<Event, CallError>>) -> Self {
        Self {
            source: Source::Fake(events),
        }
    }

    /// The next event; cancel-safe. An end before `Exited` is an error.
    pub async fn next(&mut self) -> Result<Event, CallError> {
        let ended = || CallError::Lost {
            call: "Execute",
            reason: "the stream ended before the command's exit".into(),
        };
        match &mut self.source {
            Source::Sidecar(stream) => match stream.message().await {
                Ok(Some(v1::ExecuteEvent { event: Some(event) })) => Ok(event),
                Ok(Some(v1::ExecuteEvent { event: None })) => Err(CallError::Nonsense {
                    call: "Execute",
                    reason: "an event without content".into(),
                }),
                Ok(None) => Err(ended()),
                Err(status) => Err(CallError::from_status("Execute", &status)),
            },
            Source::Fake(events) => events.recv().await.unwrap_or_else(|| Err(ended())),
        }
    }
}
