//! The fixtures themselves: whole-system tests can only be believed when a
//! server that was killed is dead and one that was restarted has its data.

use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use remuda_tests::process::Process;
use remuda_tests::servers::{Kind, NatsServer, Redis, RedisServer, Server};
use remuda_tests::wait::eventually;

const SHORT: Duration = Duration::from_secs(10);

fn sh(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

/// A process that is gone, or dead and not yet reaped by whoever adopted it.
fn is_dead(pid: i32) -> bool {
    if kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) {
        return true;
    }
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| {
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
    })
}

async fn wait_dead(pid: i32) -> anyhow::Result<()> {
    eventually(&format!("end of process {pid}"), SHORT, async || {
        if is_dead(pid) {
            Ok(())
        } else {
            Err("it lives")
        }
    })
    .await
}

/// The number that a script printed as its first line.
async fn printed_pid(process: &Process) -> anyhow::Result<i32> {
    eventually("process id on stdout", SHORT, async || {
        let out = String::from_utf8_lossy(&process.stdout()?).into_owned();
        let line = out.strip_suffix('\n').context("no whole line yet")?;
        line.parse::<i32>().context("not a number")
    })
    .await
}

async fn store(jetstream: &async_nats::jetstream::Context, text: &str) -> anyhow::Result<u64> {
    let ack = jetstream
        .publish("kept.one", text.to_owned().into())
        .await?;
    Ok(ack.await?.sequence)
}

#[tokio::test]
async fn nats_keeps_its_stream_and_port_over_a_kill() -> anyhow::Result<()> {
    let mut server = NatsServer::start().await?;
    let address = server.address();
    let jetstream = async_nats::jetstream::new(server.client().await?);
    jetstream
        .create_stream(async_nats::jetstream::stream::Config {
            name: "KEPT".into(),
            subjects: vec!["kept.>".into()],
            ..Default::default()
        })
        .await?;
    assert_eq!(store(&jetstream, "before").await?, 1);

    let killed = server.process().pid().as_raw();
    server.kill().await?;
    assert!(is_dead(killed));
    assert!(tokio::net::TcpStream::connect(address).await.is_err());

    server.restart().await?;
    assert_eq!(server.address(), address);
    assert_ne!(server.process().pid().as_raw(), killed);
    let jetstream = async_nats::jetstream::new(server.client().await?);
    let stream = jetstream.get_stream("KEPT").await?;
    assert_eq!(stream.get_raw_message(1).await?.payload, "before");
    assert_eq!(store(&jetstream, "after").await?, 2);
    Ok(())
}

#[tokio::test]
async fn a_paused_nats_answers_only_after_it_is_resumed() -> anyhow::Result<()> {
    let server = NatsServer::start().await?;
    let client = server.client().await?;
    let mut received = client.subscribe("echo").await?;
    client.flush().await?;

    server.pause().await?;
    client.publish("echo", "frozen".into()).await?;
    let early = tokio::time::timeout(Duration::from_millis(200), received.next()).await;
    assert!(early.is_err(), "a frozen server delivered {early:?}");

    server.resume().await?;
    let message = tokio::time::timeout(SHORT, received.next()).await?;
    assert_eq!(message.context("the subscription ended")?.payload, "frozen");
    Ok(())
}

#[tokio::test]
async fn redis_keeps_its_data_over_a_stop_and_can_be_flushed() -> anyhow::Result<()> {
    let mut server = RedisServer::start().await?;
    let address = server.address();
    assert_eq!(server.command(&["SET", "key", "value"]).await?, "OK");
    let policy = server.command(&["INFO", "memory"]).await?;
    assert!(policy.contains("maxmemory_policy:noeviction"), "{policy}");

    let status = server.stop().await?;
    assert!(status.success(), "SIGTERM ended it with {status}");
    server.restart().await?;
    assert_eq!(server.address(), address);
    assert_eq!(server.command(&["GET", "key"]).await?, "value");

    server.command(&["FLUSHALL"]).await?;
    let error = server.command(&["GET", "key"]).await.unwrap_err();
    assert_eq!(error.to_string(), "redis answers `GET key` with: nothing");
    let error = server.command(&["NONSENSE"]).await.unwrap_err();
    assert!(error.to_string().contains("unknown command"), "{error}");
    Ok(())
}

