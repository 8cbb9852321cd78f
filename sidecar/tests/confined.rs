//! What only root can try: another user, cgroups; and the system-call filter.

mod support;

use std::process::Stdio;

use remuda_proto::v1::{ReadFileRequest, ResetRequest, WriteFileRequest};
use support::{EPOCH, Sidecar, code, root_or_skip, shell};

const USER: &[&str] = &["--uid", "1000", "--gid", "1000", "--open-files", "77"];

#[tokio::test]
async fn commands_run_as_the_user_without_capabilities() {
    if !root_or_skip("commands_run_as_the_user_without_capabilities") {
        return;
    }
    let sidecar = Sidecar::start_with(USER, Stdio::null());
    let outcome = sidecar
        .shell("id -u; id -g; id -G; ulimit -n; grep -E 'Cap|Seccomp:' /proc/self/status | sort -u")
        .await;
    let text = String::from_utf8(outcome.stdout).unwrap();
    let none = "0000000000000000";
    let expected = format!(
        "1000\n1000\n1000\n77\nCapAmb:\t{none}\nCapBnd:\t{none}\nCapEff:\t{none}\nCapInh:\t{none}\n\
         CapPrm:\t{none}\nSeccomp:\t2\n"
    );
    assert_eq!(text, expected);
    let status = format!("/proc/{}/status", sidecar.process.id());
    let status = std::fs::read_to_string(status).unwrap();
    for line in [
        "CapPrm:\t00000000000000e0",
        "CapEff:\t00000000000000e0",
        "Groups:\t1000",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let inside = format!(
        "cat /proc/{0}/environ /proc/{0}/mem; ls /proc/{0}/fd; kill -9 {0}; exit 0",
        sidecar.process.id()
    );
    let outcome = sidecar.shell(&inside).await;
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    // Still there, and still able to end what runs as the user.
    let mut request = shell("sleep 300");
    request.timeout_ms = 50;
    assert!(sidecar.execute(request).await.exited.timed_out);
}

#[tokio::test]
async fn files_are_the_user_s() {
    use std::os::unix::fs::MetadataExt;
    if !root_or_skip("files_are_the_user_s") {
        return;
    }
    let mut sidecar = Sidecar::start_with(USER, Stdio::null());
    let write = |path: &str| WriteFileRequest {
        epoch: EPOCH,
        path: path.as_bytes().to_vec().into(),
        content: "x".into(),
        mode: 0,
    };
    sidecar.client.write_file(write("a/b")).await.unwrap();
    for path in ["a", "a/b"] {
        let about = std::fs::metadata(sidecar.workspace().join(path)).unwrap();
        assert_eq!((about.uid(), about.gid()), (1000, 1000), "{path}");
    }
    let private = sidecar.root.path().join("private");
    std::fs::create_dir(&private).unwrap();
    std::fs::write(private.join("file"), "secret").unwrap();
    std::fs::set_permissions(
        &private,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    // Another's file that anybody may write, under a second name.
    let shared = sidecar.root.path().join("shared");
    std::fs::write(&shared, "shared").unwrap();
    std::fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    std::fs::hard_link(&shared, sidecar.workspace().join("second")).unwrap();
    for path in ["/private/file", "/private/new", "second"] {
        let status = sidecar.client.write_file(write(path)).await.unwrap_err();
        assert_eq!(code(&status), "permission_denied", "{path}: {status:?}");
    }
    let read = ReadFileRequest {
        epoch: EPOCH,
        path: "/private/file".into(),
        ..Default::default()
    };
    let status = sidecar.client.read_file(read).await.unwrap_err();
    assert_eq!(code(&status), "permission_denied");
    // A folder the user shut, and one of another user's with content.
    sidecar
        .shell("mkdir shut; touch shut/x; chmod 0 shut")
        .await;
    let foreign = sidecar.workspace().join("foreign");
    std::fs::create_dir_all(foreign.join("inside")).unwrap();
    sidecar
        .client
        .reset(ResetRequest {
            epoch: EPOCH,
            keep_files: false,
        })
        .await
        .unwrap();
    let left: Vec<_> = std::fs::read_dir(sidecar.workspace())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["foreign"]);
}

#[tokio::test]
async fn commands_join_the_cgroup_and_the_sidecar_does_not() {
    if !root_or_skip("commands_join_the_cgroup_and_the_sidecar_does_not") {
        return;
    }
    let name = format!("remuda-sidecar-test-{}", std::process::id());
    let candidates = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
    let Some(group) = candidates.iter().find_map(|parent| {
        let group = std::path::Path::new(parent).join(&name);
        std::fs::create_dir(&group).ok()?;
        group.join("cgroup.procs").exists().then_some(group)
    }) else {
        eprintln!("skipped commands_join_the_cgroup: no cgroup can be made here");
        return;
    };
    let procs = std::fs::OpenOptions::new()
        .write(true)
        .open(group.join("cgroup.procs"))
        .unwrap();
    let mut arguments = USER.to_vec();
    arguments.extend(["--cgroup-fd", "1"]);
    let sidecar = Sidecar::start_with(&arguments, procs.into());
    let outcome = sidecar
        .shell("cat /proc/self/cgroup; ls /proc/self/fd | wc -l")
        .await;
    let text = String::from_utf8(outcome.stdout).unwrap();
    let own = std::fs::read_to_string(format!("/proc/{}/cgroup", sidecar.process.id())).unwrap();
    drop(sidecar);
    std::fs::remove_dir(&group).unwrap();
    assert!(text.contains(&name), "{text}");
    assert!(text.ends_with("\n4\n"), "{text}");
    assert!(!own.contains(&name), "{own}");
}

#[tokio::test]
async fn the_filter_refuses() {
    let sidecar = Sidecar::start();
    let script = r#"
import ctypes, errno, os, platform, sys
if platform.machine() != "x86_64":
    sys.exit(0)
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *args):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args])
    print(name, "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()])
call("mount", 165, 0, 0, 0, 0, 0)
call("fsopen", 430, 0, 0)
call("unshare-user", 272, 0x10000000)
call("unshare-files", 272, 0x400)
call("clone-user", 56, 0x10000011, 0, 0, 0, 0)
call("clone3", 435, 0, 0)
call("setns", 308, 0, 0)
call("keyctl", 250, 0, 0)
call("bpf", 321, 0, 0, 0)
call("io_uring", 425, 1, 0)
call("userfaultfd", 323, 0)
call("netlink", 41, 16, 3, 0)
call("vsock", 41, 40, 1, 0)
call("alg", 41, 38, 5, 0)
call("packet", 41, 17, 3, 0)
call("raw", 41, 2, 3, 1)
call("unix", 41, 1, 1, 0)
call("inet", 41, 2, 1 | 0o2000000, 0)
call("inet6", 41, 10, 2, 0)
call("tiocsti", 16, 0, 0x5412, 0)
call("tiocsti-high", 16, 0, 0x100005412, 0)
call("personality", 135, 0x0008)
call("personality-query", 135, 0xffffffff)
call("handle", 304, 0, 0, 0)
call("vm_readv", 310, 1, 0, 0, 0, 0, 0)
call("x32-getpid", 0x40000000 + 39)
"#;
    let mut request = support::command(&["python3", "-c", script]);
    request.env = vec!["PATH=/usr/local/bin:/usr/bin:/bin".into()];
    let outcome = sidecar.execute(request).await;
    assert_eq!(outcome.exited.code, 0, "{outcome:?}");
    let text = String::from_utf8(outcome.stdout).unwrap();
    for line in text.lines() {
        let (name, result) = line.split_once(' ').unwrap();
        let expected = match name {
            "unshare-files" | "unix" | "inet" | "inet6" | "personality-query" => "ok",
            "clone3" => "ENOSYS",
            _ => "EPERM",
        };
        assert_eq!(result, expected, "{name}");
    }
    if cfg!(target_arch = "x86_64") {
        assert_eq!(text.lines().count(), 26, "{text}");
    }
}
