//! One published task until its terminal: listen, look, publish again.

use std::time::Duration;

use broker_schema::{RunId, TaskId, TenantId, Terminal};
use remuda_telemetry::history::History;
use remuda_telemetry::{Chain, TraceHeaders};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::broker::{Broker, BrokerError, LinkState, Outgoing, PubAck};
use crate::client::Client;
use crate::error::ClientError;
use crate::handed::note_terminal;
use crate::listen::Ticket;

/// Silence after which the terminal is looked for, and the message published
/// again; doubles.
const FIRST_LOOK: Duration = Duration::from_secs(2);
const LONGEST_LOOK: Duration = Duration::from_secs(30);
/// How long one repeated publication may take.
const REPEAT_PATIENCE: Duration = Duration::from_secs(5);

/// A task on its way. Keeps the bytes until a terminal is read: storage that
/// is lost on the way is made good from here.
#[derive(Debug)]
pub(crate) struct Tracked {
    broker: Broker,
    tenant: TenantId,
    outgoing: Outgoing,
    task: TaskId,
    run: RunId,
    digest: String,
    history: History,
    ticket: Ticket,
    look_at: Instant,
    pause: Duration,
    link: watch::Receiver<LinkState>,
    generation: u64,
}

impl Tracked {
    /// Listens for the terminal; nothing is published yet.
    pub(crate) async fn listen(
        client: &Client,
        run: RunId,
        task: TaskId,
        digest: String,
        outgoing: Outgoing,
    ) -> Result<Self, ClientError> {
        let shared = &client.shared;
        let ticket = shared
            .listeners
            .ticket(&run, task)
            .await
            .map_err(|source| ClientError::Submit { task, source })?;
        let mut link = shared.broker.link();
        let generation = link.borrow_and_update().generation;
        Ok(Self {
            broker: shared.broker.clone(),
            tenant: shared.tenant.clone(),
            outgoing,
            task,
            run,
            digest,
            history: shared.history.clone(),
            ticket,
            look_at: Instant::now() + FIRST_LOOK,
            pause: FIRST_LOOK,
            link,
            generation,
        })
    }

    pub(crate) fn task(&self) -> TaskId {
        self.task
    }

    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    /// The span that published it.
    pub(crate) fn trace(&self) -> &TraceHeaders {
        &self.outgoing.trace
    }

    pub(crate) async fn publish(&self, patience: Duration) -> Result<PubAck, ClientError> {
        self.broker
            .publish(self.outgoing.clone(), patience)
            .await
            .map_err(|source| ClientError::Submit {
                task: self.task,
                source,
            })
    }

    /// A publication that can be awaited beside the terminal.
    pub(crate) fn publication(
        &self,
        patience: Duration,
    ) -> impl Future<Output = Result<PubAck, BrokerError>> + Send + 'static + use<> {
        let (broker, outgoing) = (self.broker.clone(), self.outgoing.clone());
        async move { broker.publish(outgoing, patience).await }
    }

    /// The terminal may be there already: look at once.
    pub(crate) fn look_now(&mut self) {
        self.look_at = Instant::now();
    }

    /// Waits for the terminal however long it takes. Dropping the future loses
    /// nothing.
    pub(crate) async fn terminal(&mut self) -> Result<Terminal, ClientError> {
        loop {
            tokio::select! {
                biased;
                terminal = self.ticket.arrived() => return self.judge((*terminal).clone()),
                () = tokio::time::sleep_until(self.look_at) => {
                    if let Some(terminal) = self.look().await? {
                        return self.judge(terminal);
                    }
                }
                changed = self.link.changed() => self.observe_link(changed.is_ok())?,
            }
        }
    }

    /// A live copy that was sent while the connection was gone is lost.
    fn observe_link(&mut self, alive: bool) -> Result<(), ClientError> {
        let state = *self.link.borrow_and_update();
        if state.closed || !alive {
            return Err(ClientError::Terminal {
                task: self.task,
                source: BrokerError::Closed,
            });
        }
        if state.connected && state.generation != self.generation {
            self.generation = state.generation;
            self.look_now();
        }
        Ok(())
    }

    /// Reads the terminal; where there is none, publishes the same bytes under
    /// the same id once more. Faults that pass are left to the next look.
    async fn look(&mut self) -> Result<Option<Terminal>, ClientError> {
        let looked = self
            .broker
            .terminal_of(&self.tenant, &self.run, self.task)
            .await;
        match looked {
            Ok(Some(terminal)) => return Ok(Some(terminal)),
            // What is no terminal there is taken away by the fleet when it meets the task.
            Ok(None) | Err(BrokerError::Unreadable { .. }) => {
                if let Err(error) = self
                    .broker
                    .publish(self.outgoing.clone(), REPEAT_PATIENCE)
                    .await
                {
                    tracing::debug!(task = %self.task, error = %Chain(&error), "not published again");
                }
            }
            Err(source) if !source.retryable() => {
                return Err(ClientError::Terminal {
                    task: self.task,
                    source,
                });
            }
            Err(error) => {
                tracing::debug!(task = %self.task, error = %Chain(&error), "terminal not read");
            }
        }
        self.look_at = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_LOOK);
        Ok(None)
    }

    fn judge(&self, terminal: Terminal) -> Result<Terminal, ClientError> {
        note_terminal(&self.history, &self.tenant, &terminal);
        if terminal.request_digest.is_empty() || terminal.request_digest == self.digest {
            Ok(terminal)
        } else {
            Err(ClientError::IdConflict { task: self.task })
        }
    }
}
