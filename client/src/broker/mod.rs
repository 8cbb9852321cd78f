//! Access to nats-server that the client and the daemons share: connection,
//! streams, publishing, the terminal gate, pulling.

mod connect;
mod consumers;
mod delivery;
mod error;
mod gate;
mod ledger;
mod link;
mod options;
mod publish;
mod puller;
mod streams;

pub use connect::{Broker, VERSION_FLOOR};
pub use delivery::Delivery;
pub use error::{BrokerError, Cause};
pub use gate::{Gate, StoredTerminal};
pub use options::{BrokerOptions, Credentials};
pub use publish::{Outgoing, PendingAck, PubAck};
pub use puller::Puller;

pub(crate) use delivery::{format_of, header};
pub(crate) use link::LinkState;
