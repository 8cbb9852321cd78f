//! What a fault has in hand while it strikes.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use remuda_client::Client;
use serde::{Deserialize, Serialize};

use super::catalogue::Forgiven;
use super::load::{Counts, Load};
use super::random::Random;
use super::shape::Pace;
use super::world::World;

/// A promise that was not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Violation {
    /// `I1` to `I9`, or `check` for what a fault demands beside them.
    pub(crate) invariant: String,
    pub(crate) detail: String,
}

impl Violation {
    pub(crate) fn new(invariant: &str, detail: impl Into<String>) -> Self {
        Self {
            invariant: invariant.to_owned(),
            detail: detail.into(),
        }
    }
}

/// A fleet under load, numbers that follow from the seed, and a place for what
/// is found.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) load: Load,
    pub(crate) random: Random,
    /// What is no violation after this.
    pub(crate) forgiven: Forgiven,
    /// The long form of a fault.
    pub(crate) full: bool,
    pub(crate) notes: Vec<String>,
    pub(crate) violations: Vec<Violation>,
}

/// How long a load may take to come to some point.
const PATIENCE: Duration = Duration::from_secs(90);

impl Scene {
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// What the fault demands beside the invariants.
    pub(crate) fn demand(&mut self, good: bool, detail: impl Into<String>) {
        if !good {
            self.violations.push(Violation::new("check", detail));
        }
    }

    pub(crate) fn client(&self) -> &Client {
        self.load.client()
    }

    pub(crate) fn pace(&self) -> Pace {
        self.world.shape().pace
    }

    /// Something that leases need was away: on a busy machine perhaps for longer
    /// than they hold, which takes sessions with it.
    pub(crate) fn was_away(&mut self, what: &str, away: Duration) {
        // A second between renewals, and a margin of two.
        if away + Duration::from_secs(4) > self.pace().ttl() {
            self.forgiven.sessions = true;
            self.note(format!(
                "{what} was away for {away:.1?}: sessions may be lost"
            ));
        }
    }

    /// A time past which no lease holds that was not renewed.
    pub(crate) fn past_ttl(&self) -> Duration {
        self.pace().ttl() + Duration::from_secs(3)
    }

    /// Waits for a moment of the seed's choice while the load is being
    /// submitted: between two parts of it, in percent.
    pub(crate) async fn moment(&mut self, first: u64, last: u64) {
        let over = self.world.shape().load.over;
        let at = over * self.random.between(first, last) as u32 / 100;
        tokio::time::sleep_until(self.load.began + at).await;
    }

    /// Goes on after a time of the seed's choice, in milliseconds.
    pub(crate) async fn wait(&mut self, first: u64, last: u64) -> Duration {
        let time = self.random.millis(first, last);
        tokio::time::sleep(time).await;
        time
    }

    /// Waits until the load has come so far.
    pub(crate) async fn until(
        &self,
        what: &str,
        wanted: impl FnMut(&Counts) -> bool,
    ) -> anyhow::Result<()> {
        let mut counts = self.load.notebook.counts();
        let come = tokio::time::timeout(PATIENCE, counts.wait_for(wanted)).await;
        come.with_context(|| format!("{what} did not come within {PATIENCE:?}"))?
            .context("nobody counts any more")?;
        Ok(())
    }

    /// One of the workers, of the seed's choice.
    pub(crate) fn a_worker(&mut self) -> usize {
        self.random.index(self.world.workers.len())
    }

    pub(crate) fn a_dispatcher(&mut self) -> usize {
        self.random.index(self.world.dispatchers.len())
    }

    /// The incarnation that Redis knows now.
    pub(crate) async fn incarnation(&self) -> anyhow::Result<u32> {
        let leases = self.world.leases().await?;
        let known = leases.incarnation().await.context("cannot ask Redis")?;
        let known = known.unwrap_or_default();
        ensure!(known > 0, "Redis knows no incarnation");
        Ok(known)
    }
}
