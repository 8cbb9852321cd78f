//! Cancelling: what is asked, what is told on, and why something was cancelled.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ErrorCode, ErrorInfo, GroupId, RunId, TaskId, TenantId};

/// Asks the dispatchers to end what has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CancelRequest {
    pub tenant: TenantId,
    /// Needed where the scope is a task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskId>,
    /// Needed for a group and a run. With a task: where known, the task's
    /// terminal is written at once; else when the task is next touched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// Needed where the scope is a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// Said outright, so that a field that is left out never widens it.
    #[serde(default, skip_serializing_if = "CancelScope::is_task")]
    pub scope: CancelScope,
}

/// How much is to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelScope {
    #[default]
    Task,
    /// All tasks of a group of a run.
    Group,
    /// All tasks of a run, and its sessions.
    Run,
}

impl CancelScope {
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde calls it with a reference"
    )]
    fn is_task(&self) -> bool {
        *self == Self::Task
    }
}

impl CancelRequest {
    pub fn task(tenant: TenantId, task: TaskId, run: Option<RunId>) -> Self {
        Self {
            tenant,
            task: Some(task),
            run,
            group: None,
            scope: CancelScope::Task,
        }
    }

    pub fn group(tenant: TenantId, run: RunId, group: GroupId) -> Self {
        Self {
            tenant,
            task: None,
            run: Some(run),
            group: Some(group),
            scope: CancelScope::Group,
        }
    }

    pub fn run(tenant: TenantId, run: RunId) -> Self {
        Self {
            tenant,
            task: None,
            run: Some(run),
            group: None,
            scope: CancelScope::Run,
        }
    }

    /// What is to end, where the fields say one thing.
    pub fn target(&self) -> Result<CancelTarget, ErrorInfo> {
        let missing = |field: &str| {
            let scope = match self.scope {
                CancelScope::Task => "task",
                CancelScope::Group => "group",
                CancelScope::Run => "run",
            };
            ErrorInfo::new(
                ErrorCode::InvalidField,
                format!("is missing, the scope {scope} needs it"),
            )
            .at(field)
        };
        let run = || self.run.clone().ok_or_else(|| missing("run"));
        match self.scope {
            CancelScope::Task => Ok(CancelTarget::Task {
                task: self.task.ok_or_else(|| missing("task"))?,
                run: self.run.clone(),
            }),
            CancelScope::Group => Ok(CancelTarget::Group {
                run: run()?,
                group: self.group.clone().ok_or_else(|| missing("group"))?,
            }),
            CancelScope::Run => Ok(CancelTarget::Run { run: run()? }),
        }
    }
}

/// What is to end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelTarget {
    Task {
        task: TaskId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<RunId>,
    },
    Group {
        run: RunId,
        group: GroupId,
    },
    Run {
        run: RunId,
    },
}

impl CancelTarget {
    /// Whether a task of this run and group is meant.
    pub fn covers(&self, task: TaskId, run: &RunId, group: Option<&GroupId>) -> bool {
        match self {
            Self::Task { task: one, .. } => *one == task,
            Self::Group {
                run: its,
                group: one,
            } => its == run && Some(one) == group,
            Self::Run { run: one } => one == run,
        }
    }
}

/// What was cancelled: a hint on `evt.cancel`, so that nobody waits for the
/// next claim or renewal, where the same is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CancelNotice {
    pub tenant: TenantId,
    pub target: CancelTarget,
    pub cause: CancelCause,
}

impl CancelNotice {
    /// Whether a task of this tenant, run and group is meant.
    pub fn covers(
        &self,
        tenant: &TenantId,
        task: TaskId,
        run: &RunId,
        group: Option<&GroupId>,
    ) -> bool {
        self.tenant == *tenant && self.target.covers(task, run, group)
    }
}

/// Why a task was cancelled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelCause {
    /// Somebody asked for the end of the task.
    #[default]
    Asked,
    /// Of its group.
    Group,
    /// Of its run.
    Run,
    /// The group had as many valid results as were asked for.
    Enough { valid: u32 },
}

impl CancelCause {
    /// For people: a clause that "it was cancelled" can stand before.
    pub fn evidence(self) -> String {
        match self {
            Self::Asked => "somebody asked for it".to_owned(),
            Self::Group => "somebody cancelled its group".to_owned(),
            Self::Run => "somebody cancelled its run".to_owned(),
            Self::Enough { valid } => format!("its group has the {valid} valid results asked for"),
        }
    }
}

