//! Advisories: the server says which messages it has given up on. Whoever leads the fleet sees to
//! them.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::stream::advisory_consumer;
use remuda_client::broker::{BrokerError, Delivery, Puller};
use remuda_telemetry::Chain;
use serde::Deserialize;

use crate::fleet::Fleet;
use crate::undeliverable;

/// How many are looked at at a time.
const BATCH: usize = 16;
/// Until one that could not be seen to comes again.
const AGAIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// What an advisory says, as far as it matters here.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Advisory {
    stream: String,
    consumer: String,
    stream_seq: u64,
    #[serde(default)]
    deliveries: u64,
}

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut terms = fleet.leadership.subscribe();
    let whole_fleet = fleet.leadership.whole_fleet().clone();
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            led = terms.wait_for(|terms| terms.contains_key(&whole_fleet)) => if led.is_err() {
                return;
            },
        }
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            lost = terms.wait_for(|terms| !terms.contains_key(&whole_fleet)) => if lost.is_err() {
                return;
            },
            () = read(&fleet) => {}
        }
    }
}

/// Ends where the consumer cannot be used, to begin anew.
async fn read(fleet: &Fleet) {
    let opened = fleet
        .broker
        .puller(&advisory_consumer(fleet.broker.subjects()))
        .await;
    let ended = match opened {
        Ok(mut puller) => see_to_all(fleet, &mut puller).await,
        Err(error) => error,
    };
    tracing::debug!(error = %Chain(&ended), "advisories cannot be read, trying again");
    tokio::time::sleep(PAUSE).await;
}

async fn see_to_all(fleet: &Fleet, puller: &mut Puller) -> BrokerError {
    loop {
        puller.want(BATCH);
        let delivery = match puller.next().await {
            Ok(delivery) => delivery,
            Err(error) => return error,
        };
        let told = match see_to(fleet, &delivery).await {
            Ok(()) => delivery.ack().await,
            Err(error) => {
                tracing::debug!(error = %Chain(&error), "an undeliverable message stays for now");
                delivery.nak(AGAIN).await
            }
        };
        if let Err(error) = told {
            tracing::debug!(error = %Chain(&error), "an advisory comes again");
        }
    }
}

async fn see_to(fleet: &Fleet, delivery: &Delivery) -> Result<(), BrokerError> {
    let Ok(advisory) = serde_json::from_slice::<Advisory>(&delivery.payload) else {
        tracing::warn!(
            subject = delivery.subject,
            "an advisory cannot be read, it is dropped"
        );
        return Ok(());
    };
    let streams = fleet.broker.streams();
    if ![&streams.requests, &streams.placements].contains(&&advisory.stream) {
        return Ok(());
    }
    // A later consumer delivers it anew.
    let consumers = fleet.broker.consumers(&advisory.stream).await?;
    if !consumers
        .iter()
        .any(|consumer| consumer.durable == advisory.consumer)
    {
        return Ok(());
    }
    let stored = fleet
        .broker
        .stored_message(&advisory.stream, advisory.stream_seq)
        .await?;
    let Some(message) = stored else {
        return Ok(());
    };
    let reason = format!(
        "delivered {} times to {} and never settled",
        advisory.deliveries, advisory.consumer
    );
    undeliverable::bury(fleet, &advisory.stream, message, reason).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advisory_is_read_as_the_server_writes_it() {
        let text = r#"{"type":"io.nats.jetstream.advisory.v1.max_deliver","id":"x",
            "timestamp":"2026-01-01T00:00:00Z","stream":"REMUDA_RUN","consumer":"worker-w1",
            "stream_seq":42,"deliveries":100}"#;
        let expected = Advisory {
            stream: "REMUDA_RUN".to_owned(),
            consumer: "worker-w1".to_owned(),
            stream_seq: 42,
            deliveries: 100,
        };
        assert_eq!(serde_json::from_str::<Advisory>(text).unwrap(), expected);
        assert!(serde_json::from_str::<Advisory>(r#"{"stream":"x"}"#).is_err());
    }
}
