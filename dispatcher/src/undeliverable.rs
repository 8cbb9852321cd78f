//! Messages of the work queues that nobody will ever take: kept with the dead letters, answered
//! where it can be told whose they are, and taken off the queue.

use broker_schema::codec;
use broker_schema::{
    ErrorCode, HEADER_DIGEST, HEADER_SCHEMA, ParsedSubject, Placement, PoolId, TaskId, TenantId,
};
use remuda_client::broker::{BrokerError, StoredMessage};

use crate::fleet::{DeadLetter, Fleet};
use crate::intake::{Incoming, Verdict, judge};
use crate::terminals::Address;

/// Stands for a token that is not one.
const UNKNOWN: &str = "unknown";

/// Whose a message is, as far as it can be told.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    tenant: TenantId,
    pool: PoolId,
    task: Option<Named>,
}

#[derive(Debug, PartialEq, Eq)]
struct Named {
    address: Address,
    digest: String,
    attempt: u32,
}

/// Sees to one message and deletes it. Safe to repeat.
pub(crate) async fn bury(
    fleet: &Fleet,
    stream: &str,
    message: StoredMessage,
    reason: String,
) -> Result<(), BrokerError> {
    let sequence = message.sequence;
    let Some(owner) = owner(fleet, &message) else {
        tracing::error!(
            stream,
            sequence,
            reason,
            "a message that nobody takes is deleted"
        );
        return fleet.broker.delete_stored(stream, sequence).await.map(drop);
    };
    let ended = match &owner.task {
        Some(named) => has_terminal(fleet, &named.address).await?,
        None => false,
    };
    // One that has its end was only never settled.
    if !ended {
        let format = message.format().unwrap_or_default();
        let trace = message.trace();
        let kind = if stream == fleet.broker.streams().requests {
            "req"
        } else {
            "run"
        };
        let letter = DeadLetter {
            id: format!("{kind}/{sequence}"),
            code: ErrorCode::AttemptsExhausted,
            reason: reason.clone(),
            subject: message.subject.clone(),
            task: owner.task.as_ref().map(|named| named.address.task),
            format,
            payload: message.payload,
            trace: trace.clone(),
        };
        fleet
            .dead_letter((&owner.tenant, &owner.pool), letter)
            .await?;
        if let Some(named) = owner.task {
            let terminal = named
                .address
                .undeliverable(&named.digest, named.attempt, &reason);
            fleet.end(&terminal, format, &trace).await?;
        }
    }
    fleet.broker.delete_stored(stream, sequence).await.map(drop)
}

async fn has_terminal(fleet: &Fleet, address: &Address) -> Result<bool, BrokerError> {
    let (tenant, run, task): (_, _, TaskId) = (&address.tenant, &address.run, address.task);
    let stored = fleet.broker.terminal_of(tenant, run, task).await?;
    Ok(stored.is_some())
}

/// `None` only where even the stand-ins are no names.
fn owner(fleet: &Fleet, message: &StoredMessage) -> Option<Owner> {
    match fleet.broker.subjects().parse(&message.subject) {
        Some(ParsedSubject::Request { tenant, pool }) => {
            let task = requested(fleet, message, &tenant, &pool);
            Some(Owner { tenant, pool, task })
        }
        Some(ParsedSubject::Placement { tenant, .. }) => match placed(message, &tenant) {
            Some(named) => Some(Owner {
                tenant,
                pool: named.address.pool.clone(),
                task: Some(named),
            }),
            None => Some(Owner {
                tenant,
                pool: UNKNOWN.parse().ok()?,
                task: None,
            }),
        },
        _ => Some(Owner {
            tenant: UNKNOWN.parse().ok()?,
            pool: UNKNOWN.parse().ok()?,
            task: None,
        }),
    }
}

fn requested(
    fleet: &Fleet,
    message: &StoredMessage,
    tenant: &TenantId,
    pool: &PoolId,
) -> Option<Named> {
    let incoming = Incoming {
        tenant,
        pool,
        payload: &message.payload,
        message_id: message.header("Nats-Msg-Id"),
        schema: message.header(HEADER_SCHEMA),
        digest: message.header(HEADER_DIGEST),
    };
    let (address, digest) =
        match judge(incoming, message.format(), true, String::new, &fleet.limits) {
            Verdict::Queue { request, digest } => (Address::of(&request), digest),
            Verdict::Reject {
                address, digest, ..
            } => (address, digest),
            Verdict::Nameless { .. } => return None,
        };
    Some(Named {
        address,
        digest,
        attempt: 0,
    })
}

/// Whoever may write there chose the subject: what the payload says of the tenant must agree.
fn placed(message: &StoredMessage, tenant: &TenantId) -> Option<Named> {
    let format = message.format().ok()?;
    let placement = codec::decode::<Placement>(&message.payload, format).ok()?;
    (placement.task.tenant == *tenant).then(|| Named {
        address: Address::of(&placement.task),
        digest: placement.request_digest,
        attempt: placement.attempt,
    })
}
