//! Leases, warm inventory, heartbeats and claims in Redis: Lua scripts and their typed API.
//!
//! Every change is one script under `src/scripts/`. `keys.rs` says which keys there are.

mod answer;
mod claim;
mod error;
mod foreign;
mod group;
mod inventory;
mod keys;
mod lead;
mod lease;
mod options;
mod quota;
mod reap;
mod removal;
mod script;
mod store;
mod worker;

pub use claim::{CancelState, Claim, ClaimNonce, ClaimRequest};
pub use error::{Fault, LeaseError};
pub use group::{Finished, Vote};
pub use inventory::{Held, Offered};
pub use lead::{Lead, LeadRequest, Leader, Leads};
pub use lease::{Cancelled, Done, LeaseInfo, Renewal};
pub use options::LeaseOptions;
pub use quota::{PoolUse, Quota, QuotaKind, TenantUse};
pub use removal::Removal;
pub use store::LeaseStore;
pub use worker::{HeartbeatReply, PoolCount, PoolTarget, WorkerInfo, WorkerRecord};
