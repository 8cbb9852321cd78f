//! Epochs, signals, reset, and how the sidecar itself ends.

mod support;

use remuda_proto::v1::{AdoptRequest, HealthRequest, ResetRequest, SignalRequest};
use support::{EPOCH, Sidecar, code, collect, command, lives, shell, until, within};

#[tokio::test]
async fn epochs_only_grow() {
    let mut sidecar = Sidecar::start();
    let running = sidecar
        .client
        .execute(shell("sleep 300"))
        .await
        .unwrap()
        .into_inner();
    let background = sidecar
        .shell("setsid sleep 300 >/dev/null 2>&1 & echo $!")
        .await;
    let background: i32 = String::from_utf8(background.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let adopt = |epoch| {
        let mut client = sidecar.client.clone();
        async move { within(client.adopt(AdoptRequest { epoch })).await }
    };
    // The same again is fine and ends nothing.
    assert_eq!(adopt(EPOCH).await.unwrap().into_inner().killed, 0);
    assert!(lives(background));
    // A higher one ends everything before it answers.
    let killed = adopt(EPOCH + 2).await.unwrap().into_inner().killed;
    assert!(killed >= 2, "{killed}");
    assert!(!lives(background));
    assert_eq!(within(collect(running)).await.exited.signal, 9);
    for epoch in [0, EPOCH, EPOCH + 1] {
        let status = adopt(epoch).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        assert_eq!(code(&status), "stale_epoch");
    }
    let mut client = sidecar.client.clone();
    assert_eq!(
        code(&client.execute(command(&["true"])).await.unwrap_err()),
        "stale_epoch"
    );
    let reset = ResetRequest {
        epoch: EPOCH,
        keep_files: false,
    };
    assert_eq!(code(&client.reset(reset).await.unwrap_err()), "stale_epoch");
    let signal = SignalRequest {
        epoch: EPOCH,
        pid: 1,
        signal: 9,
        group: false,
    };
    assert_eq!(
        code(&client.signal(signal).await.unwrap_err()),
        "stale_epoch"
    );
    // Any call may bring a higher one.
    let mut request = command(&["true"]);
    request.epoch = EPOCH + 3;
    assert_eq!(sidecar.execute(request).await.exited.code, 0);
    let health = client.health(HealthRequest {}).await.unwrap().into_inner();
    assert_eq!((health.max_epoch, health.processes), (EPOCH + 3, 0));
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn signals_reach_only_what_is_ours() {
    let mut sidecar = Sidecar::start();
    let request = shell("trap 'echo got; exit 8' USR1; sleep 300 & echo $! > pid; wait");
    let mut stream = sidecar.client.execute(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap().event.unwrap();
    let remuda_proto::v1::execute_event::Event::Started(started) = first else {
        panic!("{first:?}")
    };
    let file = sidecar.workspace().join("pid");
    until("it runs", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
    })
    .await;
    let child: i32 = std::fs::read_to_string(&file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let send = |pid, signal, group| {
        let mut client = sidecar.client.clone();
        let request = SignalRequest {
            epoch: EPOCH,
            pid,
            signal,
            group,
        };
        async move { within(client.signal(request)).await }
    };
    let own = sidecar.process.id() as i32;
    let foreign = std::process::id() as i32;
    for pid in [1, 0, -1, own, -own, foreign, i32::MAX, i32::MIN] {
        for group in [false, true] {
            let status = send(pid, 9, group).await.unwrap_err();
            assert_eq!(code(&status), "no_such_process", "{pid} {group}");
        }
    }
    for signal in [0, -1, 65, i32::MAX] {
        let status = send(started.pid, signal, false).await.unwrap_err();
        assert_eq!(code(&status), "invalid_argument", "{signal}");
    }
    send(started.pid, 10, false).await.unwrap();
    let outcome = within(collect(stream)).await;
    assert_eq!(
        (outcome.exited.code, &outcome.stdout[..]),
        (8, &b"got\n"[..])
    );
    assert!(lives(child));
    send(child, 9, true).await.unwrap();
    until("the group is gone", || !lives(child)).await;
    assert_eq!(
        code(&send(started.pid, 9, false).await.unwrap_err()),
        "no_such_process"
    );
}

#[tokio::test]
async fn reset_leaves_nothing() {
    let mut sidecar = Sidecar::start();
    let outcome = sidecar
        .shell("mkdir -p a/b; touch a/b/c .hidden; ln -s / root; chmod 0 a/b; setsid sleep 300 >/dev/null 2>&1 & echo $!")
        .await;
    let pid: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    until("it wrote", || {
        sidecar.workspace().join("root").symlink_metadata().is_ok()
    })
    .await;
    let reset = ResetRequest {
        epoch: EPOCH,
        keep_files: true,
    };
    let killed = within(sidecar.client.reset(reset))
        .await
        .unwrap()
        .into_inner()
        .killed;
    assert_eq!(killed, 1);
    assert!(!lives(pid));
    assert!(sidecar.workspace().join("a").exists());
    let reset = ResetRequest {
        epoch: EPOCH,
        keep_files: false,
    };
    assert_eq!(
        within(sidecar.client.reset(reset))
            .await
            .unwrap()
            .into_inner()
            .killed,
        0
    );
    assert_eq!(std::fs::read_dir(sidecar.workspace()).unwrap().count(), 0);
    assert_eq!(sidecar.shell("exit 2").await.exited.code, 2);
}

#[tokio::test]
async fn the_end_of_the_socket_ends_everything() {
    let mut sidecar = Sidecar::start();
    let outcome = sidecar
        .shell("setsid sleep 300 >/dev/null 2>&1 & echo $!")
        .await;
    let background: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let running = sidecar
        .client
        .execute(shell("echo $$; sleep 300"))
        .await
        .unwrap();
    let unconnected = tonic::transport::Endpoint::from_static("http://nobody").connect_lazy();
    sidecar.client = remuda_proto::v1::sidecar_client::SidecarClient::new(unconnected);
    drop(running);
    until("the sidecar ends", || {
        sidecar.process.try_wait().unwrap().is_some()
    })
    .await;
    assert!(!lives(background));
}

#[tokio::test]
async fn termination_ends_everything() {
    let mut sidecar = Sidecar::start();
    let outcome = sidecar
        .shell("trap '' TERM; setsid sleep 300 >/dev/null 2>&1 & echo $!")
        .await;
    let background: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(sidecar.process.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    until("the sidecar ends", || {
        sidecar.process.try_wait().unwrap().is_some()
    })
    .await;
    until("its process ends", || !lives(background)).await;
}

#[test]
fn bad_arguments_are_told() {
    for (arguments, expected) in [
        (&[][..], "--fd is missing"),
        (&["--fd", "x"], "not a number"),
        (&["--fd", "999"], "descriptor 999"),
        (&["--nonsense"], "unknown argument"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_remuda-sidecar"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(expected), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
