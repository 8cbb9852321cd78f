//! Intake: what comes from a lane is read and judged; what cannot run is answered at once.

use broker_schema::codec::{self, Format};
use broker_schema::digest::sha256_hex;
use broker_schema::{
    ErrorCode, ErrorInfo, GroupId, HEADER_DIGEST, HEADER_SCHEMA, PoolId, RequestLimits, RunId,
    SCHEMA_OLDEST, TaskId, TaskRequest, TenantId, Timestamp,
};
use remuda_client::broker::{BrokerError, Delivery};
use remuda_telemetry::failpoint;
use serde::Deserialize;

use crate::fleet::{DeadLetter, Fleet};
use crate::terminals::Address;

/// Stands for the run of a request that cannot be read.
const UNKNOWN_RUN: &str = "unknown";

/// A request and what came beside it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) pool: &'a PoolId,
    pub(crate) payload: &'a [u8],
    pub(crate) message_id: Option<&'a str>,
    pub(crate) schema: Option<&'a str>,
    pub(crate) digest: Option<&'a str>,
}

/// What becomes of a request.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    Queue {
        request: Box<TaskRequest>,
        digest: String,
    },
    /// It ends as rejected.
    Reject {
        address: Address,
        digest: String,
        error: ErrorInfo,
    },
    /// It does not even say which task it is.
    Nameless { error: ErrorInfo },
}

/// Judges a request. Pure.
pub(crate) fn judge(
    incoming: Incoming<'_>,
    format: Result<Format, ErrorInfo>,
    known_pool: bool,
    pools: impl FnOnce() -> String,
    limits: &RequestLimits,
) -> Verdict {
    let digest = incoming
        .digest
        .filter(|text| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .map_or_else(|| sha256_hex(incoming.payload), str::to_owned);
    let read = format.clone().and_then(|format| {
        check_schema(incoming.schema)?;
        codec::decode::<TaskRequest>(incoming.payload, format)
    });
    let request = match read {
        Ok(request) => request,
        Err(error) => return unreadable(incoming, format.ok(), digest, error),
    };
    let problem = mismatch(incoming, &request)
        .or_else(|| (!known_pool).then(|| unknown_pool(incoming.pool, &pools())))
        .or_else(|| {
            request
                .validate(limits)
                .err()
                .map(broker_schema::Invalid::into_info)
        });
    match problem {
        None => Verdict::Queue {
            request: Box::new(request),
            digest,
        },
        Some(error) => Verdict::Reject {
            // The subject is what the server let the sender publish to: the answer stays in it.
            address: Address {
                tenant: incoming.tenant.clone(),
                pool: incoming.pool.clone(),
                ..Address::of(&request)
            },
            digest,
            error,
        },
    }
}

fn check_schema(schema: Option<&str>) -> Result<(), ErrorInfo> {
    match schema.map(str::parse::<u32>) {
        None => Ok(()),
        // Fields are only added: a newer one can be read.
        Some(Ok(version)) if version >= SCHEMA_OLDEST => Ok(()),
        _ => Err(ErrorInfo::new(
            ErrorCode::UnsupportedSchema,
            format!(
                "schema {:?} is not read here, versions from {SCHEMA_OLDEST} are",
                schema
                    .unwrap_or_default()
                    .chars()
                    .take(20)
                    .collect::<String>()
            ),
        )
        .at(HEADER_SCHEMA)),
    }
}

fn mismatch(incoming: Incoming<'_>, request: &TaskRequest) -> Option<ErrorInfo> {
    let (field, said, subject) = if &request.tenant != incoming.tenant {
        ("tenant", request.tenant.as_str(), incoming.tenant.as_str())
    } else if &request.pool != incoming.pool {
        ("pool", request.pool.as_str(), incoming.pool.as_str())
    } else {
        return None;
    };
    Some(
        ErrorInfo::new(
            ErrorCode::SubjectMismatch,
            format!("is {said}, but the request was published for {subject}"),
        )
        .at(field),
    )
}

fn unknown_pool(pool: &PoolId, known: &str) -> ErrorInfo {
    ErrorInfo::new(
        ErrorCode::UnknownPool,
        format!("there is no pool {pool}, the pools are: {known}"),
    )
    .at("pool")
}

/// What may be readable of a request that is not.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Names {
    id: Option<String>,
    run: Option<String>,
    group: Option<String>,
    submitted_at: Option<Timestamp>,
}

