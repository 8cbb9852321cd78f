//! Terminals of tasks that end without having run here. Pure.

use broker_schema::{
    CancelCause, ErrorCode, ErrorInfo, GroupId, Outcome, PoolId, RunId, SandboxRef, TaskId,
    TaskRequest, TenantId, Terminal, Timestamp, Usage,
};

/// Who a terminal is for, as far as the request said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) tenant: TenantId,
    pub(crate) run: RunId,
    pub(crate) task: TaskId,
    pub(crate) pool: PoolId,
    pub(crate) group: Option<GroupId>,
    pub(crate) queued: Timestamp,
}

impl Address {
    pub(crate) fn of(request: &TaskRequest) -> Self {
        Self {
            tenant: request.tenant.clone(),
            run: request.run.clone(),
            task: request.id,
            pool: request.pool.clone(),
            group: request.group.clone(),
            queued: request.submitted_at,
        }
    }

    fn terminal(self, digest: &str, outcome: Outcome, error: ErrorInfo) -> Terminal {
        Terminal {
            task: self.task,
            tenant: self.tenant,
            run: self.run,
            pool: self.pool,
            group: self.group,
            request_digest: digest.to_owned(),
            attempt: 0,
            outcome,
            attribution: outcome.default_attribution(),
            evidence: error.message.clone(),
            exit: None,
            error: Some(error),
            steps: Vec::new(),
            frames: 0,
            usage: Usage::default(),
            times: broker_schema::Times {
                queued: self.queued,
                finished: Timestamp::now(),
                ..broker_schema::Times::default()
            },
            sandbox: None,
            kept: false,
        }
    }

    pub(crate) fn rejected(self, digest: &str, error: ErrorInfo) -> Terminal {
        self.terminal(digest, Outcome::Rejected, error)
    }

    pub(crate) fn cancelled(self, digest: &str, cause: CancelCause) -> Terminal {
        let error = ErrorInfo::new(
            ErrorCode::Cancelled,
            format!("cancelled before it was placed: {}", cause.evidence()),
        );
        self.terminal(digest, Outcome::Cancelled, error)
    }

    pub(crate) fn expired(self, digest: &str) -> Terminal {
        let error = ErrorInfo::new(
            ErrorCode::DeadlineExpired,
            "the deadline passed while it was queued",
        )
        .at("deadline");
        self.terminal(digest, Outcome::Expired, error)
    }

    pub(crate) fn dead_lettered(self, digest: &str, attempts: u32) -> Terminal {
        let error = ErrorInfo::new(
            ErrorCode::AttemptsExhausted,
            format!("{attempts} attempts ended by faults of the infrastructure"),
        );
        let mut terminal = self.terminal(digest, Outcome::DeadLettered, error);
        terminal.attempt = attempts;
        terminal
    }

    /// Its message was found where nobody takes it any more.
    pub(crate) fn undeliverable(self, digest: &str, attempt: u32, reason: &str) -> Terminal {
        let error = ErrorInfo::new(ErrorCode::AttemptsExhausted, reason);
        let mut terminal = self.terminal(digest, Outcome::DeadLettered, error);
        terminal.attempt = attempt;
        terminal
    }

    pub(crate) fn sandbox_lost(self, digest: &str, sandbox: &SandboxRef) -> Terminal {
        let error = ErrorInfo::new(
            ErrorCode::SandboxLost,
            format!(
                "worker {} with the session's sandbox {} is gone, open a new session",
                sandbox.worker, sandbox.sandbox
            ),
        )
        .at("session");
        let mut terminal = self.terminal(digest, Outcome::SandboxLost, error);
        terminal.attempt = 1;
        terminal.sandbox = Some(sandbox.clone());
        terminal
    }
}
