//! Taking lanes from an earlier leader: its consumers are removed, so that what it had not settled
//! is delivered at once, and what it says from now on goes nowhere.

use broker_schema::stream::{ConsumerDef, lane_term};
use broker_schema::{ParsedSubject, Term, subject_matches};
use futures::{StreamExt as _, stream};
use remuda_client::broker::{BrokerError, ConsumerState};
use remuda_telemetry::Chain;

use crate::fleet::Fleet;
use crate::leader::Terms;

/// Consumers that are removed at the same time.
const AT_ONCE: usize = 16;

/// Removes what earlier leaders of the pools that are led now have left. What cannot be removed
/// is met again when its lane is opened.
pub(crate) async fn clear(fleet: &Fleet, terms: &Terms) {
    if terms.is_empty() {
        return;
    }
    let requests = &fleet.broker.streams().requests;
    let consumers = match fleet.broker.consumers(requests).await {
        Ok(consumers) => consumers,
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "earlier leaders' lanes cannot be looked up");
            return;
        }
    };
    let left = consumers.into_iter().filter(|consumer| {
        let subject = fleet.broker.subjects().parse(&consumer.filter);
        let Some(ParsedSubject::Request { pool, .. }) = subject else {
            return false;
        };
        terms
            .get(&pool)
            .is_some_and(|term| outdated(consumer, *term))
    });
    stream::iter(left)
        .for_each_concurrent(AT_ONCE, |consumer| async move {
            remove(fleet, requests, &consumer)
                .await
                .unwrap_or_else(|error| {
                    tracing::debug!(error = %Chain(&error), "an earlier leader's lane is left");
                });
        })
        .await;
}

/// The consumers that have a lane's messages and are not its own.
#[derive(Debug)]
pub(crate) struct Others {
    stream: String,
    consumers: Vec<ConsumerState>,
}

impl Others {
    pub(crate) async fn of(fleet: &Fleet, lane: &ConsumerDef) -> Result<Self, BrokerError> {
        let mut consumers = fleet.broker.consumers(&lane.stream).await?;
        consumers.retain(|consumer| {
            consumer.durable != lane.durable && subject_matches(&consumer.filter, &lane.filter)
        });
        Ok(Self {
            stream: lane.stream.clone(),
            consumers,
        })
    }

    /// The term of a later leader's.
    pub(crate) fn newer_than(&self, term: Term) -> Option<Term> {
        let terms = self
            .consumers
            .iter()
            .filter_map(|consumer| lane_term(&consumer.durable));
        terms.max().filter(|newest| *newest > term)
    }

    pub(crate) async fn remove(self, fleet: &Fleet) -> Result<(), BrokerError> {
        for consumer in &self.consumers {
            if !consumer.durable.starts_with("lane-") {
                tracing::warn!(
                    stream = self.stream,
                    consumer = consumer.durable,
                    filter = consumer.filter,
                    "a consumer that is not the fleet's takes its requests: it is removed"
                );
            }
            remove(fleet, &self.stream, consumer).await?;
        }
        Ok(())
    }
}

fn outdated(consumer: &ConsumerState, term: Term) -> bool {
    // One without a term is from before there were any.
    consumer.durable.starts_with("lane-")
        && lane_term(&consumer.durable).is_none_or(|theirs| theirs < term)
}

async fn remove(fleet: &Fleet, stream: &str, consumer: &ConsumerState) -> Result<(), BrokerError> {
    let removed = fleet
        .broker
        .delete_consumer(stream, &consumer.durable)
        .await?;
    if removed {
        tracing::debug!(
            consumer = consumer.durable,
            "an earlier leader's lane is taken"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consumer(durable: &str) -> ConsumerState {
        ConsumerState {
            durable: durable.to_owned(),
            filter: "remuda.req.a.b".to_owned(),
            created: 0,
            delivered: 0,
            ack_pending: 0,
            pending: 0,
        }
    }

    #[test]
    fn only_earlier_leaders_lanes_are_outdated() {
        for (durable, expected) in [
            ("lane-a=b=4", true),
            ("lane-a=b=5", false),
            ("lane-a=b=6", false),
            ("lane-a-b", true),
            ("somebody-elses", false),
        ] {
            assert_eq!(outdated(&consumer(durable), Term(5)), expected, "{durable}");
        }
    }

    #[test]
    fn a_later_leader_is_recognised_among_others() {
        let others = |names: &[&str]| Others {
            stream: "REQ".to_owned(),
            consumers: names.iter().map(|name| consumer(name)).collect(),
        };
        assert_eq!(others(&["x", "lane-a=b=4"]).newer_than(Term(5)), None);
        let later = others(&["lane-a=b=6", "lane-a=b=9", "x"]);
        assert_eq!(later.newer_than(Term(5)), Some(Term(9)));
    }
}