#[tokio::test]
async fn servers_of_one_kind_do_not_meet() -> anyhow::Result<()> {
    let (one, two) = tokio::try_join!(RedisServer::start(), RedisServer::start())?;
    assert_ne!(one.port(), two.port());
    one.command(&["SET", "key", "one"]).await?;
    assert!(two.command(&["GET", "key"]).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_dropped_server_is_dead_and_its_data_are_gone() -> anyhow::Result<()> {
    let server = NatsServer::start().await?;
    let pid = server.process().pid().as_raw();
    let data = server.data().to_path_buf();
    assert!(data.exists());
    server.pause().await?;
    drop(server);
    assert!(is_dead(pid));
    assert!(!data.exists());
    Ok(())
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() -> anyhow::Result<()> {
    let kind = Redis {
        args: vec!["--no-such-setting".into(), "1".into()],
        ..Redis::default()
    };
    let error = Server::start_with(kind).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("redis-server"), "{text}");
    assert!(text.contains("ended at once"), "{text}");
    assert!(text.contains("no-such-setting"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_stranger_on_the_port_is_not_taken_for_ours() -> anyhow::Result<()> {
    let (one, two) = tokio::try_join!(RedisServer::start(), RedisServer::start())?;
    let pid = |server: &RedisServer| server.process().pid().as_raw();
    let kind = Redis::default();
    kind.answers(one.address(), "", pid(&one))
        .await
        .map_err(anyhow::Error::msg)?;
    let error = kind
        .answers(two.address(), "", pid(&one))
        .await
        .unwrap_err();
    assert!(error.contains("another server"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_process_reports_its_exit_and_its_output() -> anyhow::Result<()> {
    let process = Process::spawn(sh("echo out; echo err >&2; exit 7"))?;
    let status = process.wait_exit(SHORT).await?;
    assert_eq!(status.code(), Some(7));
    assert_eq!(process.stdout()?, b"out\n");
    assert_eq!(process.stderr()?, "err\n");

    let process = Process::spawn(sh("kill -9 $$"))?;
    let status = process.wait_exit(SHORT).await?;
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    assert_eq!(process.try_exit()?, Some(status));
    Ok(())
}

#[tokio::test]
async fn a_process_that_does_not_end_fails_with_its_log() -> anyhow::Result<()> {
    let process = Process::spawn(sh("echo stuck >&2; exec sleep 1000"))?;
    eventually("line on stderr", SHORT, async || match process.stderr() {
        Ok(text) if text == "stuck\n" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    assert_eq!(process.try_exit()?, None);
    let error = process
        .wait_exit(Duration::from_millis(20))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("sh still runs after 20ms"), "{text}");
    assert!(text.contains("stuck"), "{text}");

    process.signal(Signal::SIGTERM)?;
    let status = process.wait_exit(SHORT).await?;
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(15)
    );
    Ok(())
}

#[tokio::test]
async fn dropping_a_process_kills_its_group() -> anyhow::Result<()> {
    // The second ignores what a shell passes on, and outlives its leader.
    let process = Process::spawn(sh("sleep 1000 & echo $!; exit 0"))?;
    let grandchild = printed_pid(&process).await?;
    process.wait_exit(SHORT).await?;
    assert!(!is_dead(grandchild));
    drop(process);
    wait_dead(grandchild).await
}

#[tokio::test]
async fn stdin_is_passed_on() -> anyhow::Result<()> {
    use std::io::Write;
    let mut process = Process::spawn_with_stdin(Command::new("cat"))?;
    let mut stdin = process.take_stdin().context("no stdin")?;
    stdin.write_all(b"through")?;
    drop(stdin);
    assert!(process.wait_exit(SHORT).await?.success());
    assert_eq!(process.stdout()?, b"through");
    Ok(())
}

/// Names the variable that makes the test below play the test that is killed.
const VICTIM: &str = "REMUDA_FIXTURE_VICTIM";

/// Runs this very test again as a child, which starts a process from a thread
/// that ends, and kills that child.
#[tokio::test]
async fn a_killed_test_leaves_nothing() -> anyhow::Result<()> {
    if std::env::var_os(VICTIM).is_some() {
        let started = std::thread::spawn(|| Process::spawn(sh("exec sleep 1000")));
        let process = started
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        std::fs::write(
            std::env::var_os(VICTIM).unwrap(),
            format!("{}\n", process.pid()),
        )?;
        process.exited().await?;
        anyhow::bail!("the child ended before its parent");
    }
    let folder = tempfile::tempdir()?;
    let told = folder.path().join("pid");
    let mut again = Command::new(std::env::current_exe()?);
    again
        .args(["--exact", "a_killed_test_leaves_nothing", "--nocapture"])
        .env("TMPDIR", folder.path())
        .env(VICTIM, &told);
    let victim = Process::spawn(again)?;
    let grandchild = eventually("process id in the file", SHORT, async || {
        let text = std::fs::read_to_string(&told)?;
        let line = text.strip_suffix('\n').context("no whole line yet")?;
        line.parse::<i32>().context("not a number")
    })
    .await?;
    ensure!(
        !is_dead(grandchild),
        "it died with the thread that started it"
    );
    victim.signal(Signal::SIGKILL)?;
    victim.wait_exit(SHORT).await?;
    wait_dead(grandchild).await
}

#[tokio::test]
async fn a_time_out_tells_the_last_status() {
    let asked = Mutex::new(0);
    let error = eventually("third answer", Duration::from_millis(100), async || {
        *asked.lock().unwrap() += 1;
        Err::<(), _>(format!("asked {} times", asked.lock().unwrap()))
    })
    .await
    .unwrap_err();
    let times = asked.into_inner().unwrap();
    assert!(times > 1);
    assert_eq!(
        error.to_string(),
        format!("no third answer within 100ms; last status: asked {times} times")
    );

    let hangs = async || std::future::pending::<Result<(), String>>().await;
    let error = eventually("answer", Duration::from_millis(20), hangs)
        .await
        .unwrap_err();
    assert!(
        error.to_string().ends_with("the condition never answered"),
        "{error}"
    );
}
