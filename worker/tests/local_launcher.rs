//! The local launcher against the real kernel, with the real forker and, where it has been built,
//! the real sidecar.
#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use broker_schema::SandboxId;
use broker_schema::pool::{ImageRef, Limits};
use remuda_worker::backend::local::{HostProbe, LocalError, LocalLauncher, LocalOptions};

const SIDECAR: &str = "../target/static/x86_64-unknown-linux-gnu/sidecar/remuda-sidecar";
/// Long enough for a loaded machine; every wait ends as soon as its condition holds.
const PATIENCE: Duration = Duration::from_secs(30);

/// The options of a test, or the reason to skip it.
fn options(state: &Path) -> Result<LocalOptions, String> {
    let probe = HostProbe::run();
    if let Some(check) = probe
        .checks
        .iter()
        .find(|check| check.required && !check.ok)
    {
        return Err(format!("{}: {}", check.name, check.detail));
    }
    let sidecar = std::env::var_os("REMUDA_TEST_SIDECAR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join(SIDECAR),
        PathBuf::from,
    );
    if !sidecar.exists() {
        return Err(format!("no sidecar at {}", sidecar.display()));
    }
    Ok(LocalOptions {
        sidecar,
        forker_exe: Some(env!("CARGO_BIN_EXE_remuda-worker").into()),
        state_dir: state.to_owned(),
        allow_unenforced: false,
    })
}

macro_rules! options_or_skip {
    ($state:expr) => {
        match options($state.path()) {
            Ok(options) => options,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                return;
            }
        }
    };
}

/// A small sandbox, so that fifty fit anywhere.
fn limits() -> Limits {
    Limits {
        memory_bytes: 64 << 20,
        disk_bytes: 16 << 20,
        cpus: Some(1.0),
        ..Limits::default()
    }
}

/// Every process whose ancestor is this one, by pid.
fn descendants() -> BTreeSet<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let parent = after_name
            .split(' ')
            .nth(1)
            .and_then(|field| field.parse::<u32>().ok());
        parents.push((pid, parent.unwrap_or(0)));
    }
    let mut found = BTreeSet::from([std::process::id()]);
    loop {
        let more: Vec<u32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            found.remove(&std::process::id());
            return found;
        }
        found.extend(more);
    }
}

/// Folders of this test's launcher in every cgroup hierarchy. The launcher's names start with
/// the process id.
fn cgroup_folders() -> Vec<PathBuf> {
    cgroup_folders_of(std::process::id())
}

