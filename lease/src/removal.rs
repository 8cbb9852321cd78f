//! Results that are not kept: when they may be removed.

use std::time::Duration;

use broker_schema::{RunId, TaskId, TenantId};

use crate::error::LeaseError;
use crate::store::{LeaseStore, millis};

/// Whose results may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    pub tenant: TenantId,
    pub run: RunId,
    pub task: TaskId,
}

impl LeaseStore {
    /// A task has ended: its results may go after `kept`. The first that says so counts. A Redis
    /// that is flushed forgets it, and the results stay for as long as all others.
    pub async fn remove_later(
        &self,
        tenant: &TenantId,
        run: &RunId,
        task: TaskId,
        kept: Duration,
    ) -> Result<(), LeaseError> {
        let args = [
            tenant.to_string(),
            run.to_string(),
            task.to_string(),
            millis(kept),
        ];
        let answer = self.run(&self.scripts().remove_later, &args).await;
        answer.map(drop).map_err(LeaseError::Removals)
    }

    /// Whose results may go now, at most so many. They are named again until they are
    /// [`removed`](Self::removed). What cannot be read is dropped.
    pub async fn due_removals(&self, most: usize) -> Result<Vec<Removal>, LeaseError> {
        let mut answer = self
            .run(&self.scripts().due_removals, &[most.to_string()])
            .await
            .map_err(LeaseError::Removals)?;
        let (mut due, mut garbage) = (Vec::new(), Vec::new());
        while !answer.is_done() {
            let name = answer.text("removal").map_err(LeaseError::Removals)?;
            match parse(&name) {
                Some(removal) => due.push(removal),
                None => garbage.push(name),
            }
        }
        if !garbage.is_empty() {
            tracing::warn!(?garbage, "removals in redis cannot be read, dropped");
            let answer = self.run(&self.scripts().removed, &garbage).await;
            answer.map_err(LeaseError::Removals)?;
        }
        Ok(due)
    }

    /// Their results are gone.
    pub async fn removed(&self, removals: &[Removal]) -> Result<(), LeaseError> {
        let names: Vec<String> = removals.iter().map(name).collect();
        let answer = self.run(&self.scripts().removed, &names).await;
        answer.map(drop).map_err(LeaseError::Removals)
    }
}

fn name(removal: &Removal) -> String {
    format!("{}/{}/{}", removal.tenant, removal.run, removal.task)
}

fn parse(name: &str) -> Option<Removal> {
    let mut parts = name.split('/');
    let removal = Removal {
        tenant: parts.next()?.parse().ok()?,
        run: parts.next()?.parse().ok()?,
        task: parts.next()?.parse().ok()?,
    };
    parts.next().is_none().then_some(removal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_garbage_is_not() {
        let removal = Removal {
            tenant: "acme".parse().unwrap(),
            run: "r-1".parse().unwrap(),
            task: TaskId::new(),
        };
        assert_eq!(parse(&name(&removal)), Some(removal.clone()));
        for bad in [
            "",
            "a/b",
            "a/b/c",
            "a b/r/x",
            &format!("{}/x", name(&removal)),
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
