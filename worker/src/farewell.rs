//! Why sessions are gone that were here, for the tasks that still come for them.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use broker_schema::{Attribution, Epoch, ErrorCode, ErrorInfo, Outcome, SandboxId, TenantId};

use crate::outcome::Finding;

/// Sessions that are remembered after their end.
const REMEMBERED: usize = 8192;

/// Why a session is gone, and whose doing that was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Farewell {
    pub(crate) code: ErrorCode,
    pub(crate) attribution: Attribution,
    pub(crate) evidence: String,
}

impl Farewell {
    fn new(code: ErrorCode, attribution: Attribution, evidence: impl Into<String>) -> Self {
        Self {
            code,
            attribution,
            evidence: evidence.into(),
        }
    }

    pub(crate) fn closed() -> Self {
        Self::new(
            ErrorCode::SessionClosed,
            Attribution::User,
            "the session was closed by an earlier task",
        )
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(
            ErrorCode::SessionClosed,
            Attribution::User,
            "the session was closed: somebody cancelled its run or its group",
        )
    }

    pub(crate) fn idle(after: Duration) -> Self {
        let evidence = format!(
            "the session had no task for {} ms, its idle_timeout_ms",
            after.as_millis()
        );
        Self::new(ErrorCode::SessionExpired, Attribution::User, evidence)
    }

    pub(crate) fn old(after: Duration) -> Self {
        let evidence = format!(
            "the session had lasted for {} ms, its max_life_ms",
            after.as_millis()
        );
        Self::new(ErrorCode::SessionExpired, Attribution::User, evidence)
    }

    pub(crate) fn leaving() -> Self {
        Self::new(
            ErrorCode::SandboxLost,
            Attribution::Infrastructure,
            "the session's worker left the fleet",
        )
    }

    pub(crate) fn lease_lost() -> Self {
        Self::new(
            ErrorCode::StaleEpoch,
            Attribution::Infrastructure,
            "the registry lost the session's lease, its sandbox was killed",
        )
    }

    pub(crate) fn lease_overdue() -> Self {
        Self::new(
            ErrorCode::StaleEpoch,
            Attribution::Infrastructure,
            "the session's lease could not be renewed in time, its sandbox was killed",
        )
    }

    /// Its first process ended while no task ran.
    pub(crate) fn died(oom_kills: u64) -> Self {
        if oom_kills > 0 {
            let evidence = format!(
                "the session's sandbox ended between two tasks; the kernel's count of OOM kills \
                 grew by {oom_kills}"
            );
            return Self::new(ErrorCode::SandboxLost, Attribution::Policy, evidence);
        }
        Self::new(
            ErrorCode::SandboxLost,
            Attribution::Infrastructure,
            "the session's sidecar ended between two tasks",
        )
    }

    /// An earlier task left the sandbox in a state that nothing can be run in.
    pub(crate) fn spoilt(by: &Finding) -> Self {
        let evidence = format!(
            "the session's sandbox was destroyed after an earlier task that ended as {}: {}",
            by.outcome, by.evidence
        );
        let code = match (&by.error, by.outcome) {
            (Some(error), Outcome::SandboxLost) => error.code,
            _ => ErrorCode::SandboxLost,
        };
        Self::new(code, by.attribution, evidence)
    }

    /// Nothing is known of it: ids are made up by nobody but the fleet, so whoever asks has one
    /// of long ago, of somebody else's, or none.
    pub(crate) fn unknown(code: ErrorCode, why: &str) -> Self {
        let evidence = format!("{why}, and no session of this tenant in it is remembered");
        Self::new(code, Attribution::User, evidence)
    }

    /// What a task is told that came for it.
    pub(crate) fn finding(&self) -> Finding {
        let mut finding = Finding::new(Outcome::SandboxLost, self.evidence.clone())
            .with(ErrorInfo::new(self.code, self.evidence.clone()).at("session"));
        finding.attribution = self.attribution;
        finding
    }
}

/// The sessions that ended here, the latest of them. Pure; one lock around it.
#[derive(Debug, Default)]
pub(crate) struct Farewells {
    ended: HashMap<SandboxId, (TenantId, Epoch, Farewell)>,
    order: VecDeque<SandboxId>,
}

impl Farewells {
    pub(crate) fn remember(
        &mut self,
        sandbox: SandboxId,
        tenant: TenantId,
        epoch: Epoch,
        farewell: Farewell,
    ) {
        if self
            .ended
            .insert(sandbox, (tenant, epoch, farewell))
            .is_none()
        {
            self.order.push_back(sandbox);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    /// Only to the tenant whose session it was.
    pub(crate) fn of(
        &self,
        sandbox: SandboxId,
        tenant: &TenantId,
        epoch: Epoch,
    ) -> Option<Farewell> {
        let (owner, under, farewell) = self.ended.get(&sandbox)?;
        (owner == tenant && *under == epoch).then(|| farewell.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch::new(1, 2);

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn what_the_user_or_the_policy_caused_is_never_the_infrastructures() {
        use Attribution::{Infrastructure, Policy, User};
        use ErrorCode::{SandboxLost, SessionClosed, SessionExpired, StaleEpoch};
        let second = Duration::from_secs(1);
        let by = |outcome| Farewell::spoilt(&Finding::new(outcome, "why"));
        for (farewell, code, attribution, evidence) in [
            (Farewell::closed(), SessionClosed, User, "closed"),
            (Farewell::cancelled(), SessionClosed, User, "cancelled"),
            (
                Farewell::idle(second),
                SessionExpired,
                User,
                "idle_timeout_ms",
            ),
            (Farewell::old(second), SessionExpired, User, "max_life_ms"),
            (Farewell::leaving(), SandboxLost, Infrastructure, "left"),
            (Farewell::lease_lost(), StaleEpoch, Infrastructure, "lease"),
            (
                Farewell::lease_overdue(),
                StaleEpoch,
                Infrastructure,
                "renewed",
            ),
            (Farewell::died(0), SandboxLost, Infrastructure, "sidecar"),
            (Farewell::died(2), SandboxLost, Policy, "grew by 2"),
            (by(Outcome::TimedOut), SandboxLost, Policy, "timed_out: why"),
            (by(Outcome::SandboxLost), SandboxLost, Infrastructure, "why"),
            (
                Farewell::unknown(SandboxLost, "gone"),
                SandboxLost,
                User,
                "gone",
            ),
        ] {
            let found = farewell.finding();
            assert_eq!(found.outcome, Outcome::SandboxLost);
            assert_eq!(found.attribution, attribution, "{farewell:?}");
            assert_eq!(found.error.unwrap().code, code);
            assert!(found.evidence.contains(evidence), "{farewell:?}");
        }
    }

    #[test]
    fn it_is_told_to_its_tenant_under_its_epoch_and_to_nobody_else() {
        let mut ended = Farewells::default();
        let id = SandboxId::new();
        ended.remember(id, tenant("t"), EPOCH, Farewell::closed());
        assert_eq!(ended.of(id, &tenant("t"), EPOCH), Some(Farewell::closed()));
        assert_eq!(ended.of(id, &tenant("u"), EPOCH), None);
        assert_eq!(ended.of(id, &tenant("t"), Epoch::new(1, 3)), None);
        for _ in 0..REMEMBERED {
            ended.remember(SandboxId::new(), tenant("t"), EPOCH, Farewell::leaving());
        }
        assert_eq!(ended.of(id, &tenant("t"), EPOCH), None, "memory is bounded");
        assert_eq!(ended.ended.len(), REMEMBERED);
    }
}
