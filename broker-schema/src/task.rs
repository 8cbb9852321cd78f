//! The task request: what a trainer publishes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Blob, GroupId, Outcome, PoolId, RunId, SandboxRef, SessionOptions, Step, TaskId, TenantId,
    Timestamp,
};

/// An ordered list of steps with one terminal result. The bytes of the request
/// are its identity: the same id with other bytes is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TaskRequest {
    pub id: TaskId,
    pub tenant: TenantId,
    pub run: RunId,
    pub pool: PoolId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// How many tasks the group has: they are admitted together, once all are
    /// there or a short while has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// As soon as this many tasks of the group have ended with a valid result
    /// the others are cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_valid: Option<u32>,
    /// The run's share among the runs of its tenant that wait: 1 (default) to
    /// 1000. Where tasks of a run differ, the one that came last decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_weight: Option<u32>,
    #[serde(default)]
    pub priority: Priority,
    pub steps: Vec<Step>,
    /// Environment of every command; a step's own entries win.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Blob>,
    /// Milliseconds that one attempt may run, all steps together. Default 30 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// The task ends as `expired` when it has not finished by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Go on with the next step after one that did not exit with 0.
    #[serde(default)]
    pub continue_on_failure: bool,
    /// Further attempts, each in a fresh sandbox, at a task that fails, runs
    /// out of time or runs out of memory. At most 10; not for sessions.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: u8,
    /// Remove the task's frames and its terminal this many seconds after its
    /// end, and never sooner than after [`Self::LEAST_TTL_SECONDS`]: whoever
    /// waits for them must have a chance. Default: they stay as long as the
    /// fleet keeps all results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u64>,
    /// Keep the sandbox: the terminal names it, and later tasks may name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<SessionOptions>,
    /// Run in this session's sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SandboxRef>,
    /// Close the session after this task.
    #[serde(default)]
    pub close_session: bool,
    pub submitted_at: Timestamp,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(number: &u8) -> bool {
    *number == 0
}

/// Which tasks of a tenant go first.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    High,
    #[default]
    Normal,
    Low,
}

impl Priority {
    /// Highest first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];
}

impl TaskRequest {
    /// What one attempt may take when the request does not say.
    pub const DEFAULT_TIMEOUT_MS: u64 = 30_000;
    /// Bytes kept of each output stream of a step when the step does not say.
    pub const DEFAULT_OUTPUT_LIMIT: u64 = 8 << 20;
    /// Most retries that a request may ask for.
    pub const MOST_RETRIES: u8 = 10;
    /// Most tasks that a group may be said to have.
    pub const MOST_GROUP: u32 = 1024;
    /// Largest weight of a run.
    pub const MOST_WEIGHT: u32 = 1000;

    /// Soonest that results are removed after a task's end: longer than the
    /// longest pause of a client that looks for a terminal.
    pub const LEAST_TTL_SECONDS: u64 = 60;

    /// A request with a new id and the default everything.
    pub fn new(tenant: TenantId, run: RunId, pool: PoolId, steps: Vec<Step>) -> Self {
        Self {
            id: TaskId::new(),
            tenant,
            run,
            pool,
            group: None,
            group_size: None,
            min_valid: None,
            run_weight: None,
            priority: Priority::default(),
            steps,
            env: BTreeMap::new(),
            timeout_ms: None,
            deadline: None,
            continue_on_failure: false,
            retries: 0,
            ttl_seconds_after_finished: None,
            keep_alive: None,
            session: None,
            close_session: false,
            submitted_at: Timestamp::now(),
        }
    }

    /// Whether an attempt that ended like this is followed by another one.
    /// Every attempt counts, those too that the infrastructure ended.
    pub fn retries_after(&self, outcome: Outcome, attempt: u32) -> bool {
        let worth = matches!(
            outcome,
            Outcome::Failed | Outcome::TimedOut | Outcome::OomKilled
        );
        let one_shot = self.session.is_none() && self.keep_alive.is_none();
        worth && one_shot && attempt <= u32::from(self.retries.min(Self::MOST_RETRIES))
    }

    /// How long its results are kept after its end, where it says so.
    pub fn results_kept_for(&self) -> Option<std::time::Duration> {
        let seconds = self.ttl_seconds_after_finished?;
        Some(std::time::Duration::from_secs(
            seconds.max(Self::LEAST_TTL_SECONDS),
        ))
    }

    /// The `Nats-Msg-Id` of the request.
    pub fn message_id(&self) -> String {
        format!("{}/{}", self.tenant, self.id)
    }
}
