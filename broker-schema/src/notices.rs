//! What was cancelled lately, for what arrives a moment after the notice did.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::{CancelCause, CancelNotice, CancelTarget, GroupId, RunId, TaskId, TenantId};

/// How long a notice is remembered: what is later than that finds the flag that stands behind it.
const REMEMBERED: Duration = Duration::from_secs(60);
const MOST: usize = 4096;

/// Notices of the last minute.
#[derive(Debug, Default)]
pub struct Notices(HashMap<(TenantId, CancelTarget), (Instant, CancelCause)>);

impl Notices {
    pub fn add(&mut self, notice: &CancelNotice, now: Instant) {
        if self.0.len() >= MOST {
            self.0
                .retain(|_, (since, _)| now.duration_since(*since) < REMEMBERED);
        }
        if self.0.len() < MOST {
            let target = match &notice.target {
                CancelTarget::Task { task, .. } => CancelTarget::Task {
                    task: *task,
                    run: None,
                },
                other => other.clone(),
            };
            let key = (notice.tenant.clone(), target);
            self.0.insert(key, (now, notice.cause));
        }
    }

    /// Why a task was cancelled, where it was.
    pub fn cause(
        &self,
        tenant: &TenantId,
        task: TaskId,
        run: &RunId,
        group: Option<&GroupId>,
        now: Instant,
    ) -> Option<CancelCause> {
        if self.0.is_empty() {
            return None;
        }
        let run = || run.clone();
        let targets = [
            Some(CancelTarget::Task { task, run: None }),
            Some(CancelTarget::Run { run: run() }),
            group.map(|group| CancelTarget::Group {
                run: run(),
                group: group.clone(),
            }),
        ];
        targets.into_iter().flatten().find_map(|target| {
            let (since, cause) = self.0.get(&(tenant.clone(), target))?;
            (now.duration_since(*since) < REMEMBERED).then_some(*cause)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_late_is_found_for_a_while() {
        let (mut notices, start) = (Notices::default(), Instant::now());
        let (tenant, other): (TenantId, TenantId) = ("t".parse().unwrap(), "u".parse().unwrap());
        let (run, group): (RunId, GroupId) = ("r".parse().unwrap(), "g".parse().unwrap());
        let (task, cause) = (TaskId::new(), CancelCause::Group);
        let find = |notices: &Notices, tenant, task, group, secs| {
            notices.cause(tenant, task, &run, group, start + Duration::from_secs(secs))
        };
        assert_eq!(find(&notices, &tenant, task, Some(&group), 0), None);
        let mut add = |target| {
            let notice = CancelNotice {
                tenant: tenant.clone(),
                target,
                cause,
            };
            notices.add(&notice, start);
        };
        add(CancelTarget::Group {
            run: run.clone(),
            group: group.clone(),
        });
        add(CancelTarget::Task {
            task,
            run: Some(run.clone()),
        });
        let another = TaskId::new();
        assert_eq!(
            find(&notices, &tenant, another, Some(&group), 59),
            Some(cause)
        );
        assert_eq!(find(&notices, &tenant, task, None, 59), Some(cause));
        assert_eq!(find(&notices, &tenant, another, None, 0), None);
        assert_eq!(find(&notices, &other, another, Some(&group), 0), None);
        assert_eq!(find(&notices, &tenant, another, Some(&group), 60), None);
    }

    #[test]
    fn memory_is_bounded_and_gets_free_again() {
        let (mut notices, start) = (Notices::default(), Instant::now());
        let add = |notices: &mut Notices, now| {
            let notice = CancelNotice {
                tenant: "t".parse().unwrap(),
                target: CancelTarget::Task {
                    task: TaskId::new(),
                    run: None,
                },
                cause: CancelCause::Asked,
            };
            notices.add(&notice, now);
        };
        for _ in 0..2 * MOST {
            add(&mut notices, start);
        }
        assert_eq!(notices.0.len(), MOST);
        add(&mut notices, start + REMEMBERED);
        assert_eq!(notices.0.len(), 1);
    }
}