fn unreadable(
    incoming: Incoming<'_>,
    format: Option<Format>,
    digest: String,
    error: ErrorInfo,
) -> Verdict {
    let names = [Format::MessagePack, Format::Json]
        .into_iter()
        .filter(|candidate| format.is_none_or(|format| format == *candidate))
        .find_map(|format| codec::decode::<Names>(incoming.payload, format).ok())
        .unwrap_or_default();
    let task = names
        .id
        .and_then(|id| id.parse().ok())
        .or_else(|| task_of(incoming.message_id?, incoming.tenant));
    let run = names
        .run
        .and_then(|run| run.parse::<RunId>().ok())
        .or_else(|| UNKNOWN_RUN.parse().ok());
    let (Some(task), Some(run)) = (task, run) else {
        return Verdict::Nameless { error };
    };
    Verdict::Reject {
        address: Address {
            tenant: incoming.tenant.clone(),
            run,
            task,
            pool: incoming.pool.clone(),
            group: names.group.and_then(|group| group.parse::<GroupId>().ok()),
            queued: names.submitted_at.unwrap_or_else(Timestamp::now),
        },
        digest,
        error,
    }
}

/// The task of a message id, `tenant/task` and maybe more.
fn task_of(message_id: &str, tenant: &TenantId) -> Option<TaskId> {
    let mut parts = message_id.split('/');
    (parts.next()? == tenant.as_str()).then_some(())?;
    parts.next()?.parse().ok()
}

/// Judges a delivery and answers what cannot run. The request where it can.
pub(crate) async fn take(
    fleet: &Fleet,
    (tenant, pool): (&TenantId, &PoolId),
    delivery: &Delivery,
) -> Option<(Box<TaskRequest>, String)> {
    failpoint::step(failpoint::dispatcher::FETCHED);
    let incoming = Incoming {
        tenant,
        pool,
        payload: &delivery.payload,
        message_id: delivery.header("Nats-Msg-Id"),
        schema: delivery.header(HEADER_SCHEMA),
        digest: delivery.header(HEADER_DIGEST),
    };
    let known = fleet.pools.contains_key(pool);
    let names = || {
        let names: Vec<&str> = fleet.pools.keys().map(PoolId::as_str).collect();
        names.join(", ")
    };
    let verdict = judge(incoming, delivery.format(), known, names, &fleet.limits);
    let answered = match verdict {
        Verdict::Queue { request, digest } => return Some((request, digest)),
        Verdict::Reject {
            address,
            digest,
            error,
        } => {
            let terminal = address.rejected(&digest, error);
            fleet
                .end(
                    &terminal,
                    delivery.format().unwrap_or_default(),
                    &delivery.trace(),
                )
                .await
                .map(drop)
        }
        Verdict::Nameless { error } => bury(fleet, (tenant, pool), delivery, &error).await,
    };
    crate::place::settle(delivery, answered).await;
    None
}

