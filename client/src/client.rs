//! The client: one connection for one tenant.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::stream::MAX_REQUEST_BYTES;
use broker_schema::{PoolId, RequestLimits, RunId, Step, TaskRequest, TenantId};
use remuda_telemetry::TaskGroup;
use remuda_telemetry::history::History;

use crate::broker::{Broker, BrokerOptions};
use crate::error::ClientError;
use crate::listen::Listeners;
use crate::outbox::Outbox;

/// Room that headers and the placement around a request take of a payload.
const ENVELOPE: usize = 8 * 1024;

/// Who submits, where to.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    pub broker: BrokerOptions,
    pub tenant: TenantId,
    /// The run of tasks made by [`Client::task`] and of sessions.
    pub run: RunId,
    /// How long a submission may take to be accepted.
    pub patience: Duration,
    /// What a request must be; the fleet may be stricter.
    pub limits: RequestLimits,
    /// For tests: where is written down what this client does.
    pub history: History,
}

impl ClientOptions {
    /// The defaults for a tenant and run, with nats-server on this machine.
    pub fn new(tenant: TenantId, run: RunId) -> Self {
        Self {
            broker: BrokerOptions::default(),
            tenant,
            run,
            patience: Duration::from_secs(30),
            limits: RequestLimits::default(),
            history: History::process(),
        }
    }
}

/// Submits tasks of one tenant and reads what becomes of them. Clones share
/// the connection.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    run: RunId,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) broker: Broker,
    pub(crate) tenant: TenantId,
    pub(crate) patience: Duration,
    pub(crate) limits: RequestLimits,
    pub(crate) history: History,
    pub(crate) listeners: Listeners,
    pub(crate) outbox: Outbox,
    tasks: TaskGroup,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl Client {
    pub async fn connect(options: ClientOptions) -> Result<Self, ClientError> {
        let broker = Broker::connect(&options.broker)
            .await
            .map_err(ClientError::Connect)?;
        Ok(Self::over(broker, options))
    }

    /// A client on a connection that exists.
    pub fn over(broker: Broker, options: ClientOptions) -> Self {
        let tasks = TaskGroup::new();
        Self {
            shared: Arc::new(Shared {
                listeners: Listeners::new(broker.clone(), options.tenant.clone(), tasks.clone()),
                broker,
                tenant: options.tenant,
                patience: options.patience,
                limits: options.limits,
                history: options.history,
                outbox: Outbox::default(),
                tasks,
            }),
            run: options.run,
        }
    }

    /// The same client for another run.
    #[must_use]
    pub fn with_run(&self, run: RunId) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            run,
        }
    }

    /// A request of this client's tenant and run, with a new id.
    pub fn task(&self, pool: &PoolId, steps: Vec<Step>) -> TaskRequest {
        TaskRequest::new(
            self.shared.tenant.clone(),
            self.run.clone(),
            pool.clone(),
            steps,
        )
    }

    pub fn tenant(&self) -> &TenantId {
        &self.shared.tenant
    }

    pub fn run_id(&self) -> &RunId {
        &self.run
    }

    pub fn broker(&self) -> &Broker {
        &self.shared.broker
    }

    /// Most bytes that a request may have with this server.
    pub(crate) fn request_limit(&self) -> usize {
        let server = self.shared.broker.nats().max_payload();
        MAX_REQUEST_BYTES.min(server.saturating_sub(ENVELOPE))
    }
}
