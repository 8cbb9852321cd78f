//! Cancelling: a task, a group, a run.

use std::time::Duration;

use async_nats::{Request, RequestErrorKind};
use broker_schema::codec::{self, Format};
use broker_schema::{CancelRequest, ErrorInfo, GroupId, HEADER_CONTENT_TYPE, RunId, TaskId};
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
    /// It is being ended; its terminal tells who was first. What is said of a
    /// group and of a run, whose tasks end one by one.
    Cancelling,
    /// It had ended before.
    Finished,
    /// Nobody knows it yet; should it turn up, it is cancelled.
    Unknown,
}

/// The answer to a [`CancelRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReply {
    pub state: CancelState,
    /// Why nothing came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorInfo>,
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
        let request = CancelRequest::task(self.shared.tenant.clone(), task, run);
        let failed = |detail| ClientError::Cancel { task, detail };
        self.ask_to_cancel(&request).await.map_err(failed)
    }

    /// Asks for the end of a group: of what waits, what runs, and what comes
    /// later under its name. Its sessions close.
    #[tracing::instrument(skip_all, fields(%run, %group))]
    pub async fn cancel_group(
        &self,
        run: &RunId,
        group: &GroupId,
    ) -> Result<CancelState, ClientError> {
        let tenant = self.shared.tenant.clone();
        let request = CancelRequest::group(tenant, run.clone(), group.clone());
        let run = run.clone();
        let failed = |detail| ClientError::CancelRun { run, detail };
        self.ask_to_cancel(&request).await.map_err(failed)
    }

    /// Asks for the end of a run: of what waits, what runs, and what comes
    /// later under its name. Its sessions close.
    #[tracing::instrument(skip_all, fields(%run))]
    pub async fn cancel_run(&self, run: &RunId) -> Result<CancelState, ClientError> {
        let request = CancelRequest::run(self.shared.tenant.clone(), run.clone());
        let run = run.clone();
        let failed = |detail| ClientError::CancelRun { run, detail };
        self.ask_to_cancel(&request).await.map_err(failed)
    }

    async fn ask_to_cancel(&self, request: &CancelRequest) -> Result<CancelState, String> {
        let broker = &self.shared.broker;
        let payload =
            codec::encode(request, Format::MessagePack).map_err(|error| error.to_string())?;
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
                        "no dispatcher is running, start one".to_owned()
                    }
                    RequestErrorKind::TimedOut => {
                        format!("no dispatcher answered within {TIMEOUT:?}")
                    }
                    _ => error.to_string(),
                })?;
        let reply = format_of(reply.headers.as_ref())
            .and_then(|format| codec::decode::<CancelReply>(&reply.payload, format))
            .map_err(|info| format!("the dispatcher's answer cannot be read: {info}"))?;
        match reply.error {
            Some(error) => Err(error.to_string()),
            None => Ok(reply.state),
        }
    }
}
