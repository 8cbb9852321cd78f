//! What the client and the command line do not even publish.

use broker_schema::{Blob, Command, ErrorCode, Step, StepKind};
use remuda_client::ClientError;

use super::{fleet, goes_on};

#[tokio::test]
async fn the_client_refuses_before_it_publishes() {
    let fleet = fleet().await;
    let client = fleet.client("checked").await.unwrap();
    let pool = "default".parse().unwrap();
    let cases: [(Step, ErrorCode, &str); 4] = [
        (
            Step::command::<&str>([]),
            ErrorCode::EmptyArgv,
            "steps[0].action.command.argv: names no program",
        ),
        (
            Step::command(["echo", "\0"]),
            ErrorCode::NulByte,
            "steps[0].action.command.argv[1]: holds a NUL byte",
        ),
        (
            Step::write("../x", ""),
            ErrorCode::PathEscapes,
            "steps[0].action.file_patch.path: \"../x\" leads out",
        ),
        (
            Step {
                name: String::new(),
                action: StepKind::Command(Command {
                    argv: vec![Blob::from(&b"true"[..])],
                    timeout_ms: Some(0),
                    ..Command::default()
                }),
            },
            ErrorCode::InvalidTimeout,
            "steps[0].action.command.timeout_ms: is zero",
        ),
    ];
    for (step, code, told) in cases {
        let error = client
            .submit(client.task(&pool, vec![step]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), code);
        let ClientError::Invalid { source, .. } = error else {
            panic!("{error}");
        };
        assert!(source.to_string().contains(told), "{source}");
    }
}

#[tokio::test]
async fn the_command_line_says_what_and_where() {
    let fleet = fleet().await;
    let cases: [(&[&str], i32, &[&str]); 5] = [
        (
            &["run", "--pool", "nowhere", "--", "true"],
            125,
            &["rejected: pool: there is no pool nowhere", "[unknown_pool]"],
        ),
        (
            &["run", "--pool", "no/where", "--", "true"],
            2,
            &["--pool", "[A-Za-z0-9_-]"],
        ),
        (
            &["run", "--", ""],
            125,
            &["steps[0].action.command.argv", "[empty_argv]"],
        ),
        (
            &["run", "--work-dir", "../..", "--", "true"],
            125,
            &["steps[0].action.command.work_dir", "[path_escapes]"],
        ),
        (
            &["run", "--timeout", "0s", "--", "true"],
            2,
            &["--timeout", "is zero, leave it out"],
        ),
    ];
    for (args, code, told) in cases {
        let finished = fleet.remuda(args).await.unwrap();
        assert_eq!(finished.code(), code, "{args:?}: {finished:?}");
        for part in told {
            assert!(finished.stderr.contains(part), "{args:?}: {finished:?}");
        }
    }
    goes_on(&fleet).await;
}
