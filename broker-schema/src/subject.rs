//! Subjects: built and parsed here and nowhere else.

use crate::{InvalidId, PoolId, RunId, SandboxId, TaskId, TenantId, Token, WorkerId};

/// Builds the fleet's subjects under one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subjects {
    prefix: Token,
}

impl Default for Subjects {
    fn default() -> Self {
        Self::new("remuda").unwrap_or_else(|_| unreachable!("the default prefix is a token"))
    }
}

/// A subject of the fleet, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParsedSubject {
    Request {
        tenant: TenantId,
        pool: PoolId,
    },
    Placement {
        worker: WorkerId,
        tenant: TenantId,
        sandbox: SandboxId,
    },
    Result {
        tenant: TenantId,
        run: RunId,
        task: TaskId,
    },
    Terminal {
        tenant: TenantId,
        run: RunId,
        task: TaskId,
    },
    DeadLetter {
        tenant: TenantId,
        pool: PoolId,
    },
}

impl Subjects {
    /// `prefix` is one token, so that it cannot widen a subscription.
    pub fn new(prefix: &str) -> Result<Self, InvalidId> {
        Token::new(prefix).map(|prefix| Self { prefix })
    }

    pub fn prefix(&self) -> &str {
        self.prefix.as_str()
    }

    fn under(&self, rest: std::fmt::Arguments<'_>) -> String {
        format!("{}.{rest}", self.prefix.as_str())
    }

    pub fn request(&self, tenant: &TenantId, pool: &PoolId) -> String {
        self.under(format_args!("req.{tenant}.{pool}"))
    }

    pub fn requests(&self) -> String {
        self.under(format_args!("req.*.*"))
    }

    pub fn placement(&self, worker: &WorkerId, tenant: &TenantId, sandbox: SandboxId) -> String {
        self.under(format_args!("run.{worker}.{tenant}.{sandbox}"))
    }

    pub fn placements(&self) -> String {
        self.under(format_args!("run.*.*.*"))
    }

    pub fn placements_of(&self, worker: &WorkerId) -> String {
        self.under(format_args!("run.{worker}.*.*"))
    }

    pub fn result(&self, tenant: &TenantId, run: &RunId, task: TaskId) -> String {
        self.under(format_args!("res.{tenant}.{run}.{task}"))
    }

    pub fn results(&self) -> String {
        self.under(format_args!("res.*.*.*"))
    }

    pub fn results_of_run(&self, tenant: &TenantId, run: &RunId) -> String {
        self.under(format_args!("res.{tenant}.{run}.*"))
    }

    pub fn terminal(&self, tenant: &TenantId, run: &RunId, task: TaskId) -> String {
        self.under(format_args!("term.{tenant}.{run}.{task}"))
    }

    pub fn terminals(&self) -> String {
        self.under(format_args!("term.*.*.*"))
    }

    pub fn terminals_of_run(&self, tenant: &TenantId, run: &RunId) -> String {
        self.under(format_args!("term.{tenant}.{run}.*"))
    }

    /// Every terminal of one task whatever its run: `term.<tenant>.*.<task>`.
    pub fn terminals_of_task(&self, tenant: &TenantId, task: TaskId) -> String {
        self.under(format_args!("term.{tenant}.*.{task}"))
    }

    /// What the server republishes of TERM and RES once it has stored it:
    /// `live.term.<tenant>.<run>.<task>`. Core messages: a hint that is true
    /// but may be missed.
    pub fn live(&self, stored: &str) -> String {
        let rest = stored
            .strip_prefix(self.prefix.as_str())
            .and_then(|rest| rest.strip_prefix('.'))
            .unwrap_or(stored);
        self.under(format_args!("live.{rest}"))
    }

    pub fn dead_letter(&self, tenant: &TenantId, pool: &PoolId) -> String {
        self.under(format_args!("dlq.{tenant}.{pool}"))
    }

    pub fn dead_letters(&self) -> String {
        self.under(format_args!("dlq.*.*"))
    }

    /// Dead letters of one tenant, one pool, or both; of all where neither is said.
    pub fn dead_letters_of(&self, tenant: Option<&TenantId>, pool: Option<&PoolId>) -> String {
        let tenant = tenant.map_or("*", TenantId::as_str);
        let pool = pool.map_or("*", PoolId::as_str);
        self.under(format_args!("dlq.{tenant}.{pool}"))
    }

    /// Appended to whenever a new incarnation is needed; its sequence is it.
    pub fn incarnation(&self) -> String {
        self.under(format_args!("incarnation"))
    }

    /// Hints to one worker, core.
    pub fn control(&self, worker: &WorkerId) -> String {
        self.under(format_args!("ctl.{worker}"))
    }

    /// Cancel requests of one tenant, core request and reply.
    pub fn cancel(&self, tenant: &TenantId) -> String {
        self.under(format_args!("cancel.{tenant}"))
    }

    pub fn cancels(&self) -> String {
        self.under(format_args!("cancel.*"))
    }

    pub fn lane_hint(&self) -> String {
        self.under(format_args!("evt.lane"))
    }

