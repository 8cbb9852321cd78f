//! What sandboxed code tries, through the whole fleet: it harms neither its
//! sidecar, nor its neighbours, nor the host.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::time::{Duration, Instant};

use remuda_tests::fleet::Fleet;
use serde_json::Value;
use tokio::sync::OnceCell;

/// One fleet for all: its child processes die with this program.
async fn fleet() -> &'static Fleet {
    static FLEET: OnceCell<Fleet> = OnceCell::const_new();
    FLEET
        .get_or_init(async || Fleet::start().await.unwrap())
        .await
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
    let began = Instant::now();
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
    // Its children held stdout open: the step ended with its leader all the same.
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn a_memory_hog_is_oom_killed_and_said_to_be() {
    let hog = "kept = []\nwhile True: kept.append(bytearray(1 << 24))";
    let finished = fleet().await.python(hog).await.unwrap();
    assert_eq!(finished.code(), 137, "{finished:?}");
    assert!(finished.stderr.contains("memory"), "{finished:?}");
}

#[tokio::test]
async fn a_shared_memory_hog_is_charged_too() {
    let hog = "
with open('/dev/shm/x', 'wb') as f:
    for _ in range(4096): f.write(b'x' * (1 << 20))
";
    let finished = fleet().await.python(hog).await.unwrap();
    assert_ne!(finished.code(), 0, "{finished:?}");
}

#[tokio::test]
async fn a_full_disk_is_the_sandbox_s_own() {
    let filler = "
import errno
try:
    with open('/workspace/big', 'wb') as f:
        while True: f.write(b'x' * (1 << 20))
except OSError as e:
    print(errno.errorcode[e.errno], f.tell() >> 20)
";
    let finished = fleet().await.python(filler).await.unwrap();
    let printed = finished.text();
    let mib: u64 = printed
        .trim()
        .strip_prefix("ENOSPC ")
        .unwrap()
        .parse()
        .unwrap();
    assert!(mib <= 64, "{printed}");
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
    assert!(matches!(finished.code(), 0 | 137), "{finished:?}");
    assert!(!finished.stderr.contains("infrastructure"), "{finished:?}");
    assert_eq!(fleet.run(["echo", "next"]).await.unwrap().text(), "next\n");
}

#[tokio::test]
async fn a_neighbour_s_files_are_nowhere() {
    let fleet = fleet().await;
    let secret = "the-secret-of-a-neighbour";
    let keep = format!("echo {secret} > /workspace/secret; echo {secret} > /tmp/secret; sleep 2");
    let search = format!(
        "grep -rs {secret} /workspace /tmp /dev/shm /var/tmp /home /root /run /proc/[0-9]*/environ \
         /proc/[0-9]*/root/workspace; ls /workspace /tmp"
    );
    let (kept, found) = tokio::join!(
        fleet.run(["sh", "-c", &keep]),
        fleet.run(["sh", "-c", &search])
    );
    assert_eq!(kept.unwrap().code(), 0);
    let found = found.unwrap().text();
    // Its own command line is the one place that may name it.
    assert!(!found.contains("/secret:"), "{found}");
    assert_eq!(found.trim(), "/tmp:\n\n/workspace:".trim(), "{found}");
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
    interfaces=[name for _, name in socket.if_nameindex()] if False else None,
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
    assert_eq!(lines[0], "1000 1000 []", "{finished:?}");
    assert_eq!(
        lines[1], "['0000000000000000', '0000000000000000', '1', '2']",
        "{finished:?}"
    );
    assert_eq!(lines[2], "True");
    assert!(!lines[3].contains("yes"), "{text}");
}
