//! Cancelling a task.

use std::time::Duration;

use async_nats::{Request, RequestErrorKind};
use broker_schema::codec::{self, Format};
use broker_schema::{CancelRequest, HEADER_CONTENT_TYPE, RunId, TaskId};
use remuda_telemetry::TraceHeaders;
use serde::{Deserialize, Serialize};

use crate::broker::format_of;
use crate::client::Client;
use crate::error::ClientError;

const TIMEOUT: Duration = Duration::from_secs(5);

/// What a cancellation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelState {
    /// Its terminal says cancelled.
    Cancelled,
    /// It runs and is being ended; its terminal tells who was first.
    Cancelling,
    /// It had ended before.
    Finished,
    /// Nobody knows it yet; should it turn up, it is cancelled.
    Unknown,
}

/// The answer to a [`CancelRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReply {
    pub state: CancelState,
}

impl Client {
    /// Asks for the end of a task. The terminal still decides: a task that
    /// finishes first has finished.
    #[tracing::instrument(skip_all, fields(%task))]
    pub async fn cancel(
        &self,
        task: TaskId,
        run: Option<RunId>,
    ) -> Result<CancelState, ClientError> {
        let failed = |detail: String| ClientError::Cancel { task, detail };
        let broker = &self.shared.broker;
        let request = CancelRequest {
            tenant: self.shared.tenant.clone(),
            task,
            run,
        };
        let payload = codec::encode(&request, Format::MessagePack)
            .map_err(|error| failed(error.to_string()))?;
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(HEADER_CONTENT_TYPE, Format::MessagePack.content_type());
        TraceHeaders::current().inject(|name, value| {
            if let Ok(value) = value.parse::<async_nats::HeaderValue>() {
                headers.insert(name, value);
            }
        });
        let request = Request::new()
            .payload(payload.into())
            .headers(headers)
            .timeout(Some(TIMEOUT));
        let subject = broker.subjects().cancel(&self.shared.tenant);
        let reply =
            broker
                .nats()
                .send_request(subject, request)
                .await
                .map_err(|error| match error.kind() {
                    RequestErrorKind::NoResponders => {
                        failed("no dispatcher is running, start one".to_owned())
                    }
                    RequestErrorKind::TimedOut => {
                        failed(format!("no dispatcher answered within {TIMEOUT:?}"))
                    }
                    _ => failed(error.to_string()),
                })?;
        format_of(reply.headers.as_ref())
            .and_then(|format| codec::decode::<CancelReply>(&reply.payload, format))
            .map(|reply| reply.state)
            .map_err(|info| failed(format!("the dispatcher's answer cannot be read: {info}")))
    }
}
