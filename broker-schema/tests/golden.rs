//! Golden bytes: every message of every schema version, as it was written when
//! that version was current. They are never regenerated: a difference means
//! that programs in the field would misread each other. A new message gets its
//! bytes by running this with `REMUDA_BLESS=1`, which only ever adds files.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;

use broker_schema::codec::{Format, decode, encode};
use broker_schema::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

const TASK: &str = "0197a3c2-7d4e-7b1a-8f00-0123456789ab";
const SANDBOX: &str = "0197a3c2-7d4e-7b1a-8f00-ba9876543210";

fn task_request() -> TaskRequest {
    TaskRequest {
        id: TASK.parse().unwrap(),
        tenant: "acme".parse().unwrap(),
        run: "grpo-7".parse().unwrap(),
        pool: "default".parse().unwrap(),
        group: Some("prompt-12".parse().unwrap()),
        group_size: None,
        min_valid: None,
        run_weight: None,
        priority: Priority::High,
        steps: vec![
            Step {
                name: "write".into(),
                action: StepKind::FilePatch(FilePatch {
                    path: "/workspace/a.bin".into(),
                    content: vec![0, 159, 146, 150, 255].into(),
                    mode: Some(0o755),
                }),
            },
            Step {
                name: "run".into(),
                action: StepKind::Command(Command {
                    argv: vec!["python3".into(), "-c".into(), "print('ü')".into()],
                    env: [("LANG".to_owned(), "C.UTF-8".into())].into(),
                    work_dir: Some("/workspace".into()),
                    stdin: "input\n".into(),
                    timeout_ms: Some(2_500),
                    output_limit: Some(1 << 20),
                }),
            },
            Step {
                name: String::new(),
                action: StepKind::FileRead(FileRead {
                    path: "out.txt".into(),
                    offset: 3,
                    limit: Some(100),
                }),
            },
        ],
        env: [("SEED".to_owned(), "7".into())].into(),
        timeout_ms: Some(10_000),
        deadline: Some(Timestamp(1_764_000_060_000_000)),
        continue_on_failure: true,
        retries: 0,
        ttl_seconds_after_finished: None,
        keep_alive: Some(SessionOptions {
            idle_timeout_ms: 60_000,
            max_life_ms: 600_000,
        }),
        session: None,
        close_session: false,
        submitted_at: Timestamp(1_764_000_000_000_000),
    }
}

fn sandbox_ref() -> SandboxRef {
    SandboxRef {
        sandbox: SANDBOX.parse().unwrap(),
        worker: "host-1".parse().unwrap(),
        epoch: Epoch::new(3, 41),
    }
}

fn terminal() -> Terminal {
    Terminal {
        task: TASK.parse().unwrap(),
        tenant: "acme".parse().unwrap(),
        run: "grpo-7".parse().unwrap(),
        pool: "default".parse().unwrap(),
        group: None,
        request_digest: digest::sha256_hex(b"request"),
        attempt: 2,
        outcome: Outcome::Failed,
        attribution: Attribution::Policy,
        evidence: "step 1 exited with 139 (SIGSEGV)".into(),
        exit: Some(ExitStatus {
            code: 139,
            signal: Some(11),
        }),
        error: Some(ErrorInfo::new(ErrorCode::FileNotFound, "no such file").at("steps[0]")),
        steps: vec![StepResult {
            name: "run".into(),
            exit: ExitStatus {
                code: 139,
                signal: Some(11),
            },
            timed_out: false,
            oom_killed: false,
            error: None,
            stdout: Output {
                bytes: 6,
                dropped: 2,
                sha256: digest::sha256_hex(&[0, 255, 1, 2]),
                head: vec![0, 255].into(),
                tail: Some(vec![2].into()),
            },
            stderr: Output::default(),
            usage: Usage {
                wall_us: 1_500,
                cpu_user_us: 900,
                cpu_system_us: 300,
                peak_memory_bytes: 1 << 20,
            },
        }],
        frames: 3,
        usage: Usage::default(),
        times: Times {
            queued: Timestamp(1),
            dispatched: Some(Timestamp(2)),
            started: Some(Timestamp(3)),
            finished: Timestamp(4),
        },
        sandbox: Some(sandbox_ref()),
        kept: true,
    }
}

/// Checks that today's code writes and reads the recorded bytes.
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, message: &T) {
    for (format, extension) in [(Format::MessagePack, "msgpack"), (Format::Json, "json")] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/v1")
            .join(format!("{name}.{extension}"));
        let written = encode(message, format).unwrap();
        if !path.exists() && std::env::var_os("REMUDA_BLESS").is_some() {
            fs::write(&path, &written).unwrap();
        }
        let golden = fs::read(&path)
            .unwrap_or_else(|e| panic!("{}: {e}; bless it if it is new", path.display()));
        let read: T = decode(&golden, format).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(
            &read,
            message,
            "{} is read as something else",
            path.display()
        );
        assert_eq!(
            written,
            golden,
            "{} is written differently now",
            path.display()
        );
    }
}

