//! Hints for whoever wants to react sooner than its own timer: `evt.>`.

use serde::{Deserialize, Serialize};

use crate::{PoolId, TenantId};

/// There may be requests in this lane: published by a client that submits to
/// it for the first time. Subject `evt.lane`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneHint {
    pub tenant: TenantId,
    pub pool: PoolId,
}

/// A pool has warm sandboxes that it did not have. Subject `evt.offer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferHint {
    pub pool: PoolId,
}