    pub fn offer_hint(&self) -> String {
        self.under(format_args!("evt.offer"))
    }

    /// What was cancelled, for every dispatcher and worker at once, core.
    pub fn cancel_hint(&self) -> String {
        self.under(format_args!("evt.cancel"))
    }

    /// What a pool has to give, once a second, core.
    pub fn credit(&self, pool: &PoolId) -> String {
        self.under(format_args!("evt.credit.{pool}"))
    }

    pub fn credits(&self) -> String {
        self.under(format_args!("evt.credit.*"))
    }

    /// Pools have lost their leader.
    pub fn leader_hint(&self) -> String {
        self.under(format_args!("evt.leader"))
    }

    /// Takes a subject apart; `None` where it is not one of the fleet's.
    pub fn parse(&self, subject: &str) -> Option<ParsedSubject> {
        let rest = subject
            .strip_prefix(self.prefix.as_str())?
            .strip_prefix('.')?;
        let mut tokens = rest.split('.');
        let kind = tokens.next()?;
        let mut parts = [""; 3];
        let mut count = 0;
        for token in tokens {
            *parts.get_mut(count)? = token;
            count += 1;
        }
        match (kind, parts, count) {
            ("req", [tenant, pool, _], 2) => Some(ParsedSubject::Request {
                tenant: tenant.parse().ok()?,
                pool: pool.parse().ok()?,
            }),
            ("dlq", [tenant, pool, _], 2) => Some(ParsedSubject::DeadLetter {
                tenant: tenant.parse().ok()?,
                pool: pool.parse().ok()?,
            }),
            ("run", [worker, tenant, sandbox], 3) => Some(ParsedSubject::Placement {
                worker: worker.parse().ok()?,
                tenant: tenant.parse().ok()?,
                sandbox: sandbox.parse().ok()?,
            }),
            ("res", [tenant, run, task], 3) => Some(ParsedSubject::Result {
                tenant: tenant.parse().ok()?,
                run: run.parse().ok()?,
                task: task.parse().ok()?,
            }),
            ("term", [tenant, run, task], 3) => Some(ParsedSubject::Terminal {
                tenant: tenant.parse().ok()?,
                run: run.parse().ok()?,
                task: task.parse().ok()?,
            }),
            _ => None,
        }
    }
}

/// Whether a subscription or a consumer's filter covers a subject. The empty
/// filter covers everything, as a consumer's does.
pub fn subject_matches(filter: &str, subject: &str) -> bool {
    if filter.is_empty() {
        return true;
    }
    let mut tokens = subject.split('.');
    for wanted in filter.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_cover_what_the_server_says_they_do() {
        for (filter, subject, covered) in [
            ("", "a.b", true),
            (">", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.*.c", "a.b.c", true),
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.b.c", "a.b", false),
        ] {
            assert_eq!(
                subject_matches(filter, subject),
                covered,
                "{filter} {subject}"
            );
        }
    }

    #[test]
    fn what_is_built_parses_back() {
        let subjects = Subjects::default();
        let tenant: TenantId = "acme".parse().unwrap();
        let run: RunId = "run-7".parse().unwrap();
        let pool: PoolId = "py_311".parse().unwrap();
        let worker: WorkerId = "w1".parse().unwrap();
        let (task, sandbox) = (TaskId::new(), SandboxId::new());
        let cases = [
            (
                subjects.request(&tenant, &pool),
                ParsedSubject::Request {
                    tenant: tenant.clone(),
                    pool: pool.clone(),
                },
            ),
            (
                subjects.placement(&worker, &tenant, sandbox),
                ParsedSubject::Placement {
                    worker,
                    tenant: tenant.clone(),
                    sandbox,
                },
            ),
            (
                subjects.result(&tenant, &run, task),
                ParsedSubject::Result {
                    tenant: tenant.clone(),
                    run: run.clone(),
                    task,
                },
            ),
            (
                subjects.terminal(&tenant, &run, task),
                ParsedSubject::Terminal {
                    tenant: tenant.clone(),
                    run,
                    task,
                },
            ),
            (
                subjects.dead_letter(&tenant, &pool),
                ParsedSubject::DeadLetter { tenant, pool },
            ),
        ];
        for (subject, expected) in cases {
            assert_eq!(subjects.parse(&subject), Some(expected), "{subject}");
        }
    }

    #[test]
    fn what_is_not_ours_is_not_parsed() {
        let subjects = Subjects::default();
        for subject in [
            "",
            "remuda",
            "remuda.req.a",
            "remuda.req.a.b.c",
            "remuda.req.*.b",
            "remudax.req.a.b",
            "other.req.a.b",
            "remuda.term.a.b.not-a-uuid",
            "remuda.run.w.t.s.more",
        ] {
            assert_eq!(subjects.parse(subject), None, "{subject}");
        }
    }

    #[test]
    fn live_copies_stand_beside_what_is_stored() {
        let subjects = Subjects::default();
        assert_eq!(subjects.live("remuda.term.a.b.c"), "remuda.live.term.a.b.c");
    }
}
