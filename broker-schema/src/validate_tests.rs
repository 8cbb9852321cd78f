use super::*;
use crate::{FilePatch, Outcome, SessionOptions, Timestamp};

fn task(steps: Vec<Step>) -> TaskRequest {
    let token = |text: &str| text.to_owned();
    TaskRequest::new(
        token("t").parse().unwrap(),
        token("r").parse().unwrap(),
        token("p").parse().unwrap(),
        steps,
    )
}

fn problems(task: &TaskRequest) -> Vec<(ErrorCode, String)> {
    match task.validate(&Limits::default()) {
        Ok(()) => vec![],
        Err(Invalid(found)) => found
            .into_iter()
            .map(|info| (info.code, info.field.unwrap_or_default()))
            .collect(),
    }
}

#[test]
fn a_plain_task_is_valid() {
    assert_eq!(problems(&task(vec![Step::command(["/bin/true"])])), []);
}

#[test]
fn every_problem_has_its_code_and_field() {
    let command = |change: fn(&mut Command)| {
        let mut command = Command {
            argv: vec!["x".into()],
            ..Command::default()
        };
        change(&mut command);
        task(vec![Step {
            name: String::new(),
            action: StepKind::Command(command),
        }])
    };
    let patch = |path: &str| {
        task(vec![Step {
            name: String::new(),
            action: StepKind::FilePatch(FilePatch {
                path: path.into(),
                ..FilePatch::default()
            }),
        }])
    };
    let at = |rest: &str| format!("steps[0].action.{rest}");
    let cases = [
        (task(vec![]), ErrorCode::InvalidField, "steps".into()),
        (
            command(|c| c.argv.clear()),
            ErrorCode::EmptyArgv,
            at("command.argv"),
        ),
        (
            command(|c| c.argv[0] = "".into()),
            ErrorCode::EmptyArgv,
            at("command.argv"),
        ),
        (
            command(|c| c.argv.push("a\0".into())),
            ErrorCode::NulByte,
            at("command.argv[1]"),
        ),
        (
            command(|c| c.timeout_ms = Some(0)),
            ErrorCode::InvalidTimeout,
            at("command.timeout_ms"),
        ),
        (
            command(|c| c.work_dir = Some("/a/../../b".into())),
            ErrorCode::PathEscapes,
            at("command.work_dir"),
        ),
        (
            command(|c| drop(c.env.insert("A=B".into(), "1".into()))),
            ErrorCode::InvalidField,
            at("command.env.A=B"),
        ),
        (
            command(|c| c.output_limit = Some(u64::MAX)),
            ErrorCode::InvalidField,
            at("command.output_limit"),
        ),
        (patch("../x"), ErrorCode::PathEscapes, at("file_patch.path")),
        (patch(""), ErrorCode::InvalidField, at("file_patch.path")),
        (patch("a\0b"), ErrorCode::NulByte, at("file_patch.path")),
    ];
    for (task, code, field) in cases {
        assert_eq!(problems(&task), [(code, field)]);
    }
}

#[test]
fn a_session_may_be_opened_renewed_and_closed_without_steps() {
    let mut open = task(vec![]);
    open.keep_alive = Some(SessionOptions::default());
    assert_eq!(problems(&open), []);
    let mut close = task(vec![]);
    close.close_session = true;
    assert_eq!(problems(&close).len(), 2);
    let mut renew = task(vec![]);
    renew.session = Some(crate::SandboxRef {
        sandbox: crate::SandboxId::new(),
        worker: "w".parse().unwrap(),
        epoch: crate::Epoch::new(1, 1),
    });
    assert_eq!(problems(&renew), []);
    renew.close_session = true;
    assert_eq!(problems(&renew), []);
}

#[test]
fn retries_are_few_and_for_one_shots() {
    let mut retried = task(vec![Step::command(["/bin/true"])]);
    retried.retries = TaskRequest::MOST_RETRIES;
    assert_eq!(problems(&retried), []);
    let refused = [(ErrorCode::InvalidField, "retries".to_owned())];
    retried.retries += 1;
    assert_eq!(problems(&retried), refused);
    retried.retries = 1;
    retried.keep_alive = Some(SessionOptions::default());
    assert_eq!(problems(&retried), refused);
}

#[test]
fn groups_and_weights_are_bounded() {
    type Change = fn(&mut TaskRequest);
    let mut good = task(vec![Step::command(["true"])]);
    good.group = Some("g".parse().unwrap());
    good.group_size = Some(8);
    good.min_valid = Some(8);
    good.run_weight = Some(1000);
    assert_eq!(problems(&good), []);
    let cases: [(Change, &str); 6] = [
        (|t| t.group = None, "group_size"),
        (|t| t.group_size = Some(0), "group_size"),
        (|t| t.group_size = Some(1025), "group_size"),
        (|t| t.min_valid = Some(9), "min_valid"),
        (|t| t.min_valid = Some(0), "min_valid"),
        (|t| t.run_weight = Some(0), "run_weight"),
    ];
    for (change, field) in cases {
        let mut bad = good.clone();
        change(&mut bad);
        let found = problems(&bad);
        assert_eq!(
            found.first(),
            Some(&(ErrorCode::InvalidField, field.to_owned())),
            "{found:?}"
        );
    }
}

#[test]
fn an_attempt_is_followed_by_another_while_retries_are_left() {
    let mut retried = task(vec![Step::command(["/bin/false"])]);
    assert!(!retried.retries_after(Outcome::Failed, 1));
    retried.retries = 2;
    for (outcome, attempt, again) in [
        (Outcome::Failed, 1, true),
        (Outcome::TimedOut, 2, true),
        (Outcome::OomKilled, 2, true),
        (Outcome::Failed, 3, false),
        (Outcome::Succeeded, 1, false),
        (Outcome::Cancelled, 1, false),
        (Outcome::Expired, 1, false),
        (Outcome::Rejected, 1, false),
    ] {
        let found = retried.retries_after(outcome, attempt);
        assert_eq!(found, again, "{outcome} of attempt {attempt}");
    }
    retried.keep_alive = Some(SessionOptions::default());
    assert!(!retried.retries_after(Outcome::Failed, 1));
}

#[test]
fn the_number_of_problems_is_bounded() {
    let bad = Step::command([""]);
    let mut many = task(vec![bad; 1000]);
    many.deadline = Some(Timestamp(0));
    let Invalid(found) = many.validate(&Limits::default()).unwrap_err();
    assert_eq!(found.len(), Check::MOST_PROBLEMS);
    assert!(
        Invalid(found)
            .into_info()
            .message
            .ends_with("(and 31 more problems)")
    );
}
