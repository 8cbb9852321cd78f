//! What ends a dispatcher. Everything that passes is waited out instead.

use broker_schema::ErrorCode;
use remuda_client::broker::BrokerError;
use remuda_lease::LeaseError;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DispatcherError {
    #[error("the configuration cannot be used: {}", problems.join("; "))]
    Options { problems: Vec<String> },
    #[error("cannot connect to the broker")]
    Connect(#[source] BrokerError),
    #[error("cannot set up the fleet's streams")]
    Streams(#[source] BrokerError),
    #[error("cannot connect to redis")]
    Lease(#[source] LeaseError),
    #[error("cannot take a new incarnation")]
    Incarnation(#[source] BrokerError),
    #[error("cannot publish the pools")]
    Pools(#[source] LeaseError),
    #[error("cannot listen for {what}")]
    Listen {
        what: &'static str,
        #[source]
        source: async_nats::SubscribeError,
    },
}

impl DispatcherError {
    /// The stable code under which a person finds this in the documentation.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Options { .. } => ErrorCode::InvalidField,
            Self::Connect(source) | Self::Streams(source) | Self::Incarnation(source) => {
                source.code()
            }
            Self::Lease(source) | Self::Pools(source) => source.code(),
            Self::Listen { .. } => ErrorCode::NatsUnreachable,
        }
    }
}
