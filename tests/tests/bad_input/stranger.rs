//! Somebody who speaks the protocol with a plain NATS client.

use async_nats::HeaderMap;
use async_nats::jetstream;
use broker_schema::{Step, TaskId, Terminal};
use remuda_client::Client;
use remuda_tests::fleet::Fleet;
use remuda_tests::wait::eventually;
use serde_json::Value;

use super::PATIENCE;

/// A stranger: a plain NATS client that speaks JSON, and gets it wrong.
pub(crate) struct Stranger {
    pub(crate) jetstream: jetstream::Context,
    /// Reads the answers.
    pub(crate) client: Client,
}

/// What is sent instead of a good request.
pub(crate) struct Sent {
    pub(crate) task: TaskId,
    pub(crate) run: String,
    pub(crate) subject: String,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Vec<u8>,
}

impl Stranger {
    pub(crate) async fn of(fleet: &Fleet, run: &str) -> Self {
        let nats = async_nats::connect(fleet.nats()).await.unwrap();
        Self {
            jetstream: jetstream::new(nats),
            client: fleet.client(run).await.unwrap(),
        }
    }

    /// A good request, and all that goes with it.
    pub(crate) fn good(&self) -> (Value, Sent) {
        let pool = "default".parse().unwrap();
        let request = self.client.task(&pool, vec![Step::command(["true"])]);
        let mut headers = HeaderMap::new();
        headers.insert("Content-Type", "application/json");
        headers.insert("Nats-Msg-Id", request.message_id().as_str());
        let sent = Sent {
            task: request.id,
            run: request.run.to_string(),
            subject: "remuda.req.default.default".into(),
            headers,
            payload: Vec::new(),
        };
        (serde_json::to_value(&request).unwrap(), sent)
    }

    pub(crate) async fn publish(&self, sent: &Sent) -> Result<(), String> {
        let publishing = self.jetstream.publish_with_headers(
            sent.subject.clone(),
            sent.headers.clone(),
            sent.payload.clone().into(),
        );
        let ack = publishing.await.map_err(|error| format!("{error:?}"))?;
        ack.await.map(drop).map_err(|error| format!("{error:?}"))
    }

    pub(crate) async fn terminal(&self, sent: &Sent) -> Terminal {
        let broker = self.client.broker();
        let (tenant, run) = (self.client.tenant(), sent.run.parse().unwrap());
        let what = format!("terminal of {} in run {}", sent.subject, sent.run);
        eventually(&what, PATIENCE, async || {
            match broker.terminal_of(tenant, &run, sent.task).await {
                Ok(Some(terminal)) => Ok(terminal),
                other => Err(format!("{other:?}")),
            }
        })
        .await
        .unwrap()
    }
}
