//! What can go wrong for somebody who submits.

use std::time::Duration;

use broker_schema::{ErrorCode, Invalid, PoolId, RunId, TaskId, Terminal};

use crate::broker::BrokerError;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    #[error("cannot connect")]
    Connect(#[source] BrokerError),
    #[error("task {task} is not valid")]
    Invalid {
        task: TaskId,
        #[source]
        source: Invalid,
    },
    #[error(
        "task {task} has {size} bytes, at most {limit} are taken: move data out of the request"
    )]
    TooLarge {
        task: TaskId,
        size: usize,
        limit: usize,
    },
    #[error("task {task} was submitted before with other content: use a new id")]
    IdConflict { task: TaskId },
    #[error("cannot submit task {task}")]
    Submit {
        task: TaskId,
        #[source]
        source: BrokerError,
    },
    #[error("cannot read the terminal of task {task}")]
    Terminal {
        task: TaskId,
        #[source]
        source: BrokerError,
    },
    #[error(
        "no terminal of task {task} within {waited:?}, its worker may be gone and no dispatcher be running"
    )]
    NoTerminal { task: TaskId, waited: Duration },
    #[error("cannot read the output of task {task}")]
    Output {
        task: TaskId,
        #[source]
        source: BrokerError,
    },
    #[error("output of task {task} does not add up: {detail}")]
    OutputDamaged { task: TaskId, detail: String },
    #[error("pool {pool} gave no session: {}", .terminal.outcome)]
    SessionRefused {
        pool: PoolId,
        terminal: Box<Terminal>,
    },
    #[error("cannot cancel task {task}: {detail}")]
    Cancel { task: TaskId, detail: String },
    #[error("cannot cancel in run {run}: {detail}")]
    CancelRun { run: RunId, detail: String },
    #[error(
        "no credit of pool {pool} within {waited:?}: is it a pool of this fleet, and does a dispatcher run?"
    )]
    NoCredit { pool: PoolId, waited: Duration },
    #[error("cannot listen for the credit of pool {pool}")]
    Credit {
        pool: PoolId,
        #[source]
        source: BrokerError,
    },
    #[error("cannot read the results of run {run}")]
    Results {
        run: RunId,
        #[source]
        source: BrokerError,
    },
}

impl ClientError {
    /// Whether it is about one stored message that is not what it should be: what follows it can
    /// be read all the same.
    pub fn unreadable(&self) -> bool {
        matches!(
            self,
            Self::Results {
                source: BrokerError::Unreadable { .. },
                ..
            }
        )
    }

    /// The stable code under which a person finds this in the documentation.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid { source, .. } => source
                .0
                .first()
                .map_or(ErrorCode::InvalidField, |info| info.code),
            Self::TooLarge { .. } => ErrorCode::RequestTooLarge,
            Self::IdConflict { .. } => ErrorCode::IdConflict,
            Self::Connect(source)
            | Self::Submit { source, .. }
            | Self::Terminal { source, .. }
            | Self::Output { source, .. }
            | Self::Credit { source, .. }
            | Self::Results { source, .. } => source.code(),
            Self::NoTerminal { .. } => ErrorCode::SandboxLost,
            Self::OutputDamaged { .. } => ErrorCode::Internal,
            Self::Cancel { .. } | Self::CancelRun { .. } | Self::NoCredit { .. } => {
                ErrorCode::NatsUnreachable
            }
            Self::SessionRefused { terminal, .. } => terminal
                .error
                .as_ref()
                .map_or(ErrorCode::SandboxCreateFailed, |info| info.code),
        }
    }
}
