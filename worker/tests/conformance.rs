//! What every backend must do, in one place: each test runs on the fake and on the local one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "conformance/world.rs"]
mod world;

use std::time::{Duration, Instant};

use broker_schema::Epoch;
use remuda_proto::{code, v1};
use world::{Held, LONG, Mark, World};

/// Every test below, for both backends.
macro_rules! conformance {
    ($($name:ident),+ $(,)?) => {
        mod fake {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let world = super::World::fake().await;
                super::$name(&world).await;
                world.end().await;
            })+
        }
        mod local {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some(world) = super::World::local(stringify!($name)).await else {
                    return;
                };
                super::$name(&world).await;
                world.end().await;
            })+
        }
    };
}

conformance!(
    exit_codes_are_told,
    both_streams_come_apart_and_byte_for_byte,
    stdin_environment_and_folder_arrive,
    a_missing_program_is_127,
    a_file_that_is_written_is_read,
    no_path_leads_out,
    a_command_out_of_time_is_killed_and_its_output_kept,
    dropping_the_events_kills_the_command,
    a_signal_reaches_the_command,
    a_reset_leaves_no_process_and_no_file,
    a_lower_epoch_is_refused_and_a_higher_one_takes_over,
    output_beyond_its_limit_is_counted_and_dropped,
    running_out_of_memory_is_counted,
    what_has_died_says_so,
    destroying_leaves_nothing,
);

async fn exit_codes_are_told(world: &World) {
    let sandbox = world.sandbox().await;
    for code in [0, 1, 3, 255] {
        let ran = sandbox.run(world.exit(code)).await;
        assert_eq!((ran.exit.code, ran.exit.signal), (code, 0));
        assert!(!ran.exit.timed_out);
    }
    for (program, code) in [("/bin/true", 0), ("/bin/false", 1)] {
        assert_eq!(sandbox.run(vec![program.into()]).await.exit.code, code);
    }
    sandbox.destroy().await;
}

async fn both_streams_come_apart_and_byte_for_byte(world: &World) {
    let sandbox = world.sandbox().await;
    let ran = sandbox.run(world.print("out\\n", "err")).await;
    assert_eq!(ran.stdout, world.printed("out\\n"));
    assert_eq!(ran.stderr, b"err");
    assert_eq!(ran.exit.stdout_bytes, ran.stdout.len() as u64);
    assert_eq!(ran.exit.stderr_bytes, 3);
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let mut request = sandbox.request(world.cat());
    request.stdin = bytes.clone().into();
    assert!(sandbox.execute(request).await.stdout == bytes, "all bytes");
    sandbox.destroy().await;
}

async fn stdin_environment_and_folder_arrive(world: &World) {
    let sandbox = world.sandbox().await;
    let mut request = sandbox.request(world.env("NAME"));
    request.env = vec!["PATH=/usr/bin:/bin".into(), "NAME=a b=c".into()];
    assert_eq!(sandbox.execute(request).await.stdout, b"a b=c");
    let ran = sandbox.run(world.pwd()).await;
    assert_eq!(ran.stdout, b"/workspace");
    let mut request = sandbox.request(world.pwd());
    request.work_dir = "/tmp".into();
    assert_eq!(sandbox.execute(request).await.stdout, b"/tmp");
    sandbox.destroy().await;
}

async fn a_missing_program_is_127(world: &World) {
    let sandbox = world.sandbox().await;
    let ran = sandbox.run(vec!["no-such-program".into()]).await;
    assert_eq!(ran.exit.code, 127);
    let why = &ran.exit.spawn_error;
    assert!(why.contains("no-such-program"), "{why}");
    sandbox.destroy().await;
}

async fn a_file_that_is_written_is_read(world: &World) {
    let sandbox = world.sandbox().await;
    let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    sandbox.write("dir/file", &content).await.unwrap();
    // Relative means the workspace.
    let read = sandbox.read("/workspace/dir/file", 0, 0).await.unwrap();
    assert!(read.content == content && read.eof);
    assert_eq!(read.size, content.len() as u64);
    let part = sandbox.read("dir/file", 9_990, 4).await.unwrap();
    assert_eq!(
        (&part.content[..], part.eof),
        (&content[9_990..9_994], false)
    );
    sandbox.write("dir/file", b"shorter").await.unwrap();
    let read = sandbox.read("dir/file", 0, 0).await.unwrap();
    assert_eq!(&read.content[..], b"shorter");
    let missing = sandbox.read("nothing", 0, 0).await.unwrap_err();
    assert_eq!(missing.code(), Some(code::NOT_FOUND), "{missing}");
    sandbox.destroy().await;
}

async fn no_path_leads_out(world: &World) {
    let sandbox = world.sandbox().await;
    for path in ["../../etc/escaped", "/../etc/escaped", "a/../../../../x"] {
        let error = sandbox.write(path, b"x").await.unwrap_err();
        assert_eq!(error.code(), Some(code::PATH_ESCAPES), "{path}: {error}");
        let error = sandbox.read(path, 0, 0).await.unwrap_err();
        assert_eq!(error.code(), Some(code::PATH_ESCAPES), "{path}: {error}");
    }
    sandbox.destroy().await;
}

async fn a_command_out_of_time_is_killed_and_its_output_kept(world: &World) {
    let sandbox = world.sandbox().await;
    let mut request = sandbox.request(world.print_and_sleep("early", 600_000));
    request.timeout_ms = 300;
    let began = Instant::now();
    let ran = sandbox.execute(request).await;
    assert!(ran.exit.timed_out);
    assert_eq!((ran.exit.code, ran.exit.signal), (137, 9));
    assert_eq!(ran.stdout, b"early");
    assert!(began.elapsed() < LONG);
    sandbox.idle().await;
    sandbox.destroy().await;
}

