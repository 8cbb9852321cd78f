//! Valid results count for their groups: with as many as a group asks for, the rest is cancelled.

use broker_schema::codec::{self, Format};
use broker_schema::{
    CancelCause, CancelNotice, GroupId, RunId, TaskId, TaskRequest, TenantId, Terminal,
};
use remuda_lease::{Finished, Vote};
use remuda_telemetry::Chain;

use crate::shared::Shared;

/// One task's valid result, for its group.
#[derive(Debug, Clone)]
pub(crate) struct Ballot {
    tenant: TenantId,
    task: TaskId,
    run: RunId,
    group: GroupId,
    min_valid: u32,
}

impl Ballot {
    /// `None` where the result is not valid, or nobody counts.
    pub(crate) fn of(task: &TaskRequest, terminal: &Terminal) -> Option<Self> {
        let (group, min_valid) = (task.group.clone()?, task.min_valid?);
        terminal.counts_for_group().then(|| Self {
            tenant: task.tenant.clone(),
            task: task.id,
            run: task.run.clone(),
            group,
            min_valid,
        })
    }

    fn vote(&self) -> Vote<'_> {
        Vote {
            run: &self.run,
            group: &self.group,
            min_valid: self.min_valid,
        }
    }

    /// What the registry is told with the end of the task.
    pub(crate) fn finished(&self) -> Finished<'_> {
        Finished {
            tenant: &self.tenant,
            task: self.task,
            vote: Some(self.vote()),
        }
    }

    /// Counts it where the registry is not told of the task's end.
    pub(crate) async fn count(&self, shared: &Shared) {
        match shared
            .leases
            .vote(&self.tenant, self.task, self.vote())
            .await
        {
            Ok(true) => self.tell_enough(shared).await,
            Ok(false) => {}
            Err(error) => tracing::warn!(
                error = %Chain(&error), task = %self.task, "a result is not counted for its group"
            ),
        }
    }

    /// The group has enough with this one. A hint: claims and renewals say the same.
    pub(crate) async fn tell_enough(&self, shared: &Shared) {
        let valid = self.min_valid;
        tracing::info!(tenant = %self.tenant, run = %self.run, group = %self.group, valid,
            "a group has its valid results, the rest is cancelled");
        let notice = CancelNotice {
            tenant: self.tenant.clone(),
            target: self.vote().into(),
            cause: CancelCause::Enough { valid },
        };
        let payload = match codec::encode(&notice, Format::MessagePack) {
            Ok(payload) => payload,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "a hint cannot be written");
                return;
            }
        };
        let subject = shared.broker.subjects().cancel_hint();
        if let Err(error) = shared.broker.nats().publish(subject, payload.into()).await {
            tracing::debug!(error = %Chain(&error), "a hint was not sent");
        }
    }
}