async fn bury(
    fleet: &Fleet,
    lane: (&TenantId, &PoolId),
    delivery: &Delivery,
    error: &ErrorInfo,
) -> Result<(), BrokerError> {
    let letter = DeadLetter::of("req", delivery, None, error.code, error.to_string());
    fleet.dead_letter(lane, letter).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::Step;

    fn task() -> TaskRequest {
        let id = |text: &str| text.to_owned();
        TaskRequest::new(
            id("acme").parse().unwrap(),
            id("r7").parse().unwrap(),
            id("py").parse().unwrap(),
            vec![Step::command(["true"])],
        )
    }

    fn judged(
        payload: &[u8],
        message_id: Option<&str>,
        schema: Option<&str>,
        format: Format,
        known: bool,
    ) -> Verdict {
        let (tenant, pool) = ("acme".parse().unwrap(), "py".parse().unwrap());
        let incoming = Incoming {
            tenant: &tenant,
            pool: &pool,
            payload,
            message_id,
            schema,
            digest: None,
        };
        let names = || "a, b".to_owned();
        judge(
            incoming,
            Ok(format),
            known,
            names,
            &RequestLimits::default(),
        )
    }

    #[test]
    fn a_good_request_is_queued_with_its_digest() {
        let task = task();
        for format in [Format::Json, Format::MessagePack] {
            let bytes = codec::encode(&task, format).unwrap();
            let expected = Verdict::Queue {
                request: Box::new(task.clone()),
                digest: sha256_hex(&bytes),
            };
            assert_eq!(judged(&bytes, None, Some("7"), format, true), expected);
        }
    }

    type Case<'c> = (
        Vec<u8>,
        Option<&'c str>,
        Option<&'c str>,
        bool,
        ErrorCode,
        Option<&'c str>,
    );

    #[test]
    fn what_cannot_run_is_rejected_to_whoever_can_be_told() {
        let good = task();
        let json = |change: fn(&mut serde_json::Value)| {
            let mut value = serde_json::to_value(&good).unwrap();
            change(&mut value);
            serde_json::to_vec(&value).unwrap()
        };
        let id = good.id.to_string();
        let message_id = format!("acme/{id}");
        let other = format!("evil/{id}");
        let cases: Vec<Case<'_>> = vec![
            (
                json(|_| ()),
                None,
                None,
                false,
                ErrorCode::UnknownPool,
                Some("r7"),
            ),
            (
                json(|v| v["pool"] = "other".into()),
                None,
                None,
                true,
                ErrorCode::SubjectMismatch,
                Some("r7"),
            ),
            (
                json(|v| v["tenant"] = "evil".into()),
                None,
                None,
                true,
                ErrorCode::SubjectMismatch,
                Some("r7"),
            ),
            (
                json(|v| v["timeout_ms"] = 0.into()),
                None,
                None,
                true,
                ErrorCode::InvalidTimeout,
                Some("r7"),
            ),
            (
                json(|v| v["steps"] = serde_json::json!([])),
                None,
                None,
                true,
                ErrorCode::InvalidField,
                Some("r7"),
            ),
            (
                json(|v| v["steps"][0]["action"] = serde_json::json!({"fly": {}})),
                None,
                None,
                true,
                ErrorCode::UnknownStepType,
                Some("r7"),
            ),
            (
                json(|v| v["steps"][0]["action"]["command"]["argv"][0] = "a\0".into()),
                None,
                None,
                true,
                ErrorCode::NulByte,
                Some("r7"),
            ),
            (
                json(|_| ()),
                None,
                Some("0"),
                true,
                ErrorCode::UnsupportedSchema,
                Some("r7"),
            ),
            (
                json(|_| ()),
                None,
                Some("x"),
                true,
                ErrorCode::UnsupportedSchema,
                Some("r7"),
            ),
            (
                json(|v| v["run"] = "a b".into()),
                None,
                None,
                true,
                ErrorCode::InvalidToken,
                Some(UNKNOWN_RUN),
            ),
            (
                b"garbage".to_vec(),
                Some(&message_id),
                None,
                true,
                ErrorCode::UnparsablePayload,
                Some(UNKNOWN_RUN),
            ),
            (
                json(|v| v["id"] = "x".into()),
                Some(&message_id),
                None,
                true,
                ErrorCode::InvalidToken,
                Some("r7"),
            ),
            (
                b"garbage".to_vec(),
                Some(&other),
                None,
                true,
                ErrorCode::UnparsablePayload,
                None,
            ),
            (
                b"garbage".to_vec(),
                None,
                None,
                true,
                ErrorCode::UnparsablePayload,
                None,
            ),
            (
                Vec::new(),
                Some("//"),
                None,
                true,
                ErrorCode::UnparsablePayload,
                None,
            ),
        ];
        for (payload, message_id, schema, known, code, run) in cases {
            let shown = String::from_utf8_lossy(&payload).into_owned();
            match (
                judged(&payload, message_id, schema, Format::Json, known),
                run,
            ) {
                (Verdict::Reject { address, error, .. }, Some(run)) => {
                    assert_eq!(error.code, code, "{shown}: {error}");
                    assert_eq!(address.run.as_str(), run, "{shown}");
                    assert_eq!((address.task, address.tenant.as_str()), (good.id, "acme"));
                    if code == ErrorCode::UnknownPool {
                        assert!(error.message.contains("a, b"), "{error}");
                    }
                }
                (Verdict::Nameless { error }, None) => assert_eq!(error.code, code, "{shown}"),
                (other, _) => panic!("{shown}: {other:?}"),
            }
        }
    }
}
