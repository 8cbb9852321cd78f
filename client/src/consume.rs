//! Reading a run's terminals through a durable consumer: the server remembers how far a reader
//! came, under the reader's name.

use std::time::Duration;

use broker_schema::stream::ConsumerDef;
use broker_schema::{RunId, TenantId, Terminal, Token, codec};
use remuda_telemetry::history::History;

use crate::broker::{Broker, BrokerError, Delivery, Puller};
use crate::client::Client;
use crate::error::ClientError;
use crate::handed::note_terminal;

/// A terminal that was handed out and not acknowledged comes again after this.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// A reader that nobody has been for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);
/// Terminals handed out and not acknowledged.
const WINDOW: usize = 256;
/// Terminals that wait here to be handed out.
const AHEAD: usize = 16;

/// A named reader of one run. Readers with different names each get every terminal; processes
/// under one name share them.
pub struct ResultConsumer {
    broker: Broker,
    tenant: TenantId,
    history: History,
    stream: String,
    durable: String,
    run: RunId,
    puller: Puller,
}

/// One terminal, to be acknowledged when it has been dealt with.
#[derive(Debug)]
pub struct Delivered {
    run: RunId,
    delivery: Delivery,
}

impl Client {
    /// The terminals of a run from where the reader `name` left off; from the first where it is
    /// new. At least once: what is not acknowledged comes again.
    pub async fn consume(&self, run: &RunId, name: &Token) -> Result<ResultConsumer, ClientError> {
        let broker = &self.shared.broker;
        let def = ConsumerDef {
            stream: broker.streams().terminals.clone(),
            // `=` is in no token: no two readers share a name.
            durable: format!("reader-{}={run}={}", self.shared.tenant, name.as_str()),
            filter: broker.subjects().terminals_of_run(&self.shared.tenant, run),
            ack_wait: ACK_WAIT,
            max_ack_pending: WINDOW as i64,
            max_waiting: 512,
            max_deliver: -1,
            inactive_threshold: FORGOTTEN,
        };
        let puller = broker
            .puller(&def)
            .await
            .map_err(|source| ClientError::Results {
                run: run.clone(),
                source,
            })?;
        Ok(ResultConsumer {
            broker: broker.clone(),
            tenant: self.shared.tenant.clone(),
            history: self.shared.history.clone(),
            stream: def.stream,
            durable: def.durable,
            run: run.clone(),
            puller,
        })
    }
}

impl ResultConsumer {
    /// Whether there is anything that this reader has not acknowledged.
    pub async fn unread(&self) -> Result<bool, ClientError> {
        let unread = self.broker.consumer_unread(&self.stream, &self.durable);
        let unread = unread.await.map_err(|source| ClientError::Results {
            run: self.run.clone(),
            source,
        })?;
        Ok(unread > 0)
    }

    /// Waits for the next terminal. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Delivered, ClientError> {
        self.puller.want(AHEAD);
        let delivery = self.puller.next().await;
        let delivered = Delivered {
            delivery: delivery.map_err(|source| ClientError::Results {
                run: self.run.clone(),
                source,
            })?,
            run: self.run.clone(),
        };
        if self.history.is_on()
            && let Ok(terminal) = delivered.terminal()
        {
            note_terminal(&self.history, &self.tenant, &terminal);
        }
        Ok(delivered)
    }

    /// Gives back what was fetched and not handed out, for whoever reads next.
    pub async fn close(self) {
        self.puller.close().await;
    }
}

impl Delivered {
    pub fn sequence(&self) -> u64 {
        self.delivery.stream_sequence
    }

    /// Terminals that are stored and were not delivered to this reader yet.
    pub fn pending(&self) -> u64 {
        self.delivery.pending
    }

    pub fn terminal(&self) -> Result<Terminal, ClientError> {
        self.delivery
            .format()
            .and_then(|format| codec::decode(&self.delivery.payload, format))
            .map_err(|info| {
                self.failed(BrokerError::Unreadable {
                    subject: self.delivery.subject.clone(),
                    info,
                })
            })
    }

    /// It is dealt with; returns once the server has taken note.
    pub async fn ack(self) -> Result<(), ClientError> {
        let acknowledged = self.delivery.ack().await;
        acknowledged.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: BrokerError) -> ClientError {
        ClientError::Results {
            run: self.run.clone(),
            source,
        }
    }
}

impl std::fmt::Debug for ResultConsumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResultConsumer")
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}
