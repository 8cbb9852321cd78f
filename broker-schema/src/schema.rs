//! JSON Schema of what travels, for people and for other languages.

use crate::pool::PoolSpec;
use crate::{
    CancelNotice, CancelRequest, ControlMessage, Credit, Frame, Placement, TaskRequest, Terminal,
};

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
        ("cancel_notice", schemars::schema_for!(CancelNotice).into()),
        ("credit", schemars::schema_for!(Credit).into()),
        (
            "control_message",
            schemars::schema_for!(ControlMessage).into(),
        ),
        ("pool_spec", schemars::schema_for!(PoolSpec).into()),
    ]
}
