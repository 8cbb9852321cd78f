//! Runs and groups: cancelled as a whole, and ended early by enough valid results.

use broker_schema::{CancelCause, CancelTarget, GroupId, RunId, TaskId, TenantId};

use crate::answer::garbled;
use crate::error::LeaseError;
use crate::keys;
use crate::store::{LeaseStore, millis};

/// A task that has its terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished<'a> {
    pub tenant: &'a TenantId,
    pub task: TaskId,
    /// Where its result is valid and its group asks for a number of those.
    pub vote: Option<Vote<'a>>,
}

impl<'a> From<(&'a TenantId, TaskId)> for Finished<'a> {
    fn from((tenant, task): (&'a TenantId, TaskId)) -> Self {
        Self {
            tenant,
            task,
            vote: None,
        }
    }
}

/// A valid result for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vote<'a> {
    pub run: &'a RunId,
    pub group: &'a GroupId,
    /// How many valid results are asked for.
    pub min_valid: u32,
}

impl Vote<'_> {
    /// Run, group, number, life of the count.
    pub(crate) fn args(self) -> [String; 4] {
        [
            self.run.to_string(),
            self.group.to_string(),
            self.min_valid.to_string(),
            millis(keys::COUNTED_FOR),
        ]
    }
}

impl LeaseStore {
    /// Flags a run, or a group of it, as cancelled: its tasks are granted nothing any more, and
    /// renewals tell of it. A single task has [`cancel`](Self::cancel), which says more.
    pub async fn stop(
        &self,
        tenant: &TenantId,
        run: &RunId,
        group: Option<&GroupId>,
        cause: CancelCause,
    ) -> Result<(), LeaseError> {
        let args = [
            tenant.to_string(),
            run.to_string(),
            group.map_or_else(String::new, ToString::to_string),
            cause.to_string(),
            millis(keys::STOPPED_FOR),
        ];
        let answer = self.run(&self.scripts().stop, &args).await;
        answer.map(drop).map_err(|source| LeaseError::Stop {
            tenant: tenant.clone(),
            run: run.clone(),
            source,
        })
    }

    /// Counts a task's valid result for its group; true where the group has enough with it.
    /// Counting it again changes nothing.
    pub async fn vote(
        &self,
        tenant: &TenantId,
        task: TaskId,
        vote: Vote<'_>,
    ) -> Result<bool, LeaseError> {
        let [run, group, need, life] = vote.args();
        let args = [tenant.to_string(), run, group, task.to_string(), need, life];
        let answer = self.run(&self.scripts().vote, &args).await;
        answer
            .and_then(|mut answer| match answer.tag()?.as_str() {
                "enough" => Ok(true),
                "ok" => Ok(false),
                other => Err(garbled("answer", other)),
            })
            .map_err(|source| LeaseError::Stop {
                tenant: tenant.clone(),
                run: vote.run.clone(),
                source,
            })
    }
}

/// The group that a vote has decided, as a target.
impl From<Vote<'_>> for CancelTarget {
    fn from(vote: Vote<'_>) -> Self {
        Self::Group {
            run: vote.run.clone(),
            group: vote.group.clone(),
        }
    }
}
