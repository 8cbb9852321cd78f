//! What can be wrong with a request, and what its sender is told.

use broker_schema::ErrorCode;
use serde_json::{Value, json};

use super::stranger::Sent;

pub(crate) type Spoil = fn(&mut Value, &mut Sent);
pub(crate) type Case = (
    &'static str,
    Spoil,
    ErrorCode,
    Option<&'static str>,
    &'static str,
);

pub(crate) fn command(request: &mut Value) -> &mut Value {
    &mut request["steps"][0]["action"]["command"]
}

/// What the payload is when it is not the request.
fn raw(sent: &mut Sent, payload: &[u8]) {
    sent.payload = payload.to_vec();
    sent.run = "unknown".into();
}

pub(crate) const CASES: &[Case] = &[
    (
        "an unknown pool",
        |request, sent| {
            request["pool"] = json!("nowhere");
            sent.subject = "remuda.req.default.nowhere".into();
        },
        ErrorCode::UnknownPool,
        Some("pool"),
        "there is no pool nowhere, the pools are: default",
    ),
    (
        "a pool that is no token in the subject",
        |request, sent| {
            request["pool"] = json!("default");
            sent.subject = "remuda.req.default.p@ol".into();
        },
        ErrorCode::InvalidToken,
        Some("subject"),
        "p@ol",
    ),
    (
        "a tenant that is no token in the payload",
        |request, _| request["tenant"] = json!("a tenant"),
        ErrorCode::InvalidToken,
        Some("tenant"),
        "[A-Za-z0-9_-]",
    ),
    (
        "another pool in the payload than in the subject",
        |request, _| request["pool"] = json!("other"),
        ErrorCode::SubjectMismatch,
        Some("pool"),
        "is other, but the request was published for default",
    ),
    (
        "another tenant in the payload than in the subject",
        |request, _| request["tenant"] = json!("other"),
        ErrorCode::SubjectMismatch,
        Some("tenant"),
        "is other, but the request was published for default",
    ),
    (
        "text that is no JSON",
        |_, sent| raw(sent, b"{ no JSON"),
        ErrorCode::UnparsablePayload,
        None,
        "key must be a string",
    ),
    (
        "bytes that are no MessagePack",
        |_, sent| {
            sent.headers.insert("Content-Type", "application/msgpack");
            raw(sent, &[0xc1; 100]);
        },
        ErrorCode::UnparsablePayload,
        None,
        "",
    ),
    (
        "no bytes at all",
        |_, sent| raw(sent, b""),
        ErrorCode::UnparsablePayload,
        None,
        "EOF",
    ),
    (
        "lists in lists in lists",
        |_, sent| raw(sent, &[b'['; 100_000]),
        ErrorCode::UnparsablePayload,
        Some("[0]"),
        "expected a string",
    ),
    (
        "another content type",
        |_, sent| sent.headers.insert("Content-Type", "text/html"),
        ErrorCode::UnparsablePayload,
        Some("Content-Type"),
        "text/html",
    ),
    (
        "a schema from before the first",
        |_, sent| sent.headers.insert("Remuda-Schema", "0"),
        ErrorCode::UnsupportedSchema,
        Some("Remuda-Schema"),
        "versions from 1",
    ),
    (
        "text where a number belongs",
        |request, _| request["timeout_ms"] = json!("soon"),
        ErrorCode::UnparsablePayload,
        Some("timeout_ms"),
        "soon",
    ),
    (
        "a field that is missing",
        |request, _| drop(request.as_object_mut().unwrap().remove("steps")),
        ErrorCode::UnparsablePayload,
        None,
        "steps",
    ),
    (
        "an unknown step type",
        |request, _| request["steps"][0]["action"] = json!({"teleport": {}}),
        ErrorCode::UnknownStepType,
        Some("steps[0].action"),
        "teleport",
    ),
    (
        "no steps",
        |request, _| request["steps"] = json!([]),
        ErrorCode::InvalidField,
        Some("steps"),
        "has no steps",
    ),
    (
        "an empty argv",
        |request, _| command(request)["argv"] = json!([]),
        ErrorCode::EmptyArgv,
        Some("steps[0].action.command.argv"),
        "names no program",
    ),
    (
        "a NUL in an argument",
        |request, _| command(request)["argv"] = json!(["echo", "a\u{0}b"]),
        ErrorCode::NulByte,
        Some("steps[0].action.command.argv[1]"),
        "holds a NUL byte",
    ),
    (
        "a path that climbs out of the sandbox",
        |request, _| {
            request["steps"][0]["action"] = json!({"file_patch": {"path": "../x", "content": ""}});
        },
        ErrorCode::PathEscapes,
        Some("steps[0].action.file_patch.path"),
        "\"../x\" leads out of the sandbox",
    ),
    (
        "a folder outside the sandbox",
        |request, _| command(request)["work_dir"] = json!("/../.."),
        ErrorCode::PathEscapes,
        Some("steps[0].action.command.work_dir"),
        "leads out of the sandbox",
    ),
    (
        "a time-out of zero",
        |request, _| request["timeout_ms"] = json!(0),
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "is zero, leave it out for the default",
    ),
    (
        "a step's time-out of zero",
        |request, _| command(request)["timeout_ms"] = json!(0),
        ErrorCode::InvalidTimeout,
        Some("steps[0].action.command.timeout_ms"),
        "is zero",
    ),
    (
        "a time-out of a year",
        |request, _| request["timeout_ms"] = json!(365_u64 * 86_400_000),
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "at most 86400000 ms",
    ),
    (
        "more than one problem",
        |request, _| {
            request["timeout_ms"] = json!(0);
            command(request)["argv"] = json!([]);
        },
        ErrorCode::InvalidTimeout,
        Some("timeout_ms"),
        "(and 1 more problems)",
    ),
];