/// As it is kept in Redis.
impl fmt::Display for CancelCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("asked"),
            Self::Group => f.write_str("group"),
            Self::Run => f.write_str("run"),
            Self::Enough { valid } => write!(f, "enough-{valid}"),
        }
    }
}

impl FromStr for CancelCause {
    type Err = UnknownCause;

    fn from_str(text: &str) -> Result<Self, UnknownCause> {
        match text {
            // An older writer sets a flag without a cause.
            "asked" | "1" | "" => Ok(Self::Asked),
            "group" => Ok(Self::Group),
            "run" => Ok(Self::Run),
            other => other
                .strip_prefix("enough-")
                .and_then(|valid| valid.parse().ok())
                .map(|valid| Self::Enough { valid })
                .ok_or(UnknownCause),
        }
    }
}

/// A text that is no cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is no cause of a cancellation")]
pub struct UnknownCause;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_left_out_never_widens_the_scope() {
        let read = |text: &str| serde_json::from_str::<CancelRequest>(text).unwrap();
        let task = TaskId::new();
        let old = read(&format!(r#"{{"tenant":"t","task":"{task}","run":"r"}}"#));
        let run: RunId = "r".parse().unwrap();
        assert_eq!(
            old.target().unwrap(),
            CancelTarget::Task {
                task,
                run: Some(run.clone())
            }
        );
        for (text, field) in [
            (r#"{"tenant":"t"}"#, "task"),
            (r#"{"tenant":"t","run":"r"}"#, "task"),
            (r#"{"tenant":"t","run":"r","group":"g"}"#, "task"),
            (r#"{"tenant":"t","scope":"group","group":"g"}"#, "run"),
            (r#"{"tenant":"t","scope":"group","run":"r"}"#, "group"),
            (r#"{"tenant":"t","scope":"run"}"#, "run"),
        ] {
            let error = read(text).target().unwrap_err();
            assert_eq!(error.field.as_deref(), Some(field), "{text}");
        }
        let whole = read(r#"{"tenant":"t","scope":"run","run":"r"}"#);
        assert_eq!(whole.target().unwrap(), CancelTarget::Run { run });
    }

    #[test]
    fn a_notice_covers_what_it_names_and_no_more() {
        let (task, other) = (TaskId::new(), TaskId::new());
        let run = |name: &str| name.parse::<RunId>().unwrap();
        let group: GroupId = "g".parse().unwrap();
        let tenant: TenantId = "t".parse().unwrap();
        let notice = |target| CancelNotice {
            tenant: tenant.clone(),
            target,
            cause: CancelCause::Asked,
        };
        let cases = [
            (CancelTarget::Task { task, run: None }, [true, true, false]),
            (
                CancelTarget::Group {
                    run: run("r"),
                    group: group.clone(),
                },
                [true, false, false],
            ),
            (CancelTarget::Run { run: run("r") }, [true, true, true]),
        ];
        for (target, expected) in cases {
            let notice = notice(target);
            let found = [
                notice.covers(&tenant, task, &run("r"), Some(&group)),
                notice.covers(&tenant, task, &run("r"), None),
                notice.covers(&tenant, other, &run("r"), None),
            ];
            assert_eq!(found, expected, "{notice:?}");
            assert!(!notice.covers(&"u".parse().unwrap(), task, &run("r"), Some(&group)));
        }
        let elsewhere = notice(CancelTarget::Run { run: run("r") });
        assert!(!elsewhere.covers(&tenant, task, &run("q"), Some(&group)));
    }

    #[test]
    fn causes_are_kept_as_texts() {
        for cause in [
            CancelCause::Asked,
            CancelCause::Group,
            CancelCause::Run,
            CancelCause::Enough { valid: 7 },
        ] {
            assert_eq!(cause.to_string().parse(), Ok(cause));
        }
        assert_eq!("1".parse(), Ok(CancelCause::Asked));
        for bad in ["enough", "enough-", "enough-x", "enough--1", "what"] {
            assert_eq!(bad.parse::<CancelCause>(), Err(UnknownCause), "{bad}");
        }
    }
}
