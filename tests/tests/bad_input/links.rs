//! Paths that turn out to lead elsewhere only once code has run.

use broker_schema::{Attribution, ErrorCode, FileRead, Outcome, Step, StepKind};

use super::{fleet, goes_on};

fn shell(script: &str) -> Step {
    Step::command(["sh", "-c", script])
}

fn read(path: &str) -> Step {
    Step {
        name: String::new(),
        action: StepKind::FileRead(FileRead {
            path: path.into(),
            ..FileRead::default()
        }),
    }
}

/// The links are made by the code that runs: no check beforehand sees them.
#[tokio::test]
async fn links_lead_nowhere_outside_the_sandbox() {
    let fleet = fleet().await;
    let secret = fleet.data().join("secret");
    std::fs::write(&secret, "of the host").unwrap();
    let client = fleet.client("links").await.unwrap();
    let pool = "default".parse().unwrap();
    let secret = secret.display().to_string();
    // Beneath a folder that the sandbox does not have.
    let up = format!("{}{secret}", "../".repeat(40));
    let cases = [
        (
            format!("ln -s {secret} link"),
            read("link"),
            ErrorCode::NotAFile,
        ),
        (
            format!("ln -s {up} link"),
            read("link"),
            ErrorCode::NotAFile,
        ),
        (
            format!("ln -s $(dirname {up}) link"),
            read("link/secret"),
            ErrorCode::FileNotFound,
        ),
        (
            format!("ln -s $(dirname {secret}) link"),
            Step::write("link/secret", "changed"),
            ErrorCode::FileNotFound,
        ),
        (
            "ln -s /proc/self/root/etc link".into(),
            read("link/passwd"),
            ErrorCode::NotAFile,
        ),
        (
            "ln -s /proc/self/cwd link".into(),
            Step::write("link/x", "changed"),
            ErrorCode::NotAFile,
        ),
        (
            "ln -s /usr link".into(),
            Step::write("link/x", "changed"),
            ErrorCode::PermissionDenied,
        ),
    ];
    for (script, step, code) in cases {
        let request = client.task(&pool, vec![shell(&script), step]);
        let terminal = client.run(request).await.unwrap();
        assert_eq!(terminal.outcome, Outcome::Failed, "{script}: {terminal:?}");
        assert_eq!(terminal.attribution, Attribution::Policy, "{script}");
        let error = terminal.error.unwrap();
        assert_eq!(error.code, code, "{script}: {error}");
        assert!(error.message.contains("link"), "{script}: {error}");
    }
    let kept = std::fs::read_to_string(fleet.data().join("secret")).unwrap();
    assert_eq!(kept, "of the host");
    goes_on(&fleet).await;
}
