//! Makes the fleet's streams again where a server comes back without them.

use std::sync::Arc;
use std::time::Duration;

use remuda_telemetry::Chain;

use crate::decide::backoff;
use crate::fleet::Fleet;

/// Somebody may remove a stream while the connection stands.
const LOOK: Duration = Duration::from_secs(30);

/// Looks after every loss of the connection: a server that lost its storage has lost the
/// streams too, and everybody else waits for a dispatcher to make them.
pub(crate) async fn run(fleet: Arc<Fleet>) {
    tokio::select! {
        () = fleet.group.token().cancelled() => {}
        () = look_after(&fleet) => {}
    }
}

async fn look_after(fleet: &Fleet) {
    loop {
        tokio::select! {
            () = fleet.broker.lost_for(Duration::ZERO) => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        if !fleet.broker.regained().await {
            return;
        }
        ensure(fleet).await;
    }
}

async fn ensure(fleet: &Fleet) {
    let sizes = fleet.options.streams.into();
    for failures in 0.. {
        let Err(error) = fleet.broker.ensure_streams(&sizes).await else {
            return;
        };
        // One that is there with other settings stays so: a person has to look at it.
        if !error.retryable() {
            tracing::error!(
                code = %error.code(), error = %Chain(&error),
                "the streams are not as they must be"
            );
            return;
        }
        tracing::warn!(error = %Chain(&error), "the streams cannot be looked after");
        if !fleet.broker.connected() {
            return;
        }
        tokio::time::sleep(backoff(failures, rand::random())).await;
    }
}
