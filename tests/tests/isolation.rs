//! What sandboxed code tries, through the whole fleet: it harms neither its
//! sidecar, nor its neighbours, nor the host.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};
use remuda_tests::process::Process;
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// The default pool, and one with more disk than memory.
async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    let config = || {
        let mut config = default_config();
        let tight = json!({"name": "tight", "warm": 1, "max": 2, "limits": {
            "memory_bytes": 48 << 20, "pids": 64, "disk_bytes": 256 << 20,
        }});
        config["pools"].as_array_mut().unwrap().push(tight);
        config
    };
    FLEET.get(config).await.unwrap()
}

#[tokio::test]
async fn a_fork_bomb_meets_the_limit_and_others_go_on() {
    let fleet = fleet().await;
    let bomb = r"
import os, time
pids = 0
try:
    while pids < 10000:
        if os.fork() == 0:
            time.sleep(60)
        pids += 1
except BlockingIOError:
    print('limited after', pids)
";
    // Its children hold stdout open for a minute; the pool's limit is 64.
    let (bomb, neighbour) = tokio::join!(fleet.python(bomb), fleet.run(["echo", "alive"]));
    let (bomb, neighbour) = (bomb.unwrap(), neighbour.unwrap());
    assert_eq!(bomb.code(), 0, "{bomb:?}");
    let printed = bomb.text();
    let made: u32 = printed
        .trim()
        .strip_prefix("limited after ")
        .unwrap()
        .parse()
        .unwrap();
    assert!(made < 64, "{printed}");
    assert_eq!(neighbour.text(), "alive\n");
    assert!(!bomb.stderr.contains("timed_out"), "{bomb:?}");
}

#[tokio::test]
async fn a_memory_hog_is_oom_killed_and_said_to_be() {
    let hog = "kept = []\nwhile True: kept.append(bytearray(1 << 24))";
    let finished = fleet().await.python(hog).await.unwrap();
    assert_eq!(finished.code(), 137, "{finished:?}");
    assert!(
        finished.stderr.starts_with("error: oom_killed: "),
        "{finished:?}"
    );
}

/// The pool has more disk than memory, and what is on disk is in memory.
#[tokio::test]
async fn files_are_charged_as_memory_and_never_take_all_of_it() {
    let fill = "
for folder in ['/workspace', '/tmp', '/dev/shm']:
    try:
        with open(folder + '/x', 'wb', 0) as f:
            for _ in range(100): f.write(b'x' * (1 << 20))
    except OSError as e: assert e.errno == 28, e
print('filled', flush=True)
";
    let hold = "held = bytearray(24 << 20); print('held')";
    let fleet = fleet().await;
    for (program, code, printed) in [
        (fill.to_owned(), 0, "filled\n"),
        (hold.to_owned(), 0, "held\n"),
        (format!("{fill}{hold}"), 137, "filled\n"),
    ] {
        let args = ["run", "--pool", "tight", "--", "python3", "-c", &program];
        let finished = fleet.remuda(args).await.unwrap();
        assert_eq!(finished.code(), code, "{program}: {finished:?}");
        assert_eq!(finished.text(), printed, "{program}: {finished:?}");
        let oom = finished.stderr.contains("oom_killed");
        assert_eq!(oom, code == 137, "{program}: {finished:?}");
    }
}

#[tokio::test]
async fn a_full_disk_is_the_sandbox_s_own() {
    let fleet = fleet().await;
    let filler = "
import errno, os
written, f = 0, os.open('/workspace/big', os.O_WRONLY | os.O_CREAT)
try:
    while True: written += os.write(f, b'x' * (1 << 20))
except OSError as e:
    print(errno.errorcode[e.errno], written)
";
    let finished = fleet.python(filler).await.unwrap();
    let printed = finished.text();
    let written: u64 = printed
        .trim()
        .strip_prefix("ENOSPC ")
        .unwrap_or_else(|| panic!("{finished:?}"))
        .parse()
        .unwrap();
    assert!(written <= 64 << 20, "{printed}");
    assert!(written > 32 << 20, "{printed}");
    let next = fleet.run(["sh", "-c", "echo room > /workspace/x && cat /workspace/x"]);
    assert_eq!(next.await.unwrap().text(), "room\n");
}

#[tokio::test]
async fn inodes_run_out() {
    let filler = "
import errno
try:
    for n in range(100000): open(f'/workspace/{n}', 'w').close()
except OSError as e:
    print(errno.errorcode[e.errno])
";
    assert_eq!(
        fleet().await.python(filler).await.unwrap().text(),
        "ENOSPC\n"
    );
}

#[tokio::test]
async fn a_flood_of_output_is_cut_and_counted() {
    let fleet = fleet().await;
    let flood = "import sys\nfor _ in range(200): sys.stdout.write('x' * 1000000)";
    let finished = fleet.python(flood).await.unwrap();
    assert_eq!(finished.code(), 0, "{}", finished.stderr);
    assert_eq!(finished.stdout.len(), 8 << 20);
    assert!(finished.stdout.iter().all(|byte| *byte == b'x'));
}

#[tokio::test]
async fn killing_everything_kills_the_step_alone() {
    let fleet = fleet().await;
    let finished = fleet
        .run(["sh", "-c", "kill -9 -1; echo still here"])
        .await
        .unwrap();
    // The kernel spares the one that asks; its sidecar is not its to kill.
    assert_eq!(finished.code(), 0, "{finished:?}");
    assert_eq!(finished.text(), "still here\n");
    assert_eq!(fleet.run(["echo", "next"]).await.unwrap().text(), "next\n");
}

