//! Hints to this worker. Losing one costs time and nothing else.

use std::sync::Arc;

use async_nats::Subscriber;
use broker_schema::codec::{self, Format};
use broker_schema::{CancelCause, CancelNotice, ControlMessage, HEADER_CONTENT_TYPE};
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;

pub(crate) async fn run(shared: Arc<Shared>, mut messages: Subscriber, token: CancellationToken) {
    loop {
        let message = tokio::select! {
            biased;
            () = token.cancelled() => return,
            message = messages.next() => message,
        };
        let Some(message) = message else {
            return;
        };
        let content_type = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(HEADER_CONTENT_TYPE))
            .map(async_nats::HeaderValue::as_str);
        let hint = Format::from_content_type(content_type)
            .and_then(|format| codec::decode::<ControlMessage>(&message.payload, format));
        match hint {
            Ok(ControlMessage::CancelTask { tenant, task }) => {
                shared.cancel(&tenant, task, CancelCause::Asked);
            }
            // Whose it is the registry knows, by the lease.
            Ok(ControlMessage::Cancel(_)) => shared.renew_wake.notify_one(),
            Ok(ControlMessage::Drain) => {
                tracing::info!("asked to leave");
                shared.leave.cancel();
            }
            Ok(ControlMessage::Pools) => shared.registry_wake.notify_one(),
            Err(error) => tracing::warn!(%error, "a hint cannot be read"),
        }
    }
}

/// What was cancelled, told to all.
pub(crate) async fn cancels(
    shared: Arc<Shared>,
    mut notices: Subscriber,
    token: CancellationToken,
) {
    loop {
        let message = tokio::select! {
            biased;
            () = token.cancelled() => return,
            message = notices.next() => message,
        };
        let Some(message) = message else {
            return;
        };
        let notice = codec::decode::<CancelNotice>(&message.payload, Format::MessagePack)
            .or_else(|_| codec::decode::<CancelNotice>(&message.payload, Format::Json));
        match notice {
            Ok(notice) => shared.heed(&notice),
            Err(error) => tracing::warn!(%error, "a cancellation that was told on cannot be read"),
        }
    }
}
