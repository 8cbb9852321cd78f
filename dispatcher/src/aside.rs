//! What stands in TERM for a task and is no terminal: nobody can read it, and nothing else can be
//! stored in its place. It goes to the dead letters, and the gate is open again.

use broker_schema::codec::Format;
use broker_schema::{TaskRequest, Terminal};
use remuda_client::broker::BrokerError;
use remuda_telemetry::TraceHeaders;

use crate::fleet::{DeadLetter, Fleet};

impl Fleet {
    /// The task's terminal, where it has one that can be read.
    pub(crate) async fn terminal_of(
        &self,
        request: &TaskRequest,
    ) -> Result<Option<Terminal>, BrokerError> {
        let TaskRequest {
            tenant, run, id, ..
        } = request;
        match self.broker.terminal_of(tenant, run, *id).await {
            Err(BrokerError::Unreadable { .. }) => {
                self.set_aside(request).await?;
                self.broker.terminal_of(tenant, run, *id).await
            }
            done => done,
        }
    }

    async fn set_aside(&self, request: &TaskRequest) -> Result<(), BrokerError> {
        let TaskRequest {
            tenant, run, id, ..
        } = request;
        let found = self.broker.unreadable_terminal(tenant, run, *id).await?;
        let Some((sequence, payload, error)) = found else {
            return Ok(());
        };
        let letter = DeadLetter {
            id: format!("term/{sequence}"),
            code: error.code,
            reason: format!("stood in the place of a terminal: {error}"),
            subject: self.broker.subjects().terminal(tenant, run, *id),
            task: Some(*id),
            format: Format::default(),
            payload,
            trace: TraceHeaders::default(),
        };
        self.dead_letter((tenant, &request.pool), letter).await?;
        let stream = &self.broker.streams().terminals;
        self.broker.delete_stored(stream, sequence).await?;
        Ok(())
    }
}
