//! Commands: bytes, exits, limits, time-outs, trees.

mod support;

use std::time::{Duration, Instant};

use remuda_proto::v1::ExecuteRequest;
use support::{Sidecar, code, collect, command, lives, shell, until, within};

#[tokio::test]
async fn output_is_byte_exact_and_apart() {
    let sidecar = Sidecar::start();
    let outcome = sidecar
        .shell(r"printf 'a\000b\377\n'; printf 'E\376\000\033[1m' >&2")
        .await;
    assert_eq!(outcome.stdout, b"a\0b\xff\n");
    assert_eq!(outcome.stderr, b"E\xfe\0\x1b[1m");
    let exited = outcome.exited;
    assert_eq!(
        (exited.code, exited.signal, exited.timed_out),
        (0, 0, false)
    );
    assert_eq!((exited.stdout_bytes, exited.stderr_bytes), (5, 7));
    assert_eq!((exited.stdout_dropped, exited.stderr_dropped), (0, 0));
    assert!(exited.max_rss_bytes > 0 && exited.wall_micros > 0 && exited.unix_nanos > 0);
}

#[tokio::test]
async fn exits_as_a_shell_numbers_them() {
    let sidecar = Sidecar::start();
    let folder = sidecar.workspace();
    let script = |name: &str, content: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let no_interpreter = script("no-interpreter", "#!/no/such/interpreter\n", 0o755);
    let not_executable = script("not-executable", "#!/bin/sh\n", 0o644);
    let no_format = script("no-format", "true\n", 0o755);
    let good = script("good", "#!/bin/sh\nexit 3\n", 0o755);
    for (argv, expected, signal, failed) in [
        (vec!["true"], 0, 0, false),
        (vec!["false"], 1, 0, false),
        (vec!["/bin/sh", "-c", "exit 255"], 255, 0, false),
        (vec!["/bin/sh", "-c", "kill -TERM $$"], 143, 15, false),
        (vec!["/bin/sh", "-c", "kill -SEGV $$"], 139, 11, false),
        (vec![good.as_str()], 3, 0, false),
        (vec!["no-such-program"], 127, 0, true),
        (vec!["/no/such/program"], 127, 0, true),
        (vec![""], 127, 0, true),
        (vec![no_interpreter.as_str()], 127, 0, true),
        (vec![not_executable.as_str()], 126, 0, true),
        (vec![no_format.as_str()], 126, 0, true),
        (vec!["/tmp"], 126, 0, true),
    ] {
        let exited = sidecar.execute(command(&argv)).await.exited;
        assert_eq!(
            (exited.code, exited.signal),
            (expected, signal),
            "{argv:?}: {exited:?}"
        );
        assert_eq!(
            !exited.spawn_error.is_empty(),
            failed,
            "{argv:?}: {exited:?}"
        );
        if failed {
            assert!(exited.spawn_error.starts_with(argv[0]), "{exited:?}");
        }
    }
}

#[tokio::test]
async fn too_long_arguments_are_a_result() {
    let sidecar = Sidecar::start();
    let long = "x".repeat(3 << 20);
    let exited = sidecar.execute(command(&["/bin/true", &long])).await.exited;
    assert_eq!(exited.code, 126);
    assert!(exited.spawn_error.contains("E2BIG"), "{exited:?}");
}

#[tokio::test]
async fn environment_and_folder_are_the_request_s() {
    let sidecar = Sidecar::start();
    let mut request = command(&["env"]);
    request.env = vec!["A=1".into(), "PATH=/nowhere:/usr/bin".into(), "B==".into()];
    let outcome = sidecar.execute(request).await;
    assert_eq!(outcome.stdout, b"A=1\nPATH=/nowhere:/usr/bin\nB==\n");
    let outcome = sidecar
        .shell("pwd; umask; ls -l /proc/self/fd | wc -l; cat <&0")
        .await;
    // The folder, then the three descriptors and the one that `ls` reads by.
    let expected = format!("{}\n0022\n5\n", sidecar.workspace().display());
    assert_eq!(String::from_utf8(outcome.stdout).unwrap(), expected);
    let mut request = shell("pwd");
    request.work_dir = "/usr".into();
    assert_eq!(sidecar.execute(request).await.stdout, b"/usr\n");
}