/// While the neighbour runs, and after it has ended.
#[tokio::test]
async fn a_neighbour_s_files_are_nowhere() {
    let fleet = fleet().await;
    let secret = "the-secret-of-a-neighbour";
    let keep = format!(
        "for d in /workspace /tmp /dev/shm; do echo {secret} > $d/secret || exit 1; done; \
         export SECRET={secret}; echo kept; exec sleep 50"
    );
    let keeper = fleet.command(["run", "--", "sh", "-c", &keep]).unwrap();
    let keeper = Process::spawn(keeper).unwrap();
    eventually("kept secret", PATIENCE, async || {
        let printed = keeper.stdout().map_err(|error| error.to_string())?;
        if printed == b"kept\n" {
            Ok(())
        } else {
            Err(keeper.stderr_tail())
        }
    })
    .await
    .unwrap();
    let search = format!(
        "grep -rslF {secret} /workspace /tmp /dev/shm /var/tmp /home /root /run /proc/[0-9]*/environ \
         /proc/[0-9]*/root/workspace && echo found || echo nothing; ls -A /workspace /tmp /dev/shm"
    );
    let clean = "nothing\n/dev/shm:\n\n/tmp:\n\n/workspace:\n";
    let beside = fleet.run(["sh", "-c", &search]).await.unwrap();
    assert_eq!(beside.text(), clean, "{}", beside.stderr);
    assert!(keeper.try_exit().unwrap().is_none(), "nobody was beside it");

    keeper.signal(Signal::SIGINT).unwrap();
    let ended = keeper.wait_exit(PATIENCE).await.unwrap();
    assert_eq!(ended.code(), Some(125), "{}", keeper.stderr().unwrap());
    let after = fleet.run(["sh", "-c", &search]).await.unwrap();
    assert_eq!(after.text(), clean, "{}", after.stderr);

    // The search finds what is there to be found.
    let own = format!("echo {secret} > /workspace/secret; {search}");
    let own = fleet.run(["sh", "-c", &own]).await.unwrap();
    assert!(
        own.text().starts_with("/workspace/secret\n"),
        "{}",
        own.text()
    );
}

#[tokio::test]
async fn nothing_can_be_reached() {
    let fleet = fleet().await;
    let port = fleet.nats().rsplit(':').next().unwrap().to_owned();
    let program = format!(
        "
import errno, json, socket
def dial(host, port):
    try:
        socket.create_connection((host, port), 2).close()
        return 'connected'
    except socket.gaierror: return 'no name'
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
def make(family, kind):
    try:
        socket.socket(family, kind).close()
        return 'made'
    except OSError as e: return errno.errorcode[e.errno]
print(json.dumps(dict(
    metadata=dial('169.254.169.254', 80), outside=dial('192.0.2.1', 80),
    nats=dial('127.0.0.1', {port}), name=dial('example.invalid', 80),
    raw=make(socket.AF_INET, socket.SOCK_RAW), packet=make(socket.AF_PACKET, socket.SOCK_RAW),
    netlink=make(socket.AF_NETLINK, socket.SOCK_RAW), vsock=make(socket.AF_VSOCK, socket.SOCK_STREAM),
    interfaces=[line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line],
)))
"
    );
    let finished = fleet.python(&program).await.unwrap();
    assert_eq!(finished.code(), 0, "{finished:?}");
    let seen: Value = serde_json::from_slice(&finished.stdout).unwrap();
    assert_eq!(seen["metadata"], "ENETUNREACH");
    assert_eq!(seen["outside"], "ENETUNREACH");
    assert_eq!(seen["nats"], "ECONNREFUSED");
    assert_eq!(seen["name"], "no name");
    assert_eq!(seen["interfaces"], json!(["lo"]));
    for refused in ["raw", "packet", "netlink", "vsock"] {
        assert_ne!(seen[refused], "made", "{refused}");
    }
}

#[tokio::test]
async fn the_user_has_no_power_and_sees_little() {
    let fleet = fleet().await;
    let program = r"
import os
print(os.getuid(), os.getgid(), os.getgroups())
status = dict(line.split(':\t', 1) for line in open('/proc/self/status') if ':\t' in line)
print([status[k].strip() for k in ('CapEff', 'CapBnd', 'NoNewPrivs', 'Seccomp')])
print([p for p in os.listdir('/proc') if p.isdigit()] == [str(os.getpid())])
def can(what):
    try: what(); return 'yes'
    except Exception as e: return type(e).__name__
print(can(lambda: os.listdir('/sys/kernel')), can(lambda: open('/proc/1/environ').read()),
      can(lambda: open('/etc/shadow').read()), can(lambda: os.mknod('/workspace/d', 0o60666, 0x0700)),
      can(lambda: open('/usr/x', 'w')), can(lambda: os.chroot('/')), can(lambda: os.kill(1, 0)))
";
    let finished = fleet.python(program).await.unwrap();
    let text = finished.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "1000 1000 [1000]", "{text}");
    assert_eq!(
        lines[1], "['0000000000000000', '0000000000000000', '1', '2']",
        "{text}"
    );
    assert_eq!(lines[2], "True", "it sees processes of others");
    assert!(!lines[3].contains("yes"), "{text}");
}