#[test]
fn every_message_keeps_its_bytes() {
    check("task_request", &task_request());
    check("terminal", &terminal());
    check(
        "placement",
        &Placement {
            task: task_request(),
            request_digest: digest::sha256_hex(b"request"),
            attempt: 1,
            sandbox: sandbox_ref(),
            dispatched_at: Timestamp(1_764_000_000_100_000),
        },
    );
    check(
        "frame_stdout",
        &Frame {
            attempt: 1,
            epoch: Epoch::new(3, 41),
            n: 7,
            step: 0,
            kind: FrameKind::Stdout,
            data: vec![104, 105, 0, 255].into(),
            exit: None,
        },
    );
    check(
        "frame_exit",
        &Frame {
            attempt: 1,
            epoch: Epoch::new(3, 41),
            n: 8,
            step: 0,
            kind: FrameKind::Exit,
            data: Blob::default(),
            exit: Some(ExitStatus::code(3)),
        },
    );
    check(
        "cancel_request",
        &CancelRequest::task(
            "acme".parse().unwrap(),
            TASK.parse().unwrap(),
            Some("grpo-7".parse().unwrap()),
        ),
    );
    check(
        "cancel_group",
        &CancelRequest::group(
            "acme".parse().unwrap(),
            "grpo-7".parse().unwrap(),
            "prompt-12".parse().unwrap(),
        ),
    );
    check(
        "cancel_run",
        &CancelRequest::run("acme".parse().unwrap(), "grpo-7".parse().unwrap()),
    );
    check(
        "cancel_notice",
        &CancelNotice {
            tenant: "acme".parse().unwrap(),
            target: CancelTarget::Group {
                run: "grpo-7".parse().unwrap(),
                group: "prompt-12".parse().unwrap(),
            },
            cause: CancelCause::Enough { valid: 4 },
        },
    );
    check(
        "credit",
        &Credit {
            pool: "default".parse().unwrap(),
            free: 3,
            leased: 5,
            max: 16,
            queued: 7,
            expected_wait_ms: Some(250),
            at: Timestamp(1_764_000_000_000_000),
        },
    );
    check(
        "task_request_group",
        &TaskRequest {
            group_size: Some(8),
            min_valid: Some(4),
            run_weight: Some(3),
            ..task_request()
        },
    );
    check(
        "control_cancel",
        &ControlMessage::Cancel(TASK.parse().unwrap()),
    );
    check(
        "control_cancel_task",
        &ControlMessage::CancelTask {
            tenant: "acme".parse().unwrap(),
            task: TASK.parse().unwrap(),
        },
    );
    check("control_drain", &ControlMessage::Drain);
}

/// A newer writer adds a field; today's reader must not mind. An older writer
/// leaves out what has a default; today's reader must fill it in.
#[test]
fn old_and_new_read_each_other() {
    let mut newer = serde_json::to_value(task_request()).unwrap();
    newer["a_field_of_version_2"] = serde_json::json!({"nested": [1, 2, 3]});
    newer["steps"][1]["action"]["command"]["nice"] = serde_json::json!(5);
    for format in [Format::Json, Format::MessagePack] {
        let bytes = encode(&newer, format).unwrap();
        assert_eq!(
            decode::<TaskRequest>(&bytes, format).unwrap(),
            task_request()
        );
    }

    let oldest = serde_json::json!({
        "id": TASK, "tenant": "acme", "run": "r", "pool": "default",
        "steps": [{"action": {"command": {"argv": ["true"]}}}],
        "submitted_at": 5,
    });
    for format in [Format::Json, Format::MessagePack] {
        let bytes = encode(&oldest, format).unwrap();
        let read: TaskRequest = decode(&bytes, format).unwrap();
        assert_eq!(read.priority, Priority::Normal);
        assert_eq!(read.steps, [Step::command(["true"])]);
    }
}

#[test]
fn what_is_not_a_message_is_refused_by_name() {
    let cases: [(&str, ErrorCode, &str); 5] = [
        ("{", ErrorCode::UnparsablePayload, ""),
        (r#"{"id":"nope"}"#, ErrorCode::InvalidToken, "id"),
        (
            r#"{"id":"0197a3c2-7d4e-7b1a-8f00-0123456789ab","tenant":"a.b"}"#,
            ErrorCode::InvalidToken,
            "tenant",
        ),
        (
            r#"{"steps":[{"action":{"teleport":{}}}]}"#,
            ErrorCode::UnknownStepType,
            "steps[0].action",
        ),
        (
            r#"{"timeout_ms":-1}"#,
            ErrorCode::UnparsablePayload,
            "timeout_ms",
        ),
    ];
    for (text, code, field) in cases {
        let error = decode::<TaskRequest>(text.as_bytes(), Format::Json).unwrap_err();
        assert_eq!(error.code, code, "{text}: {error}");
        assert_eq!(error.field.unwrap_or_default(), field, "{text}");
    }
    let mut bytes = encode(&task_request(), Format::MessagePack).unwrap();
    bytes.push(0);
    let error = decode::<TaskRequest>(&bytes, Format::MessagePack).unwrap_err();
    assert!(error.message.contains("1 bytes follow"), "{error}");
}