#[tokio::test]
async fn signals_start_out_default() {
    let sidecar = Sidecar::start();
    let outcome = sidecar
        .shell("grep -E 'Sig(Blk|Ign)|Shd|NoNewPrivs' /proc/self/status")
        .await;
    let status = String::from_utf8(outcome.stdout).unwrap();
    for line in [
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{status}");
    }
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let sidecar = Sidecar::start();
    let refused = |request: ExecuteRequest| {
        let mut client = sidecar.client.clone();
        async move { client.execute(request).await.unwrap_err() }
    };
    let mut folder = command(&["true"]);
    folder.work_dir = "/no/such".into();
    for (request, expected, field) in [
        (command(&[]), "invalid_argument", "argv"),
        (command(&["a", "b\0c"]), "invalid_argument", "argv[1]"),
        (folder, "work_dir_missing", "/no/such"),
    ] {
        let status = refused(request).await;
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert_eq!(code(&status), expected);
        assert!(status.message().contains(field), "{status:?}");
    }
}

#[tokio::test]
async fn one_long_line_and_the_cap() {
    let sidecar = Sidecar::start();
    let outcome = sidecar
        .shell("head -c 1000000 /dev/zero | tr '\\0' x")
        .await;
    assert_eq!(outcome.stdout.len(), 1_000_000);
    assert!(outcome.stdout.iter().all(|byte| *byte == b'x'));

    let mut request = shell("head -c 5000000 /dev/zero; printf abcdef >&2; exit 4");
    request.output_limit = 100_001;
    let outcome = sidecar.execute(request).await;
    assert_eq!(outcome.stdout.len(), 100_001);
    assert_eq!(outcome.stderr, b"abcdef");
    let exited = outcome.exited;
    assert_eq!(
        (exited.code, exited.stdout_bytes, exited.stdout_dropped),
        (4, 5_000_000, 4_899_999)
    );

    let mut request = shell("echo x; echo y >&2");
    request.output_limit = 0;
    let outcome = sidecar.execute(request).await;
    assert_eq!(
        (outcome.stdout.len(), outcome.exited.stdout_dropped),
        (0, 2)
    );
}

#[tokio::test]
async fn stdin_is_fed_and_never_waited_for() {
    let sidecar = Sidecar::start();
    let content: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut request = command(&["cat"]);
    request.stdin = content.clone().into();
    assert_eq!(sidecar.execute(request).await.stdout, content);
    // Never read, closed early, read in part.
    for (script, expected) in [
        ("true", 0),
        ("exec <&-; exit 5", 5),
        ("head -c 1 >/dev/null", 0),
    ] {
        let mut request = shell(script);
        request.stdin = content.clone().into();
        assert_eq!(
            sidecar.execute(request).await.exited.code,
            expected,
            "{script}"
        );
    }
    // Without any, it is at its end.
    assert_eq!(sidecar.shell("cat; exit 6").await.exited.code, 6);
}

#[tokio::test]
async fn a_background_process_does_not_hold_the_step() {
    let sidecar = Sidecar::start();
    let started = Instant::now();
    let outcome = sidecar.shell("sleep 300 & echo $!").await;
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    let pid: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(lives(pid), "it is a session's to keep");
    // Even one that never stops writing.
    let outcome = sidecar.shell("yes & exit 9").await;
    assert_eq!(outcome.exited.code, 9);
}

#[tokio::test]
async fn everything_written_before_the_end_arrives() {
    let sidecar = Sidecar::start();
    for _ in 0..20 {
        let outcome = sidecar
            .shell("head -c 65536 /dev/zero; head -c 65536 /dev/zero >&2")
            .await;
        assert_eq!((outcome.stdout.len(), outcome.stderr.len()), (65536, 65536));
    }
}

