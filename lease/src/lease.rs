//! Leases: renewed, handed to a session's next task, released, listed.

use std::time::Duration;

use broker_schema::{
    CancelCause, Epoch, GroupId, PoolId, RunId, SandboxId, SandboxRef, TaskId, TenantId, WorkerId,
};

use crate::answer::garbled;
use crate::error::{Fault, LeaseError};
use crate::group::{Finished, Vote};
use crate::keys;
use crate::store::{LeaseStore, millis};

/// What became of one lease at a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// Held for another TTL, counted from before the renewal was sent.
    Held { cancelled: Option<Cancelled> },
    /// Gone: kill what runs and go quiet.
    Lost,
}

/// What freeing or keeping a lease came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// The lease was held until then.
    pub held: bool,
    /// The task's group has as many valid results as were asked for, with this one.
    pub enough: bool,
}

/// What under a lease is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cancelled {
    /// None where a session waits for its next task: close it.
    pub task: Option<TaskId>,
    pub cause: CancelCause,
}

/// One lease, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    pub sandbox: SandboxRef,
    pub pool: PoolId,
    pub tenant: TenantId,
    pub run: RunId,
    /// None while a session waits for its next task.
    pub task: Option<TaskId>,
    pub attempt: u32,
    pub remaining: Duration,
}

impl LeaseStore {
    /// Renews leases of one worker; the answers stand in the order of the questions.
    pub async fn renew(
        &self,
        worker: &WorkerId,
        leases: &[(SandboxId, Epoch)],
    ) -> Result<Vec<Renewal>, LeaseError> {
        let failed = |source| LeaseError::Renew {
            worker: worker.clone(),
            leases: leases.len(),
            source,
        };
        let mut args = vec![worker.to_string(), self.ttl_millis()];
        for (sandbox, epoch) in leases {
            args.push(sandbox.to_string());
            args.push(epoch.incarnation().to_string());
            args.push(epoch.counter().to_string());
        }
        let mut answer = self
            .run(&self.scripts().renew, &args)
            .await
            .map_err(failed)?;
        let mut renewals = Vec::with_capacity(leases.len());
        for _ in leases {
            let text = answer.text("renewal").map_err(failed)?;
            renewals.push(parse_renewal(&text).map_err(failed)?);
        }
        Ok(renewals)
    }

    /// A session's next task begins in its sandbox: cancelling it works from here on, and
    /// `remuda ps` shows it.
    pub async fn assign(
        &self,
        lease: &SandboxRef,
        tenant: &TenantId,
        run: &RunId,
        task: TaskId,
        group: Option<&GroupId>,
    ) -> Result<Renewal, LeaseError> {
        let args = [
            lease.worker.to_string(),
            lease.sandbox.to_string(),
            lease.epoch.incarnation().to_string(),
            lease.epoch.counter().to_string(),
            tenant.to_string(),
            run.to_string(),
            task.to_string(),
            millis(keys::CLAIMED_FOR),
            group.map_or_else(String::new, ToString::to_string),
        ];
        let answer = self.run(&self.scripts().assign, &args).await;
        answer
            .and_then(|mut answer| match answer.tag()?.as_str() {
                "ok" => Ok(Renewal::Held { cancelled: None }),
                "cancelled" => Ok(Renewal::Held {
                    cancelled: Some(Cancelled {
                        task: Some(task),
                        cause: answer.value("cause")?,
                    }),
                }),
                "stale" => Ok(Renewal::Lost),
                other => Err(garbled("answer", other)),
            })
            .map_err(|source| LeaseError::Assign {
                tenant: tenant.clone(),
                task,
                sandbox: lease.sandbox,
                source,
            })
    }

    /// Frees a lease and marks the task as finished. False where the lease was not held any
    /// more; the mark is made all the same if the task's claim was this one.
    pub async fn release(
        &self,
        worker: &WorkerId,
        sandbox: SandboxId,
        epoch: Epoch,
        finished: Option<(&TenantId, TaskId)>,
    ) -> Result<bool, LeaseError> {
        let finished = finished.map(Finished::from);
        let done = self.finish(worker, sandbox, epoch, finished.as_ref(), false);
        done.await.map(|done| done.held)
    }

    /// Marks a task as finished and keeps its lease: the sandbox is a session's.
    pub async fn keep(
        &self,
        worker: &WorkerId,
        sandbox: SandboxId,
        epoch: Epoch,
        finished: (&TenantId, TaskId),
    ) -> Result<bool, LeaseError> {
        let finished = Finished::from(finished);
        let done = self.finish(worker, sandbox, epoch, Some(&finished), true);
        done.await.map(|done| done.held)
    }

