//! Every command and program that the documentation shows runs as written.

use std::process::Command;

use broker_schema::{RequestLimits, TaskRequest, codec};
use remuda_tests::binaries::{profile_dir, workspace};
use remuda_tests::docs::snippet;
use remuda_tests::fleet::{Fleet, finish};

#[tokio::test]
async fn a_plain_nats_client_in_python_runs_a_task() {
    let fleet = Fleet::start().await.unwrap();
    let program = snippet("docs/protocol.md", "A worked example", "python").unwrap();
    let mut python = Command::new(workspace().join(".remuda/venv/bin/python"));
    python.args(["-c", &program, fleet.nats()]);
    let finished = finish(python).await.unwrap();
    assert_eq!(finished.code(), 0, "{}", finished.stderr);
    let printed = finished.text();
    assert!(printed.starts_with("accepted as REMUDA_REQ "), "{printed}");
    assert!(
        printed.ends_with("outcome: succeeded\nstdout: 42\n"),
        "{printed}"
    );
    assert!(fleet.stop().await.unwrap().success());
}

#[tokio::test]
async fn the_first_use_of_the_readme_runs() {
    let fleet = Fleet::start().await.unwrap();
    let script = snippet("README.md", "First use", "sh").unwrap();
    // The fleet of this test stands for the one that the first lines start.
    let rest: Vec<&str> = script
        .lines()
        .filter(|line| !line.starts_with("export PATH") && !line.starts_with("remuda up"))
        .collect();
    assert!(rest.len() >= 6, "{script}");
    let folder = fleet.data().join("first-use");
    std::fs::create_dir(&folder).unwrap();
    let tools = workspace().join(".remuda/tools/bin");
    let path = [profile_dir().unwrap(), tools].map(|folder| folder.display().to_string());
    let script = format!("PATH={}:$PATH\n{}", path.join(":"), rest.join("\n"));
    let mut shell = Command::new("bash");
    shell
        .args(["-euc", &script])
        .current_dir(&folder)
        .env("REMUDA_NATS", fleet.nats())
        .env("REMUDA_REDIS", fleet.redis());
    let finished = finish(shell).await.unwrap();
    assert_eq!(
        finished.code(),
        0,
        "{}\n{}",
        finished.text(),
        finished.stderr
    );
    let printed = finished.text();
    assert!(printed.starts_with("42\nkept\n"), "{printed}");
    assert!(printed.contains(r#""outcome":"failed""#), "{printed}");
}

#[test]
fn the_requests_of_the_protocol_page_are_requests() {
    let text = snippet("docs/protocol.md", "A task", "json").unwrap();
    let request: TaskRequest = codec::decode(text.as_bytes(), codec::Format::Json).unwrap();
    request.validate(&RequestLimits::default()).unwrap();
    assert_eq!(request.steps.len(), 3);
}