async fn dropping_the_events_kills_the_command(world: &World) {
    let sandbox = world.sandbox().await;
    let request = sandbox.request(world.print_and_sleep("x", 600_000));
    let (events, _) = sandbox.started(request).await;
    assert!(sandbox.processes().await > 0);
    drop(events);
    sandbox.idle().await;
    sandbox.destroy().await;
}

async fn a_signal_reaches_the_command(world: &World) {
    let sandbox = world.sandbox().await;
    let request = sandbox.request(world.print_and_sleep("x", 600_000));
    let (mut events, pid) = sandbox.started(request).await;
    let signal = |pid, signal| v1::SignalRequest {
        epoch: sandbox.epoch.0,
        pid,
        signal,
        group: true,
    };
    sandbox.inner.signal(signal(pid, 15)).await.unwrap();
    let ran = sandbox.collect(&mut events).await;
    assert_eq!((ran.exit.code, ran.exit.signal), (143, 15));
    let error = sandbox.inner.signal(signal(30_000, 15)).await.unwrap_err();
    assert_eq!(error.code(), Some(code::NO_SUCH_PROCESS), "{error}");
    sandbox.destroy().await;
}

async fn a_reset_leaves_no_process_and_no_file(world: &World) {
    let sandbox = world.sandbox().await;
    sandbox.write("kept", b"x").await.unwrap();
    let request = sandbox.request(world.print_and_sleep("x", 600_000));
    let (_events, _) = sandbox.started(request).await;
    let killed = sandbox.inner.reset(sandbox.epoch, true).await.unwrap();
    assert!(killed > 0);
    sandbox.idle().await;
    sandbox.read("kept", 0, 0).await.unwrap();
    sandbox.inner.reset(sandbox.epoch, false).await.unwrap();
    let gone = sandbox.read("kept", 0, 0).await.unwrap_err();
    assert_eq!(gone.code(), Some(code::NOT_FOUND), "{gone}");
    assert_eq!(sandbox.run(world.exit(0)).await.exit.code, 0);
    sandbox.destroy().await;
}

async fn a_lower_epoch_is_refused_and_a_higher_one_takes_over(world: &World) {
    let mut sandbox = world.sandbox().await;
    let request = sandbox.request(world.print_and_sleep("x", 600_000));
    let (_events, _) = sandbox.started(request).await;
    let old = sandbox.epoch;
    sandbox.epoch = Epoch(old.0 + 1);
    sandbox.write("file", b"x").await.unwrap();
    sandbox.idle().await;
    assert_eq!(sandbox.inner.health().await.unwrap().max_epoch, old.0 + 1);
    sandbox.epoch = old;
    let error = sandbox.write("file", b"y").await.unwrap_err();
    assert_eq!(error.code(), Some(code::STALE_EPOCH), "{error}");
    let request = sandbox.request(world.exit(0));
    let error = sandbox.inner.execute(request, &sandbox.trace).await;
    assert_eq!(error.unwrap_err().code(), Some(code::STALE_EPOCH));
    sandbox.destroy().await;
}

async fn output_beyond_its_limit_is_counted_and_dropped(world: &World) {
    let sandbox = world.sandbox().await;
    let mut request = sandbox.request(world.flood(1_000_000));
    request.output_limit = 100_000;
    let ran = sandbox.execute(request).await;
    assert_eq!(ran.exit.code, 0);
    assert_eq!(ran.stdout.len(), 100_000);
    assert_eq!(ran.exit.stdout_bytes, 1_000_000);
    assert_eq!(ran.exit.stdout_dropped, 900_000);
    sandbox.destroy().await;
}

async fn running_out_of_memory_is_counted(world: &World) {
    let sandbox = world.sandbox().await;
    let Some(before) = sandbox.inner.oom_kills() else {
        world.skip("nobody counts memory on this host");
        sandbox.destroy().await;
        return;
    };
    let mut request = sandbox.request(world.hog());
    request.timeout_ms = 60_000;
    let ran = sandbox.execute(request).await;
    assert_ne!(ran.exit.code, 0);
    assert!(!ran.exit.timed_out);
    assert!(sandbox.inner.oom_kills().unwrap() > before);
    // By its own limit, and not for want of the host's memory.
    let met = sandbox.inner.limit_hits().is_some_and(|hits| hits > 0);
    assert!(met || sandbox.inner.memory_was_full() == Some(true));
    // The sandbox itself lives on.
    assert_eq!(sandbox.run(world.exit(0)).await.exit.code, 0);
    sandbox.destroy().await;
}

async fn what_has_died_says_so(world: &World) {
    let sandbox = world.sandbox().await;
    let alive = tokio::time::timeout(Duration::ZERO, sandbox.inner.died());
    assert!(alive.await.is_err(), "it lives");
    world.kill(&sandbox).await;
    let died = tokio::time::timeout(LONG, sandbox.inner.died());
    assert!(died.await.is_ok());
    let request = sandbox.request(world.exit(0));
    assert!(
        sandbox
            .inner
            .execute(request, &sandbox.trace)
            .await
            .is_err()
    );
    sandbox.destroy().await;
}

async fn destroying_leaves_nothing(world: &World) {
    let sandboxes = [world.sandbox().await, world.sandbox().await];
    for sandbox in &sandboxes {
        let request = sandbox.request(world.print_and_sleep("x", 600_000));
        // Sent to its sidecar, which may be killed before it has killed the command.
        drop(sandbox.started(request).await);
    }
    let marks: Vec<Mark> = sandboxes.iter().map(Held::mark).collect();
    assert!(world.remains(&marks) >= 2, "what exists is counted");
    for sandbox in sandboxes {
        sandbox.destroy().await;
    }
    assert_eq!(world.remains(&marks), 0);
}
