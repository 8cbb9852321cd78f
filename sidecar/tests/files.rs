//! File calls: what they do, and what they refuse.

mod support;

use std::os::unix::fs::{PermissionsExt, symlink};

use nix::sys::stat::Mode;
use remuda_proto::v1::{ReadFileRequest, ReadFileResponse, WriteFileRequest};
use support::{EPOCH, Sidecar, code, within};
use tonic::Status;

async fn write(sidecar: &Sidecar, path: &str, content: &[u8], mode: u32) -> Result<u64, Status> {
    let path = path.as_bytes().to_vec().into();
    let request = WriteFileRequest {
        epoch: EPOCH,
        path,
        content: content.to_vec().into(),
        mode,
    };
    let answer = within(sidecar.client.clone().write_file(request)).await;
    answer.map(|response| response.into_inner().bytes_written)
}

async fn read(
    sidecar: &Sidecar,
    path: &str,
    offset: u64,
    limit: u64,
) -> Result<ReadFileResponse, Status> {
    let path = path.as_bytes().to_vec().into();
    let request = ReadFileRequest {
        epoch: EPOCH,
        path,
        offset,
        limit,
    };
    within(sidecar.client.clone().read_file(request))
        .await
        .map(tonic::Response::into_inner)
}

#[tokio::test]
async fn writes_and_reads() {
    let sidecar = Sidecar::start();
    let content = b"a\0\xff".repeat(100_000);
    assert_eq!(
        write(&sidecar, "deep/er/file", &content, 0).await.unwrap(),
        300_000
    );
    let path = sidecar.workspace().join("deep/er/file");
    assert_eq!(std::fs::read(&path).unwrap(), content);
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(), 0o644);
    // Shorter content leaves nothing of the longer; the mode is the request's.
    assert_eq!(
        write(&sidecar, "/workspace/deep/er/file", b"0123456789", 0o750)
            .await
            .unwrap(),
        10
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456789");
    assert_eq!(mode(), 0o750);
    for (offset, limit, content, eof) in [
        (0, 0, &b"0123456789"[..], true),
        (2, 3, b"234", false),
        (7, 3, b"789", true),
        (7, u64::MAX, b"789", true),
        (10, 0, b"", true),
        (u64::MAX, 5, b"", true),
    ] {
        let answer = read(&sidecar, "deep/er/file", offset, limit).await.unwrap();
        assert_eq!(
            (&answer.content[..], answer.size, answer.eof),
            (content, 10, eof),
            "{offset}"
        );
    }
    let large = vec![7; 3 << 20];
    write(&sidecar, "large", &large, 0).await.unwrap();
    let answer = read(&sidecar, "large", 1, u64::MAX).await.unwrap();
    assert_eq!(
        (answer.content.len(), answer.size, answer.eof),
        (1 << 20, 3 << 20, false)
    );
}

#[tokio::test]
async fn refuses_what_is_no_file_of_its_own() {
    let sidecar = Sidecar::start();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let workspace = sidecar.workspace();
    nix::unistd::mkfifo(&workspace.join("fifo"), Mode::S_IRWXU).unwrap();
    std::fs::create_dir(workspace.join("folder")).unwrap();
    std::fs::write(workspace.join("plain"), "x").unwrap();
    symlink(outside.path(), workspace.join("out")).unwrap();
    symlink(outside.path().join("secret"), workspace.join("link")).unwrap();
    symlink("../../../../../../../../etc", workspace.join("up")).unwrap();
    symlink("/proc/self/root", workspace.join("magic")).unwrap();
    for (path, expected) in [
        ("../../x", "path_escapes"),
        ("/../x", "path_escapes"),
        ("fifo", "not_a_file"),
        ("folder", "not_a_file"),
        ("folder/", "not_a_file"),
        ("link", "not_a_file"),
        ("plain/x", "not_found"),
        ("out/secret", "not_found"),
        ("up/passwd", "not_found"),
        ("magic/etc/passwd", "not_found"),
        ("", "invalid_argument"),
        ("a\0b", "invalid_argument"),
    ] {
        let status = read(&sidecar, path, 0, 0).await.unwrap_err();
        assert_eq!(code(&status), expected, "read {path:?}: {status:?}");
        let status = write(&sidecar, path, b"gotcha", 0).await.unwrap_err();
        assert_eq!(code(&status), expected, "write {path:?}: {status:?}");
    }
    assert_eq!(
        code(&read(&sidecar, "nothing", 0, 0).await.unwrap_err()),
        "not_found"
    );
    assert_eq!(
        code(&write(&sidecar, "x", b"", 0o4755).await.unwrap_err()),
        "invalid_argument"
    );
    let long = "n".repeat(300);
    assert_eq!(
        code(&write(&sidecar, &long, b"", 0).await.unwrap_err()),
        "invalid_argument"
    );
    assert_eq!(
        std::fs::read(outside.path().join("secret")).unwrap(),
        b"secret"
    );
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read(workspace.join("plain")).unwrap(), b"x");
}

#[tokio::test]
async fn links_inside_count_from_the_root() {
    let sidecar = Sidecar::start();
    std::fs::create_dir(sidecar.workspace().join("real")).unwrap();
    symlink("/workspace/real", sidecar.workspace().join("alias")).unwrap();
    write(&sidecar, "alias/new/file", b"x", 0).await.unwrap();
    assert_eq!(
        std::fs::read(sidecar.workspace().join("real/new/file")).unwrap(),
        b"x"
    );
    write(&sidecar, "real/../top", b"y", 0).await.unwrap();
    assert_eq!(
        std::fs::read(sidecar.workspace().join("top")).unwrap(),
        b"y"
    );
}
