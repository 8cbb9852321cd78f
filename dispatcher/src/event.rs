//! What others tell the loop that owns the queue.

use broker_schema::{CancelNotice, ErrorInfo, Outcome, TaskRequest};
use tokio::sync::oneshot;

use crate::group::GroupKey;
use crate::place::Job;

/// What others tell the loop.
#[derive(Debug)]
pub(crate) enum Event {
    Queue(Box<Job>),
    /// What a notice means is ended; where each of it can be heard of.
    Cancel {
        notice: CancelNotice,
        found: oneshot::Sender<Vec<oneshot::Receiver<Outcome>>>,
    },
    /// A request that is beyond its tenant's quota, and its group with it; whether it was here.
    Refuse {
        sequence: u64,
        error: Box<ErrorInfo>,
        found: oneshot::Sender<bool>,
    },
    /// A group of which a member was refused before it came here.
    RefuseGroup {
        key: GroupKey,
        error: Box<ErrorInfo>,
    },
}

impl Event {
    /// What follows from the refusal of a request for its group.
    pub(crate) fn refuse_group(request: &TaskRequest, error: &ErrorInfo) -> Option<Self> {
        let (key, _) = group_of(request)?;
        let error = Box::new(error.clone());
        Some(Self::RefuseGroup { key, error })
    }
}

/// The group that a request waits for, and its size.
pub(crate) fn group_of(request: &TaskRequest) -> Option<(GroupKey, usize)> {
    let size = request.group_size.filter(|size| *size > 1)?;
    let key = GroupKey {
        tenant: request.tenant.clone(),
        pool: request.pool.clone(),
        run: request.run.clone(),
        group: request.group.clone()?,
    };
    Some((key, size as usize))
}
