//! Credit: what a pool has to give, so that a trainer can pace itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{PoolId, Timestamp};

/// What a pool has to give: published about once a second on
/// `evt.credit.<pool>`. A hint: nothing is reserved by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Credit {
    pub pool: PoolId,
    /// Sandboxes that are warm and nobody's.
    pub free: u64,
    /// Sandboxes that run a task or are a session's.
    pub leased: u64,
    /// Sandboxes that the pool may have at once.
    pub max: u64,
    /// Requests that wait, of all tenants.
    pub queued: u64,
    /// How long a task that is submitted now will wait for a sandbox, in
    /// milliseconds, as things have gone lately. Absent while nobody can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_wait_ms: Option<u64>,
    /// When it was published.
    pub at: Timestamp,
}
