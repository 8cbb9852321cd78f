//! Access to nats-server that the client and the daemons share: connection,
//! streams, publishing, the terminal gate, pulling.

mod clock;
mod connect;
mod consumers;
mod dead_letters;
mod delivery;
mod error;
mod gate;
mod ledger;
mod link;
mod options;
mod publish;
mod puller;
mod purge;
mod stored;
mod streams;

pub use connect::{Broker, VERSION_FLOOR};
pub use consumers::ConsumerState;
pub use dead_letters::{Body, DeadLetter, Refusal, RequeueError, Requeued};
pub use delivery::Delivery;
pub use error::{BrokerError, Cause};
pub use gate::{Gate, StoredTerminal, recorded_digest};
pub use options::{BrokerOptions, Credentials};
pub use publish::{Outgoing, PendingAck, PubAck, Unpublished};
pub use puller::Puller;
pub use stored::StoredMessage;

pub(crate) use delivery::{format_of, header};
pub(crate) use link::LinkState;
