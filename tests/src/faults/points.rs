//! Points of a daemon's way at which it is told to die: by a file that it takes
//! away, so that it dies once however often it is started again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use remuda_telemetry::failpoint::{dispatcher, worker};
use serde_json::{Value, json};

/// The points of one run.
#[derive(Debug, Clone)]
pub(crate) struct Points {
    folder: PathBuf,
}

/// What every worker passes, sooner or later.
pub(crate) fn of_workers() -> Vec<&'static str> {
    [&worker::STEPS[..], &worker::SIDE_STEPS].concat()
}

/// What every dispatcher passes, sooner or later.
pub(crate) fn of_dispatchers() -> Vec<&'static str> {
    [&dispatcher::STEPS[..], &dispatcher::SIDE_STEPS].concat()
}

impl Points {
    pub(crate) fn new(folder: &Path) -> anyhow::Result<Self> {
        let folder = folder.join("points");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn file(&self, point: &str) -> PathBuf {
        self.folder.join(point)
    }

    /// For a daemon's configuration: dies at each of these once it is armed,
    /// and breaks a rule for good where there is a mutation.
    pub(crate) fn config(&self, points: &[&str], mutation: Option<&str>) -> Value {
        let armed = |point: &&str| format!("{point}=return({})", self.file(point).display());
        let mutation = mutation.map(|point| format!("{point}=return"));
        let each: Vec<String> = points.iter().map(armed).chain(mutation).collect();
        json!({"telemetry": {"failpoints": each.join(";")}})
    }

    /// The next daemon that comes to this point dies there.
    pub(crate) fn arm(&self, point: &str) -> anyhow::Result<()> {
        let file = self.file(point);
        std::fs::write(&file, "").with_context(|| format!("cannot write {}", file.display()))
    }

    /// Whether one has died there, at the latest after `patience`; nobody does
    /// afterwards.
    pub(crate) async fn fired(&self, point: &str, patience: Duration) -> bool {
        let file = self.file(point);
        let gone = crate::wait::eventually("death at a point", patience, async || {
            if file.exists() {
                Err("not yet")
            } else {
                Ok(())
            }
        });
        gone.await.is_ok() || std::fs::remove_file(&file).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_point_fires_once() {
        let folder = tempfile::tempdir().unwrap();
        let points = Points::new(folder.path()).unwrap();
        let config = points.config(&["worker.fetched"], Some("worker.zombie"));
        let told = config["telemetry"]["failpoints"].as_str().unwrap();
        let file = folder.path().join("points/worker.fetched");
        let wanted = format!(
            "worker.fetched=return({});worker.zombie=return",
            file.display()
        );
        assert_eq!(told, wanted);
        points.arm("worker.fetched").unwrap();
        assert!(!points.fired("worker.fetched", Duration::ZERO).await);
        assert!(!file.exists(), "it is disarmed");
        points.arm("worker.fetched").unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(points.fired("worker.fetched", Duration::ZERO).await);
    }
}
