//! What goes wrong without any server: told with file, place and mend, and an
//! exit status that says whose doing it was.

#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

struct Ran {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the program where no fleet is and no environment names one.
fn remuda(home: &Path, args: &[&str]) -> Ran {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_remuda"))
        .args(args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", home)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Ran {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// An address where nobody listens and nobody will: bound, never listening.
fn nobody() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address.to_string())
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn nothing_printed_on_standard_output_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let ran = remuda(home.path(), &["task", "submit", "no-such-file.yaml"]);
    assert_eq!(ran.status, Some(1));
    assert_eq!(ran.stdout, "");
    has(
        &ran.stderr,
        &["error: no-such-file.yaml cannot be read", "No such file"],
    );
}

#[test]
fn a_bad_task_file_is_told_with_file_document_and_field() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("task.yaml");
    std::fs::write(&file, "steps:\n- {type: Command, comand: [ls]}\n").unwrap();
    let ran = remuda(home.path(), &["task", "submit", file.to_str().unwrap()]);
    assert_eq!(ran.status, Some(1));
    has(
        &ran.stderr,
        &["task.yaml: document 1: steps[0].comand", "[invalid_field]"],
    );
}

#[test]
fn a_bad_line_is_told_with_its_number_before_anything_is_submitted() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tasks.jsonl");
    std::fs::write(
        &file,
        "{\"command\": [\"true\"]}\n\n{\"command\": []}\n{]\n",
    )
    .unwrap();
    let ran = remuda(
        home.path(),
        // Were anything submitted, this would say that nobody is there.
        &[
            "--nats",
            "nats://127.0.0.1:1",
            "batch",
            file.to_str().unwrap(),
            "--run",
            "r",
        ],
    );
    assert_eq!(ran.status, Some(1));
    has(
        &ran.stderr,
        &[
            "tasks.jsonl:3: steps[0].action.command.argv: names no program",
            "tasks.jsonl:4: ",
            "2 of the lines cannot be submitted, so nothing was",
        ],
    );
    assert!(!ran.stderr.contains("nats"), "{}", ran.stderr);
}

#[test]
fn without_a_fleet_every_command_says_how_to_get_one() {
    let home = tempfile::tempdir().unwrap();
    for (args, status) in [
        (&["run", "--", "true"][..], 125),
        (&["results", "r"], 1),
        (&["cancel", "01900000-0000-7000-8000-000000000000"], 1),
        (&["ps"], 1),
        (&["pool", "ls"], 1),
    ] {
        let ran = remuda(home.path(), args);
        assert_eq!(ran.status, Some(status), "{args:?}: {}", ran.stderr);
        has(
            &ran.stderr,
            &["no fleet is running here", "`remuda up`", "--nats"],
        );
    }
}

#[test]
fn a_server_that_is_not_there_is_named_with_its_address() {
    let home = tempfile::tempdir().unwrap();
    let (held, address) = nobody();
    let url = format!("nats://user:s3cret@{address}");
    drop(held);
    let ran = remuda(home.path(), &["--nats", &url, "run", "--", "true"]);
    assert_eq!(ran.status, Some(125), "{}", ran.stderr);
    has(
        &ran.stderr,
        &[&address, "[nats_unreachable]", "`remuda up`"],
    );
    assert!(!ran.stderr.contains("s3cret"), "{}", ran.stderr);
}

#[test]
fn a_command_line_that_makes_no_sense_is_status_2() {
    let home = tempfile::tempdir().unwrap();
    for args in [
        &["run"][..],
        &["run", "--pool", "a.b", "--", "true"],
        &["run", "--timeout", "0s", "--", "true"],
        &["run", "--env", "X", "--", "true"],
        &["batch", "x.jsonl"],
        &["batch", "x.jsonl", "--run", "r", "--in-flight", "0"],
        &["results", "r", "--from", "0"],
        &["cancel", "not-an-id"],
        &["up", "--warm", "3", "--max", "2"],
        &["--nats", "nats://127.0.0.1:1", "ps"],
    ] {
        let ran = remuda(home.path(), args);
        assert_eq!(ran.status, Some(2), "{args:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{args:?}");
        assert!(ran.stderr.contains("error: "), "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn help_documents_the_exit_statuses_and_hides_what_is_inside() {
    let home = tempfile::tempdir().unwrap();
    let ran = remuda(home.path(), &["--help"]);
    assert_eq!(ran.status, Some(0));
    has(
        &ran.stdout,
        &["Exit status:", "124  timed out", "doctor", "batch"],
    );
    assert!(!ran.stdout.contains("supervise"), "{}", ran.stdout);
}

#[test]
fn up_without_servers_says_which_is_missing_and_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let output = Command::new(env!("CARGO_BIN_EXE_remuda"))
        .args(["up", "--data", data.to_str().unwrap()])
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", home.path())
        .current_dir(home.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    // A nats-server may have been set up beside the program; Redis comes from PATH.
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    has(&stderr, &["-server", "PATH", "--"]);
}

#[test]
fn doctor_looks_at_everything_and_says_how_many() {
    let home = tempfile::tempdir().unwrap();
    let ran = remuda(
        home.path(),
        &["doctor", "--data", home.path().to_str().unwrap()],
    );
    has(
        &ran.stdout,
        &[
            "kernel: ",
            "disk: ",
            "nats-server",
            "redis-server",
            " checks: ",
        ],
    );
    let failed = ran.stdout.lines().any(|line| line.starts_with("FAIL"));
    assert_eq!(ran.status, Some(i32::from(failed)), "{}", ran.stdout);
}

#[test]
fn supervise_ends_when_its_parent_is_not_ours() {
    let home = tempfile::tempdir().unwrap();
    let ran = remuda(
        home.path(),
        &["supervise", "--parent", "1", "--", "/bin/true"],
    );
    assert_eq!(ran.status, Some(1));
    has(&ran.stderr, &["the parent has ended"]);
}
