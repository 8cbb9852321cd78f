//! What an operator says about tenants: weights and quotas.

use std::collections::{BTreeMap, BTreeSet};

use broker_schema::{TaskRequest, TenantId};
use remuda_lease::Quota;
use serde::{Deserialize, Serialize};

/// Stands for every tenant that is not named.
const OTHERS: &str = "*";

/// One tenant's share and limits. What is left out is not limited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantOptions {
    /// The tenant, or `*` for all that are not named.
    pub name: String,
    /// Its share among the tenants that wait: 1 (default) to 1000.
    #[serde(default = "one")]
    pub weight: u32,
    /// Most requests that may wait; what comes beyond is rejected.
    #[serde(default)]
    pub max_queued: Option<u32>,
    /// Most tasks that may run at once; the others wait.
    #[serde(default)]
    pub max_running: Option<u32>,
    /// Most sandboxes that it may have at once, idle sessions among them; tasks wait.
    #[serde(default)]
    pub max_sandboxes: Option<u32>,
    /// Most of its sandboxes that may be sessions; openings beyond are rejected. As many as
    /// `max_sandboxes` where it is left out.
    #[serde(default)]
    pub max_sessions: Option<u32>,
}

fn one() -> u32 {
    1
}

impl Default for TenantOptions {
    fn default() -> Self {
        Self {
            name: OTHERS.to_owned(),
            weight: 1,
            max_queued: None,
            max_running: None,
            max_sandboxes: None,
            max_sessions: None,
        }
    }
}

impl TenantOptions {
    /// What the claim looks at.
    pub(crate) fn quota(&self) -> Quota {
        let sessions = match (self.max_sessions, self.max_sandboxes) {
            (Some(sessions), Some(all)) => Some(sessions.min(all)),
            (sessions, all) => sessions.or(all),
        };
        Quota {
            sandboxes: self.max_sandboxes,
            running: self.max_running,
            sessions,
        }
    }

    /// Whether its tasks may have to wait for its own.
    pub(crate) fn is_held_back(&self) -> bool {
        self.max_running.is_some() || self.max_sandboxes.is_some()
    }
}

/// Everything that is wrong with the tenants of a configuration.
pub(crate) fn problems(tenants: &[TenantOptions]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut names = BTreeSet::new();
    for tenant in tenants {
        let name = &tenant.name;
        if name != OTHERS && TenantId::new(name).is_err() {
            problems.push(format!(
                "tenants: {name:?} is not [A-Za-z0-9_-]{{1,64}}, nor * for all that are not named"
            ));
        }
        if !names.insert(name) {
            problems.push(format!("tenants.{name}: is there twice"));
        }
        let most = TaskRequest::MOST_WEIGHT;
        if !(1..=most).contains(&tenant.weight) {
            let weight = tenant.weight;
            problems.push(format!(
                "tenants.{name}.weight: is {weight}, expected 1 to {most}"
            ));
        }
        if let (Some(sessions), Some(all)) = (tenant.max_sessions, tenant.max_sandboxes)
            && sessions > all
        {
            problems.push(format!(
                "tenants.{name}.max_sessions: {sessions} is more than max_sandboxes, {all}"
            ));
        }
    }
    problems
}

/// The tenants by name.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    named: BTreeMap<TenantId, TenantOptions>,
    others: TenantOptions,
}

impl Tenants {
    pub(crate) fn new(options: &[TenantOptions]) -> Self {
        let mut tenants = Self::default();
        for tenant in options {
            match TenantId::new(&tenant.name) {
                Ok(name) => {
                    tenants.named.insert(name, tenant.clone());
                }
                Err(_) => tenants.others = tenant.clone(),
            }
        }
        tenants
    }

    pub(crate) fn of(&self, tenant: &TenantId) -> &TenantOptions {
        self.named.get(tenant).unwrap_or(&self.others)
    }

    /// Whether anybody's queue is limited.
    pub(crate) fn limit_queues(&self) -> bool {
        self.others.max_queued.is_some()
            || self
                .named
                .values()
                .any(|tenant| tenant.max_queued.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_are_found_by_name_and_others_have_the_default() {
        let text = r#"[{"name": "a", "weight": 5, "max_sandboxes": 4},
            {"name": "*", "max_running": 2, "max_sessions": 1}]"#;
        let options: Vec<TenantOptions> = serde_json::from_str(text).unwrap();
        assert_eq!(problems(&options), Vec::<String>::new());
        let tenants = Tenants::new(&options);
        let quota = |tenant: &str| tenants.of(&tenant.parse().unwrap()).quota();
        assert_eq!(tenants.of(&"a".parse().unwrap()).weight, 5);
        let all_may_be_sessions = Quota {
            sandboxes: Some(4),
            running: None,
            sessions: Some(4),
        };
        assert_eq!(quota("a"), all_may_be_sessions);
        let others = Quota {
            sandboxes: None,
            running: Some(2),
            sessions: Some(1),
        };
        assert_eq!(quota("b"), others);
        let nobody = Tenants::default();
        assert_eq!(nobody.of(&"a".parse().unwrap()).quota(), Quota::default());
        assert!(!nobody.limit_queues() && !tenants.limit_queues());
    }

    #[test]
    fn what_the_documentation_shows_is_taken() {
        let page = include_str!("../../docs/operations.md");
        let (_, section) = page.split_once("\n## Tenants\n").unwrap();
        let (_, text) = section.split_once("```yaml\n").unwrap();
        let (text, _) = text.split_once("```").unwrap();
        let file = config::File::from_str(text, config::FileFormat::Yaml);
        let read = config::Config::builder().add_source(file).build().unwrap();
        let tenants: Vec<TenantOptions> = read.get("tenants").unwrap();
        assert_eq!(problems(&tenants), Vec::<String>::new());
        assert_eq!((tenants[0].weight, tenants[0].max_sessions), (4, Some(50)));
    }

    #[test]
    fn all_problems_are_told() {
        let named = |name: &str| TenantOptions {
            name: name.to_owned(),
            ..TenantOptions::default()
        };
        let mut heavy = named("a");
        heavy.weight = 0;
        let mut sessions = named("b");
        (sessions.max_sessions, sessions.max_sandboxes) = (Some(3), Some(2));
        let bad = [named("a b"), heavy, named("a"), sessions];
        let found = problems(&bad);
        assert_eq!(found.len(), 4, "{found:#?}");
        assert!(serde_json::from_str::<TenantOptions>(r#"{"name": "a", "wait": 3}"#).is_err());
    }
}
