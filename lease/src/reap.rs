//! Workers that are not heard of any more.

use std::time::Duration;

use broker_schema::WorkerId;

use crate::error::LeaseError;
use crate::keys;
use crate::store::{LeaseStore, millis};

impl LeaseStore {
    /// Takes out workers whose heartbeat ran out, with their inventory and leases, and tells of
    /// them: at least once, and again until they are buried.
    pub async fn reap(&self) -> Result<Vec<WorkerId>, LeaseError> {
        let args = [self.ttl_millis(), millis(keys::TOLD_AGAIN)];
        let mut answer = self
            .run(&self.scripts().reap, &args)
            .await
            .map_err(LeaseError::Reap)?;
        let mut workers = Vec::new();
        while !answer.is_done() {
            let text = answer.text("worker id").map_err(LeaseError::Reap)?;
            if let Ok(worker) = text.parse() {
                workers.push(worker);
            } else {
                tracing::warn!(worker = text, "a dead worker's name cannot be read");
            }
        }
        Ok(workers)
    }

    /// Takes out a worker that is known to be gone, unless it was heard of within `silent`; true
    /// where it was. [`reap`](Self::reap) tells of it from then on.
    pub async fn declare_dead(
        &self,
        worker: &WorkerId,
        silent: Duration,
    ) -> Result<bool, LeaseError> {
        let args = [worker.to_string(), millis(silent)];
        let answer = self.run(&self.scripts().declare_dead, &args).await;
        answer
            .and_then(|mut answer| answer.tag())
            .map(|tag| tag == "dead")
            .map_err(LeaseError::Reap)
    }

    /// A dead worker's placements are seen to.
    pub async fn bury(&self, worker: &WorkerId) -> Result<(), LeaseError> {
        let answer = self.run(&self.scripts().bury, &[worker.to_string()]).await;
        answer.map(drop).map_err(LeaseError::Reap)
    }
}