#[tokio::test]
async fn a_time_out_ends_the_whole_tree() {
    let sidecar = Sidecar::start();
    let mut request = shell(
        "echo before; trap '' TERM; sleep 300 & echo $!; setsid sleep 300 & \
         setsid sh -c 'echo $$; sleep 300' & sh -c 'setsid sleep 300 & echo $!; wait' & \
         wait; wait",
    );
    request.timeout_ms = 400;
    let outcome = sidecar.execute(request).await;
    let exited = outcome.exited;
    assert_eq!(
        (exited.timed_out, exited.code, exited.signal),
        (true, 137, 9)
    );
    let text = String::from_utf8(outcome.stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("before"));
    let pids: Vec<i32> = lines.map(|line| line.parse().unwrap()).collect();
    assert_eq!(pids.len(), 3, "{text}");
    for pid in pids {
        until("a process of the tree is gone", || !lives(pid)).await;
    }
    let health = sidecar.client.clone();
    let health = { health }
        .health(remuda_proto::v1::HealthRequest {})
        .await
        .unwrap();
    assert_eq!(health.into_inner().processes, 0);
}

#[tokio::test]
async fn a_time_out_strikes_though_nobody_reads() {
    let sidecar = Sidecar::start();
    let mut request = shell("echo $$ > pid; exec yes");
    request.timeout_ms = 300;
    let stream = sidecar
        .client
        .clone()
        .execute(request)
        .await
        .unwrap()
        .into_inner();
    let file = sidecar.workspace().join("pid");
    let read = || {
        std::fs::read_to_string(&file)
            .ok()?
            .trim()
            .parse::<i32>()
            .ok()
    };
    until("it runs", || read().is_some()).await;
    let pid = read().unwrap();
    until("it is killed", || !lives(pid)).await;
    let outcome = within(collect(stream)).await;
    assert!(outcome.exited.timed_out);
    assert_eq!(outcome.stdout.len() as u64, outcome.exited.stdout_bytes);
}

#[tokio::test]
async fn dropping_the_call_kills_the_tree() {
    let sidecar = Sidecar::start();
    let request = shell("setsid sleep 300 & echo $! $$ > pids; wait");
    let stream = sidecar.client.clone().execute(request).await.unwrap();
    let file = sidecar.workspace().join("pids");
    until("it runs", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
    })
    .await;
    let text = std::fs::read_to_string(&file).unwrap();
    drop(stream);
    for pid in text.split_whitespace() {
        let pid = pid.parse().unwrap();
        until("it is killed", || !lives(pid)).await;
    }
}

#[tokio::test]
async fn many_at_once_are_all_right() {
    let sidecar = Sidecar::start();
    let mut set = tokio::task::JoinSet::new();
    for n in 0..100_i32 {
        let mut client = sidecar.client.clone();
        set.spawn(async move {
            let request = shell(&format!("echo out{n}; echo err{n} >&2; exit {n}"));
            (
                n,
                collect(client.execute(request).await.unwrap().into_inner()).await,
            )
        });
    }
    let mut seen = 0;
    while let Some(result) = within(set.join_next()).await {
        let (n, outcome) = result.unwrap();
        assert_eq!(outcome.exited.code, n);
        assert_eq!(outcome.stdout, format!("out{n}\n").into_bytes());
        assert_eq!(outcome.stderr, format!("err{n}\n").into_bytes());
        seen += 1;
    }
    assert_eq!(seen, 100);
}

#[tokio::test]
async fn trace_context_comes_back() {
    let sidecar = Sidecar::start();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut request = tonic::Request::new(command(&["true"]));
    request
        .metadata_mut()
        .insert("traceparent", trace.parse().unwrap());
    let response = sidecar.client.clone().execute(request).await.unwrap();
    assert_eq!(response.metadata().get("traceparent").unwrap(), trace);
    let response = sidecar
        .client
        .clone()
        .execute(command(&["true"]))
        .await
        .unwrap();
    assert!(response.metadata().get("traceparent").is_none());
}