    /// Frees a lease, or keeps it as a session's; marks a task as finished and counts its result
    /// for its group, where it says so.
    pub async fn finish(
        &self,
        worker: &WorkerId,
        sandbox: SandboxId,
        epoch: Epoch,
        finished: Option<&Finished<'_>>,
        keep: bool,
    ) -> Result<Done, LeaseError> {
        let (tenant, task) = finished.map_or_else(Default::default, |finished| {
            (finished.tenant.to_string(), finished.task.to_string())
        });
        let vote = finished.and_then(|finished| finished.vote);
        let [run, group, need, life] = vote.map_or_else(Default::default, Vote::args);
        let args = [
            worker.to_string(),
            sandbox.to_string(),
            epoch.incarnation().to_string(),
            epoch.counter().to_string(),
            u8::from(keep).to_string(),
            millis(keys::FINISHED_FOR),
            tenant,
            task,
            run,
            group,
            need,
            life,
        ];
        let answer = self.run(&self.scripts().finish, &args).await;
        answer
            .and_then(|mut answer| {
                Ok(Done {
                    held: answer.tag()? == "ok",
                    enough: answer.text("count")? == "enough",
                })
            })
            .map_err(|source| LeaseError::Release {
                worker: worker.clone(),
                sandbox,
                source,
            })
    }

    /// All leases of all workers. What cannot be read is left out.
    pub async fn leases(&self) -> Result<Vec<LeaseInfo>, LeaseError> {
        let mut leases = Vec::new();
        for info in self.workers().await? {
            let worker = info.record.worker;
            let mut answer = self
                .run(&self.scripts().leases, &[worker.to_string()])
                .await
                .map_err(LeaseError::Leases)?;
            while !answer.is_done() {
                let mut fields = Vec::with_capacity(9);
                for _ in 0..9 {
                    fields.push(answer.text("lease").map_err(LeaseError::Leases)?);
                }
                if let Some(lease) = parse_lease(&worker, &fields) {
                    leases.push(lease);
                } else {
                    tracing::warn!(%worker, "a lease in redis cannot be read, left out");
                }
            }
        }
        Ok(leases)
    }
}

fn parse_renewal(text: &str) -> Result<Renewal, Fault> {
    match text.split_once(':') {
        None if text == "lost" => Ok(Renewal::Lost),
        None if text == "held" => Ok(Renewal::Held { cancelled: None }),
        Some(("held", rest)) => {
            let (task, cause) = rest.split_once(':').unwrap_or((rest, ""));
            let idle = task.is_empty() && !cause.is_empty();
            let task = (!idle)
                .then(|| task.parse().map_err(|_| garbled("task id", task)))
                .transpose()?;
            let cause = cause.parse().map_err(|_| garbled("cause", cause))?;
            Ok(Renewal::Held {
                cancelled: Some(Cancelled { task, cause }),
            })
        }
        _ => Err(garbled("renewal", text)),
    }
}

fn parse_lease(worker: &WorkerId, fields: &[String]) -> Option<LeaseInfo> {
    let [
        sandbox,
        pool,
        incarnation,
        counter,
        left,
        tenant,
        run,
        task,
        attempt,
    ] = fields
    else {
        return None;
    };
    Some(LeaseInfo {
        sandbox: SandboxRef {
            sandbox: sandbox.parse().ok()?,
            worker: worker.clone(),
            epoch: Epoch::new(incarnation.parse().ok()?, counter.parse().ok()?),
        },
        pool: pool.parse().ok()?,
        tenant: tenant.parse().ok()?,
        run: run.parse().ok()?,
        task: (!task.is_empty()).then(|| task.parse()).transpose().ok()?,
        attempt: attempt.parse().ok()?,
        remaining: Duration::from_millis(left.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_are_read() {
        let task = TaskId::new();
        assert_eq!(parse_renewal("lost").unwrap(), Renewal::Lost);
        assert_eq!(
            parse_renewal("held").unwrap(),
            Renewal::Held { cancelled: None }
        );
        assert_eq!(
            parse_renewal(&format!("held:{task}")).unwrap(),
            Renewal::Held {
                cancelled: Some(Cancelled {
                    task: Some(task),
                    cause: CancelCause::Asked
                })
            }
        );
        assert_eq!(
            parse_renewal(&format!("held:{task}:enough-3")).unwrap(),
            Renewal::Held {
                cancelled: Some(Cancelled {
                    task: Some(task),
                    cause: CancelCause::Enough { valid: 3 }
                })
            }
        );
        assert_eq!(
            parse_renewal("held::run").unwrap(),
            Renewal::Held {
                cancelled: Some(Cancelled {
                    task: None,
                    cause: CancelCause::Run
                })
            }
        );
        for bad in [
            "",
            "held:",
            "held:x",
            "held:x:run",
            "held::what",
            "lost:x",
            "other",
        ] {
            assert!(parse_renewal(bad).is_err(), "{bad}");
        }
    }
}
