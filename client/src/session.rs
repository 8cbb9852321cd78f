//! Sessions: one sandbox, many tasks, one hop to its worker.

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::{
    Placement, PoolId, SandboxRef, SessionOptions, Step, TaskRequest, Terminal, Timestamp,
};
use remuda_telemetry::TraceHeaders;

use crate::broker::{BrokerError, Outgoing};
use crate::client::Client;
use crate::error::ClientError;
use crate::track::Tracked;

/// What a task may take beyond its own time-out: waiting for the one before
/// it, and the reaper noticing that the worker is gone.
const GRACE: Duration = Duration::from_secs(60);

/// A sandbox that is ours until it is closed, or idles for too long.
#[derive(Debug, Clone)]
pub struct Session {
    client: Client,
    pool: PoolId,
    sandbox: SandboxRef,
}

impl Client {
    /// Leases a sandbox of a pool and keeps it.
    #[tracing::instrument(skip_all, fields(%pool))]
    pub async fn open_session(
        &self,
        pool: &PoolId,
        options: SessionOptions,
    ) -> Result<Session, ClientError> {
        let request = TaskRequest {
            keep_alive: Some(options),
            ..self.task(pool, Vec::new())
        };
        self.open_session_with(request).await
    }

    /// The same with a request of one's own: its steps run first, its
    /// `keep_alive` says how long the session may last.
    pub async fn open_session_with(
        &self,
        mut request: TaskRequest,
    ) -> Result<Session, ClientError> {
        request.keep_alive.get_or_insert_default();
        let pool = request.pool.clone();
        let terminal = self.run(request).await?;
        match (terminal.kept, &terminal.sandbox) {
            (true, Some(sandbox)) => Ok(self.session(pool, sandbox.clone())),
            _ => Err(ClientError::SessionRefused {
                pool,
                terminal: Box::new(terminal),
            }),
        }
    }

    /// A session that was opened elsewhere, by its address.
    pub fn session(&self, pool: PoolId, sandbox: SandboxRef) -> Session {
        Session {
            client: self.clone(),
            pool,
            sandbox,
        }
    }
}

impl Session {
    /// Where it lives.
    pub fn sandbox(&self) -> &SandboxRef {
        &self.sandbox
    }

    pub fn pool(&self) -> &PoolId {
        &self.pool
    }

    /// A task of this session, with a new id.
    pub fn task(&self, steps: Vec<Step>) -> TaskRequest {
        TaskRequest {
            session: Some(self.sandbox.clone()),
            ..self.client.task(&self.pool, steps)
        }
    }

    /// Runs steps in the session's sandbox.
    pub async fn run(&self, steps: Vec<Step>) -> Result<Terminal, ClientError> {
        self.run_task(self.task(steps)).await
    }

    /// Runs a task in the session's sandbox: published once, straight to its
    /// worker; acceptance and terminal are waited for together. A session that
    /// is gone is an outcome, `sandbox_lost`, and no error.
    #[tracing::instrument(skip_all, fields(task = %request.id, sandbox = %self.sandbox.sandbox))]
    pub async fn run_task(&self, mut request: TaskRequest) -> Result<Terminal, ClientError> {
        request.session = Some(self.sandbox.clone());
        let task = request.id;
        let bound = bound(&request);
        let run = request.run.clone();
        let (digest, outgoing) = self.place(request)?;
        if !self.client.shared.outbox.admit(task, &digest) {
            return Err(ClientError::IdConflict { task });
        }
        self.client.note_submitted(&run, task, &digest);
        let mut tracked = Tracked::listen(&self.client, run, task, digest, outgoing).await?;
        let publication = tracked.publication(self.client.shared.patience.min(bound));
        let both = async {
            tokio::pin!(publication);
            tokio::select! {
                biased;
                terminal = tracked.terminal() => return terminal,
                accepted = &mut publication => {
                    let ack = accepted.map_err(|source| ClientError::Submit { task, source })?;
                    self.client.note_accepted(task, ack);
                }
            }
            tracked.terminal().await
        };
        tokio::time::timeout(bound, both)
            .await
            .unwrap_or(Err(ClientError::NoTerminal {
                task,
                waited: bound,
            }))
    }

    /// Keeps the session from idling: runs nothing, and its `idle_timeout_ms` begins anew. It
    /// does not outlast its `max_life_ms` by it. One that was gone answers `sandbox_lost`.
    pub async fn renew(&self) -> Result<Terminal, ClientError> {
        self.run_task(self.task(Vec::new())).await
    }

    /// Ends the session; its sandbox is reset or destroyed. A session that was
    /// gone already answers `sandbox_lost`.
    pub async fn close(&self) -> Result<Terminal, ClientError> {
        let request = TaskRequest {
            close_session: true,
            ..self.task(Vec::new())
        };
        self.run_task(request).await
    }

    fn place(&self, request: TaskRequest) -> Result<(String, Outgoing), ClientError> {
        let task = request.id;
        let digest = sha256_hex(&self.client.check(&request)?);
        let subject = self.client.shared.broker.subjects().placement(
            &self.sandbox.worker,
            &request.tenant,
            self.sandbox.sandbox,
        );
        let placement = Placement {
            task: request,
            request_digest: digest.clone(),
            attempt: 1,
            sandbox: self.sandbox.clone(),
            dispatched_at: Timestamp::now(),
        };
        let payload = codec::encode(&placement, Format::MessagePack).map_err(|source| {
            ClientError::Submit {
                task,
                source: BrokerError::Encode {
                    subject: subject.clone(),
                    source,
                },
            }
        })?;
        let outgoing = Outgoing {
            subject,
            message_id: Some(placement.message_id()),
            format: Format::MessagePack,
            payload: payload.into(),
            trace: TraceHeaders::current(),
            headers: Vec::new(),
        };
        Ok((digest, outgoing))
    }
}

fn bound(request: &TaskRequest) -> Duration {
    let timeout = request
        .timeout_ms
        .unwrap_or(TaskRequest::DEFAULT_TIMEOUT_MS);
    Duration::from_millis(timeout).saturating_add(GRACE)
}
