//! Claims: a task gets a sandbox for one attempt, or learns why not.

use std::fmt;
use std::time::Duration;

use broker_schema::{
    CancelCause, Epoch, GroupId, PoolId, RunId, SandboxId, SandboxRef, TaskId, TenantId,
};
use uuid::Uuid;

use crate::answer::{Answer, garbled};
use crate::error::{Fault, LeaseError};
use crate::keys;
use crate::quota::{Quota, QuotaKind};
use crate::store::{LeaseStore, millis};

/// One intention to claim. Asking again with the same nonce gets the same grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClaimNonce(Uuid);

impl ClaimNonce {
    #[allow(
        clippy::new_without_default,
        reason = "a default nonce would be a surprise"
    )]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for ClaimNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_simple().fmt(f)
    }
}

#[derive(Debug, Clone)]
pub struct ClaimRequest {
    pub tenant: TenantId,
    pub run: RunId,
    pub task: TaskId,
    pub pool: PoolId,
    /// SHA-256, hex, of the request's bytes.
    pub request_digest: String,
    pub max_attempts: u32,
    pub nonce: ClaimNonce,
    /// Claim a task that is marked as finished: its terminal was looked for and is not there.
    pub again: bool,
    pub group: Option<GroupId>,
    /// The sandbox is to be kept.
    pub session: bool,
    /// What the tenant may have at once.
    pub quota: Quota,
}

/// The answer to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Granted {
        sandbox: SandboxRef,
        attempt: u32,
    },
    NoneWarm,
    /// Another attempt's lease is alive, for this long at least.
    Busy {
        remaining: Duration,
    },
    Cancelled {
        cause: CancelCause,
    },
    /// The tenant has as much as it may have.
    OverQuota {
        kind: QuotaKind,
        limit: u32,
        current: u32,
    },
    /// Its terminal was stored.
    Finished,
    Exhausted {
        attempts: u32,
    },
    /// The id was used before with other content.
    Conflict {
        first_digest: String,
    },
    /// Redis is new or was flushed: install an incarnation first.
    NoIncarnation,
}

/// Where a task is that was cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CancelState {
    /// Queued somewhere, or never heard of. It will not be granted a sandbox.
    Unplaced,
    /// Its worker learns it with the next renewal, or by a hint.
    Placed {
        sandbox: SandboxRef,
    },
    Finished,
}

impl LeaseStore {
    pub async fn claim(&self, request: &ClaimRequest) -> Result<Claim, LeaseError> {
        let limit = |limit: Option<u32>| limit.map_or_else(String::new, |most| most.to_string());
        let args = [
            request.tenant.to_string(),
            request.run.to_string(),
            request.task.to_string(),
            request.pool.to_string(),
            request.request_digest.clone(),
            request.max_attempts.to_string(),
            request.nonce.to_string(),
            self.ttl_millis(),
            millis(keys::CLAIMED_FOR),
            u8::from(request.again).to_string(),
            request
                .group
                .as_ref()
                .map_or_else(String::new, ToString::to_string),
            u8::from(request.session).to_string(),
            limit(request.quota.sandboxes),
            limit(request.quota.running),
            limit(request.quota.sessions),
        ];
        let answer = self.run(&self.scripts().claim, &args).await;
        answer
            .and_then(parse_claim)
            .map_err(|source| LeaseError::Claim {
                tenant: request.tenant.clone(),
                task: request.task,
                pool: request.pool.clone(),
                source,
            })
    }

    /// Gives a claim back whose placement could not be published. The attempt stays counted:
    /// the placement may have been stored all the same. False where the claim was not held.
    pub async fn unclaim(
        &self,
        request: &ClaimRequest,
        sandbox: SandboxId,
        epoch: Epoch,
    ) -> Result<bool, LeaseError> {
        self.give_back(request, sandbox, epoch, false).await
    }

    /// As [`Self::unclaim`], for a placement that the server refused, so that it is stored
    /// nowhere: the attempt does not count.
    pub async fn unclaim_refused(
        &self,
        request: &ClaimRequest,
        sandbox: SandboxId,
        epoch: Epoch,
    ) -> Result<bool, LeaseError> {
        self.give_back(request, sandbox, epoch, true).await
    }

    async fn give_back(
        &self,
        request: &ClaimRequest,
        sandbox: SandboxId,
        epoch: Epoch,
        refused: bool,
    ) -> Result<bool, LeaseError> {
        let args = [
            request.tenant.to_string(),
            request.task.to_string(),
            sandbox.to_string(),
            epoch.incarnation().to_string(),
            epoch.counter().to_string(),
            request.nonce.to_string(),
            u8::from(refused).to_string(),
        ];
        let answer = self.run(&self.scripts().unclaim, &args).await;
        answer
            .and_then(|mut answer| answer.tag())
            .map(|tag| tag == "ok")
            .map_err(|source| LeaseError::Unclaim {
                tenant: request.tenant.clone(),
                task: request.task,
                source,
            })
    }