fn cgroup_folders_of(worker: u32) -> Vec<PathBuf> {
    let own = format!("{worker}-");
    let mounts = HostProbe::run().cgroups;
    let mut found = Vec::new();
    for controller in remuda_worker::backend::local::Controller::ALL {
        let Some(mounted) = mounts.find(controller) else {
            continue;
        };
        for instance in fs::read_dir(mounted.path.join("remuda"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if !instance.file_name().to_string_lossy().starts_with(&own) {
                continue;
            }
            for sandbox in fs::read_dir(instance.path())
                .into_iter()
                .flatten()
                .flatten()
            {
                if sandbox.file_type().is_ok_and(|kind| kind.is_dir()) {
                    found.push(sandbox.path());
                }
            }
        }
    }
    found
}

fn open_fds(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn mounts(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        tokio::task::yield_now().await;
    }
}

// The tests count this process's children and descriptors, so they are one test, in turn.
#[tokio::test(flavor = "multi_thread")]
async fn the_launcher_leaves_nothing_behind() {
    let state = tempfile::tempdir().unwrap();
    let options = options_or_skip!(state);
    fifty_at_once_leave_nothing(options.clone()).await;
    a_dropped_sandbox_is_cleaned_up(options.clone()).await;
    a_killed_forker_takes_its_sandboxes_along(options.clone()).await;
    a_broken_sidecar_is_named(options.clone(), state.path()).await;
    a_missing_image_is_named(options.clone()).await;
    links_of_an_image_lead_nowhere(options.clone()).await;
    a_killed_worker_leaves_nothing(options).await;
    until("no process is left", || descendants().is_empty()).await;
}

async fn create(launcher: &LocalLauncher) -> remuda_worker::backend::local::LocalSandbox {
    launcher
        .create(SandboxId::new(), &ImageRef::Host, &limits())
        .await
        .unwrap()
}

async fn fifty_at_once_leave_nothing(options: LocalOptions) {
    let launcher = LocalLauncher::start(options).await.unwrap();
    // The first makes the template, the runtime's threads and the like.
    create(&launcher).await.destroy().await.unwrap();
    let forker = *descendants().first().unwrap();
    let baseline = (
        open_fds(std::process::id()),
        open_fds(forker),
        mounts(forker),
    );

    let all = futures::future::join_all((0..50).map(|_| create(&launcher))).await;
    assert_eq!(descendants().len(), 1 + 50);
    let folders = cgroup_folders();
    assert!(folders.len() >= 50, "{folders:?}");
    for mut sandbox in all {
        assert!(sandbox.take_socket().is_some());
        assert!(sandbox.take_socket().is_none());
        assert_eq!(sandbox.oom_kills().unwrap(), 0);
        sandbox.reset_memory_peak().unwrap();
        sandbox.destroy().await.unwrap();
    }

    assert_eq!(descendants(), BTreeSet::from([forker]));
    assert_eq!(cgroup_folders(), Vec::<PathBuf>::new());
    let now = (
        open_fds(std::process::id()),
        open_fds(forker),
        mounts(forker),
    );
    assert_eq!(now, baseline);
    launcher.shutdown().await;
    assert_eq!(descendants(), BTreeSet::new());
}

async fn a_dropped_sandbox_is_cleaned_up(options: LocalOptions) {
    let launcher = LocalLauncher::start(options).await.unwrap();
    let sandbox = create(&launcher).await;
    assert_eq!(descendants().len(), 2);
    drop(sandbox);
    until("the dropped sandbox is gone", || {
        descendants().len() == 1 && cgroup_folders().is_empty()
    })
    .await;
    launcher.shutdown().await;
}

async fn a_killed_forker_takes_its_sandboxes_along(options: LocalOptions) {
    let launcher = LocalLauncher::start(options).await.unwrap();
    let sandboxes = [create(&launcher).await, create(&launcher).await];
    let all = descendants();
    assert_eq!(all.len(), 3);
    let pids = sandboxes
        .each_ref()
        .map(|sandbox| sandbox.pid().unwrap() as u32);
    let forker = *all.iter().find(|pid| !pids.contains(pid)).unwrap();
    let pid = nix::unistd::Pid::from_raw(forker as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    for sandbox in &sandboxes {
        tokio::time::timeout(PATIENCE, sandbox.died())
            .await
            .unwrap();
    }
    until("the link knows", || descendants().is_empty()).await;
    let again = launcher
        .create(SandboxId::new(), &ImageRef::Host, &limits())
        .await;
    assert!(matches!(again, Err(LocalError::ForkerLost)), "{again:?}");
    for sandbox in sandboxes {
        sandbox.destroy().await.unwrap();
    }
    assert_eq!(cgroup_folders(), Vec::<PathBuf>::new());
    launcher.shutdown().await;
}

async fn a_broken_sidecar_is_named(options: LocalOptions, state: &Path) {
    let sidecar = state.join("not-a-program");
    fs::write(&sidecar, "no program").unwrap();
    let launcher = LocalLauncher::start(LocalOptions { sidecar, ..options })
        .await
        .unwrap();
    let failed = launcher
        .create(SandboxId::new(), &ImageRef::Host, &limits())
        .await;
    match failed {
        Err(LocalError::Start { step, source }) => {
            assert_eq!(step, "execute the sidecar");
            assert_eq!(source.raw_os_error(), Some(libc::ENOEXEC));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(cgroup_folders(), Vec::<PathBuf>::new());
    launcher.shutdown().await;
}

async fn a_missing_image_is_named(options: LocalOptions) {
    let launcher = LocalLauncher::start(options).await.unwrap();
    let image = ImageRef::Rootfs("/nowhere/at/all".into());
    match launcher.create(SandboxId::new(), &image, &limits()).await {
        Err(LocalError::Image { image, source }) => {
            assert_eq!(image, "/nowhere/at/all");
            assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
        }
        other => panic!("{other:?}"),
    }
    launcher.shutdown().await;
}

/// An image may hold any link; none of them may lead a mount or a folder out of the sandbox.
async fn links_of_an_image_lead_nowhere(options: LocalOptions) {
    let image = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    for name in ["proc", "dev", "tmp", "workspace"] {
        std::os::unix::fs::symlink(outside.path(), image.path().join(name)).unwrap();
    }
    fs::write(image.path().join("marker"), "of the image").unwrap();
    let launcher = LocalLauncher::start(options).await.unwrap();
    let rootfs = ImageRef::Rootfs(image.path().to_owned());
    let sandbox = launcher
        .create(SandboxId::new(), &rootfs, &limits())
        .await
        .unwrap();
    let root = PathBuf::from(format!("/proc/{}/root", sandbox.pid().unwrap()));

    assert_eq!(
        fs::read_to_string(root.join("marker")).unwrap(),
        "of the image"
    );
    for name in ["proc", "dev", "tmp", "workspace"] {
        let kind = fs::symlink_metadata(root.join(name)).unwrap().file_type();
        assert!(kind.is_dir(), "{name}: {kind:?}");
    }
    assert!(root.join("dev/null").exists() && root.join("proc/1/status").exists());
    let refused = fs::write(root.join("proc/sys/kernel/hostname"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    fs::write(root.join("workspace/file"), "x").unwrap();
    sandbox.destroy().await.unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(fs::read_dir(image.path()).unwrap().count(), 5);
    launcher.shutdown().await;
}

const READY: &str = "two sandboxes are ready";

/// Kills a whole worker, [`a_worker_to_kill`], and looks for what it left.
async fn a_killed_worker_leaves_nothing(options: LocalOptions) {
    let mut worker = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_worker_to_kill", "--ignored", "--nocapture"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(worker.stdout.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap().contains(READY)),
        "the worker ended early"
    );
    let all = descendants();
    assert_eq!(all.len(), 1 + 1 + 2, "worker, forker, sandboxes: {all:?}");
    assert!(!cgroup_folders_of(worker.id()).is_empty());
    worker.kill().unwrap();
    worker.wait().unwrap();
    until("its processes are gone", || {
        all.iter()
            .all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    })
    .await;
    // The next worker removes its cgroups.
    let launcher = LocalLauncher::start(options).await.unwrap();
    assert_eq!(cgroup_folders_of(worker.id()), Vec::<PathBuf>::new());
    launcher.shutdown().await;
}

/// Not a test: the other process of [`a_killed_worker_leaves_nothing`].
#[tokio::test]
#[ignore = "started by another test"]
async fn a_worker_to_kill() {
    let state = tempfile::tempdir().unwrap();
    let options = options_or_skip!(state);
    let launcher = LocalLauncher::start(options).await.unwrap();
    let _sandboxes = [create(&launcher).await, create(&launcher).await];
    println!("{READY}");
    // Ends with its parent when nobody kills it.
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// Figures for people: `cargo test -p remuda-worker --test local_launcher -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, not a test"]
async fn measure() {
    let state = tempfile::tempdir().unwrap();
    let options = options_or_skip!(state);
    let launcher = LocalLauncher::start(options).await.unwrap();
    create(&launcher).await.destroy().await.unwrap();

    let (mut creates, mut destroys) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        let started = Instant::now();
        let sandbox = create(&launcher).await;
        creates.push(started.elapsed());
        let started = Instant::now();
        sandbox.destroy().await.unwrap();
        destroys.push(started.elapsed());
    }
    for (name, mut times) in [("create", creates), ("destroy", destroys)] {
        times.sort();
        println!(
            "{name}: p50 {:?}, p90 {:?}, p99 {:?}",
            times[100], times[180], times[198]
        );
    }
    for in_flight in [1, 4, 8] {
        let started = Instant::now();
        let loops = (0..in_flight).map(|_| async {
            for _ in 0..(400 / in_flight) {
                create(&launcher).await.destroy().await.unwrap();
            }
        });
        futures::future::join_all(loops).await;
        println!(
            "{in_flight} in flight: {:.0} a second",
            400.0 / started.elapsed().as_secs_f64()
        );
    }
    launcher.shutdown().await;
}
