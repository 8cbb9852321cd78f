//! Requests under subjects that are no lane: a token is not one of ours, so that no lane will
//! ever fetch them. They are answered where it can be told whose they are, kept with the dead
//! letters otherwise, and taken off the queue.

use async_nats::jetstream::message::StreamMessage;
use broker_schema::codec::Format;
use broker_schema::digest::sha256_hex;
use broker_schema::{ErrorCode, ErrorInfo, PoolId, TaskRequest, TenantId, codec};
use remuda_telemetry::{Chain, TraceHeaders};

use crate::fleet::{DeadLetter, Fleet};
use crate::place::format_of;
use crate::terminals::Address;

/// Most requests of one subject that are looked at in one go.
const MOST: usize = 64;
/// Stands for a token that is not one.
const UNKNOWN: &str = "unknown";

/// Answers what waits under a subject that is no lane.
pub(crate) async fn sweep(fleet: &Fleet, subject: &str) {
    for _ in 0..MOST {
        match one(fleet, subject).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::debug!(subject, error = %Chain(&*error), "stray requests stay for now");
                return;
            }
        }
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The first of them; false where there is none.
async fn one(fleet: &Fleet, subject: &str) -> Result<bool, Cause> {
    let name = &fleet.broker.streams().requests;
    let stream = fleet.broker.jetstream().get_stream_no_info(name).await?;
    let Ok(message) = stream.get_last_raw_message_by_subject(subject).await else {
        return Ok(false);
    };
    // A subject with a wildcard in it finds the messages of others.
    if message.subject.as_str() != subject {
        return Ok(false);
    }
    let error = ErrorInfo::new(
        ErrorCode::InvalidToken,
        format!(
            "{:?} is not <prefix>.req.<tenant>.<pool> with tokens of [A-Za-z0-9_-]{{1,64}}",
            shortened(subject)
        ),
    )
    .at("subject");
    let (tenant, format) = (tenant_of(fleet, subject), format_of(Some(&message.headers)));
    let answer = tenant
        .clone()
        .and_then(|tenant| answer(tenant, &message, format));
    match answer {
        Some((address, digest)) => {
            let terminal = address.rejected(&digest, error);
            fleet
                .end(&terminal, format, &TraceHeaders::default())
                .await?;
        }
        None => bury(fleet, tenant, message.clone(), format, &error).await?,
    }
    stream.delete_message(message.sequence).await?;
    Ok(true)
}

fn tenant_of(fleet: &Fleet, subject: &str) -> Option<TenantId> {
    let prefix = fleet.broker.subjects().prefix();
    let rest = subject.strip_prefix(prefix)?.strip_prefix(".req.")?;
    rest.split('.').next()?.parse().ok()
}

/// Where the answer goes: only to the tenant that the server let publish.
fn answer(tenant: TenantId, message: &StreamMessage, format: Format) -> Option<(Address, String)> {
    let request = codec::decode::<TaskRequest>(&message.payload, format).ok()?;
    let address = Address {
        tenant,
        ..Address::of(&request)
    };
    Some((address, sha256_hex(&message.payload)))
}

async fn bury(
    fleet: &Fleet,
    tenant: Option<TenantId>,
    message: StreamMessage,
    format: Format,
    error: &ErrorInfo,
) -> Result<(), Cause> {
    let tenant = tenant.map_or_else(|| TenantId::new(UNKNOWN), Ok)?;
    let pool = PoolId::new(UNKNOWN)?;
    let letter = DeadLetter {
        id: format!("req/{}", message.sequence),
        code: error.code,
        reason: error.to_string(),
        subject: message.subject.to_string(),
        task: None,
        format,
        payload: message.payload,
        trace: TraceHeaders::default(),
    };
    Ok(fleet.dead_letter((&tenant, &pool), letter).await?)
}

fn shortened(subject: &str) -> String {
    subject.chars().take(200).collect()
}
