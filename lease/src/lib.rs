//! Leases, warm inventory, heartbeats and claims in Redis: Lua scripts and their typed API.
//!
//! Every change is one script under `src/scripts/`. `keys.rs` says which keys there are.

mod answer;
mod claim;
mod error;
mod inventory;
mod keys;
mod lease;
mod options;
mod reap;
mod script;
mod store;
mod worker;

pub use claim::{CancelState, Claim, ClaimNonce, ClaimRequest};
pub use error::{Fault, LeaseError};
pub use inventory::Offered;
pub use lease::{LeaseInfo, Renewal};
pub use options::LeaseOptions;
pub use store::LeaseStore;
pub use worker::{HeartbeatReply, PoolCount, PoolTarget, WorkerInfo, WorkerRecord};
