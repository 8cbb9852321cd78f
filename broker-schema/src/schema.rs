//! JSON Schema of what travels, for people and for other languages.

use crate::pool::PoolSpec;
use crate::{CancelRequest, ControlMessage, Frame, Placement, TaskRequest, Terminal};

/// Every message's schema under the name of its file in `docs/schema/`.
pub fn json_schemas() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("task_request", schemars::schema_for!(TaskRequest).into()),
        ("frame", schemars::schema_for!(Frame).into()),
        ("terminal", schemars::schema_for!(Terminal).into()),
        ("placement", schemars::schema_for!(Placement).into()),
        (
            "cancel_request",
            schemars::schema_for!(CancelRequest).into(),
        ),
        (
            "control_message",
            schemars::schema_for!(ControlMessage).into(),
        ),
        ("pool_spec", schemars::schema_for!(PoolSpec).into()),
    ]
}