    /// Whether a task was ever granted a sandbox.
    pub async fn was_claimed(&self, tenant: &TenantId, task: TaskId) -> Result<bool, LeaseError> {
        let mut exists = redis::cmd("HEXISTS");
        exists
            .arg(self.key(&format!("task:{tenant}:{task}")))
            .arg("attempts");
        self.command(&exists).await.map_err(LeaseError::Counts)
    }

    /// Flags a task as cancelled and says where it is.
    pub async fn cancel(&self, tenant: &TenantId, task: TaskId) -> Result<CancelState, LeaseError> {
        let args = [
            tenant.to_string(),
            task.to_string(),
            self.ttl_millis(),
            millis(keys::CANCELLED_FOR),
        ];
        let answer = self.run(&self.scripts().cancel, &args).await;
        answer
            .and_then(|mut answer| match answer.tag()?.as_str() {
                "finished" => Ok(CancelState::Finished),
                "unplaced" => Ok(CancelState::Unplaced),
                "placed" => Ok(CancelState::Placed {
                    sandbox: answer.sandbox()?,
                }),
                other => Err(garbled("answer", other)),
            })
            .map_err(|source| LeaseError::Cancel {
                tenant: tenant.clone(),
                task,
                source,
            })
    }
}

fn parse_claim(mut answer: Answer) -> Result<Claim, Fault> {
    Ok(match answer.tag()?.as_str() {
        "granted" => Claim::Granted {
            sandbox: answer.sandbox()?,
            attempt: answer.value("attempt")?,
        },
        "none_warm" => Claim::NoneWarm,
        "busy" => Claim::Busy {
            remaining: answer.millis("time left")?,
        },
        "cancelled" => Claim::Cancelled {
            cause: answer.value("cause")?,
        },
        "over_quota" => Claim::OverQuota {
            kind: answer.value("quota")?,
            limit: answer.value("limit")?,
            current: answer.value("current value")?,
        },
        "finished" => Claim::Finished,
        "exhausted" => Claim::Exhausted {
            attempts: answer.value("attempts")?,
        },
        "conflict" => Claim::Conflict {
            first_digest: answer.text("digest")?,
        },
        "no_incarnation" => Claim::NoIncarnation,
        "counter_spent" => return Err(Fault::CounterSpent),
        other => return Err(garbled("answer", other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Result<Claim, Fault> {
        parse_claim(Answer::new(texts.iter().map(|&t| t.to_owned()).collect()))
    }

    #[test]
    fn answers_are_read() {
        let id = SandboxId::new();
        let text = id.to_string();
        let cases: &[(&[&str], Claim)] = &[
            (&["none_warm"], Claim::NoneWarm),
            (
                &["cancelled", "enough-4"],
                Claim::Cancelled {
                    cause: CancelCause::Enough { valid: 4 },
                },
            ),
            (
                &["over_quota", "running", "4", "5"],
                Claim::OverQuota {
                    kind: QuotaKind::Running,
                    limit: 4,
                    current: 5,
                },
            ),
            (&["finished"], Claim::Finished),
            (&["no_incarnation"], Claim::NoIncarnation),
            (&["exhausted", "4"], Claim::Exhausted { attempts: 4 }),
            (
                &["busy", "1500"],
                Claim::Busy {
                    remaining: Duration::from_millis(1500),
                },
            ),
            (
                &["granted", &text, "w", "2", "5", "1"],
                Claim::Granted {
                    sandbox: SandboxRef {
                        sandbox: id,
                        worker: "w".parse().unwrap(),
                        epoch: Epoch::new(2, 5),
                    },
                    attempt: 1,
                },
            ),
        ];
        for (texts, expected) in cases {
            assert_eq!(&parse(texts).unwrap(), expected);
        }
    }

    #[test]
    fn garbage_is_an_error() {
        for texts in [
            &[][..],
            &["what"],
            &["busy"],
            &["busy", "-1"],
            &["cancelled", "why"],
            &["over_quota", "what", "1", "1"],
            &["over_quota", "running", "1"],
            &["granted", "x", "w", "2", "5", "1"],
            &["exhausted", "many"],
        ] {
            assert!(parse(texts).is_err(), "{texts:?}");
        }
        assert!(matches!(
            parse(&["counter_spent"]),
            Err(Fault::CounterSpent)
        ));
    }
}
