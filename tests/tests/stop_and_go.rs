//! A fleet that ends leaves nothing on the host but its data, and goes on from
//! them.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use remuda_tests::fleet::{Fleet, default_config};
use remuda_tests::leftovers::{Seen, cgroups_of, descendants, mounts_beneath};
use remuda_tests::process::Process;
use remuda_tests::wait::eventually;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a fleet holds on the host while it works.
struct Held {
    worker: nix::unistd::Pid,
    processes: Vec<Seen>,
}

impl Held {
    fn by(fleet: &Fleet) -> Self {
        let worker = fleet.pid("worker").unwrap();
        let processes = descendants(fleet.up().pid()).unwrap();
        // Servers, daemons, the forker and four sandboxes at least.
        assert!(processes.len() >= 9, "{processes:?}");
        assert!(!cgroups_of(worker).unwrap().is_empty());
        Self { worker, processes }
    }

    fn left(&self, fleet_home: &std::path::Path) -> Result<(), String> {
        let running: Vec<i32> = self
            .processes
            .iter()
            .filter(|seen| seen.runs())
            .map(|seen| seen.pid)
            .collect();
        let mounts = mounts_beneath(fleet_home).unwrap();
        if running.is_empty() && mounts.is_empty() {
            Ok(())
        } else {
            Err(format!("processes {running:?}, mounts {mounts:?}"))
        }
    }
}

/// A command that has begun to run.
async fn busy(fleet: &Fleet) -> Process {
    let args = ["run", "--", "sh", "-c", "echo up; sleep 50 & sleep 50"];
    let process = Process::spawn(fleet.command(args).unwrap()).unwrap();
    eventually("running command", PATIENCE, async || {
        match process.stdout().unwrap().as_slice() {
            b"up\n" => Ok(()),
            _ => Err(process.stderr_tail()),
        }
    })
    .await
    .unwrap();
    process
}

async fn results(fleet: &Fleet) -> String {
    let finished = fleet.remuda(["results", "kept"]).await.unwrap();
    assert_eq!(finished.code(), 0, "{finished:?}");
    finished.text()
}

#[tokio::test]
async fn ctrl_c_leaves_nothing_but_the_data() {
    let fleet = Fleet::start().await.unwrap();
    let run = ["run", "--run", "kept", "--", "echo", "once"];
    assert_eq!(fleet.remuda(run).await.unwrap().text(), "once\n");
    let before = results(&fleet).await;
    assert_eq!(before.lines().count(), 1);
    let held = Held::by(&fleet);
    let home = fleet.home();

    assert!(fleet.stop().await.unwrap().success());
    // Not eventually: when it has ended, all of it has.
    held.left(home.path()).unwrap();
    let cgroups = cgroups_of(held.worker).unwrap();
    assert!(cgroups.is_empty(), "{cgroups:?}");
    assert!(!home.path().join("data/remuda.json").exists());

    let fleet = Fleet::start_in(home, default_config()).await.unwrap();
    assert_eq!(results(&fleet).await, before);
    let run = ["run", "--run", "kept", "--", "echo", "twice"];
    assert_eq!(fleet.remuda(run).await.unwrap().text(), "twice\n");
    let after = results(&fleet).await;
    assert_eq!(after.lines().count(), 2);
    assert!(after.starts_with(&before), "{after}");
}

#[tokio::test]
async fn a_killed_up_takes_everything_with_it_and_can_be_started_again() {
    let mut config = default_config();
    // What runs may go on for this long after the worker was told to end.
    config["worker"]["timings"]["drain"] = json!("1s");
    let fleet = Fleet::start_with(config).await.unwrap();
    let run = ["run", "--run", "kept", "--", "echo", "once"];
    assert_eq!(fleet.remuda(run).await.unwrap().text(), "once\n");
    let before = results(&fleet).await;
    let task = busy(&fleet).await;
    let held = Held::by(&fleet);
    let home = fleet.home();

    fleet.kill_up().await.unwrap();
    drop(task);
    eventually("clean host", PATIENCE, async || held.left(home.path()))
        .await
        .unwrap();
    // Nobody came after it who could have cleaned up: the worker itself did, with its servers
    // gone and a task in hand.
    let left = cgroups_of(held.worker).unwrap();
    assert!(left.is_empty(), "{left:?}");

    let fleet = Fleet::start_in(home, default_config()).await.unwrap();
    assert_eq!(results(&fleet).await, before);
    assert_eq!(fleet.run(["echo", "on"]).await.unwrap().text(), "on\n");
}

#[tokio::test]
async fn a_killed_worker_s_sandboxes_are_cleaned_up() {
    let fleet = Fleet::start().await.unwrap();
    let held = Held::by(&fleet);
    let sandboxes: Vec<Seen> = descendants(held.worker).unwrap();
    assert!(sandboxes.len() >= 5, "{sandboxes:?}");
    let killed = fleet.kill("worker").unwrap();
    fleet.started_again("worker", killed).await.unwrap();
    eventually("end of its sandboxes", PATIENCE, async || {
        let running: Vec<&Seen> = sandboxes.iter().filter(|seen| seen.runs()).collect();
        let cgroups = cgroups_of(killed).unwrap();
        if running.is_empty() && cgroups.is_empty() {
            Ok(())
        } else {
            Err(format!("{running:?} {cgroups:?}"))
        }
    })
    .await
    .unwrap();
    assert_eq!(fleet.run(["echo", "on"]).await.unwrap().text(), "on\n");
    let left = mounts_beneath(fleet.data()).unwrap();
    assert!(left.is_empty(), "{left:?}");
}
