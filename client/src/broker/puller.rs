//! Permit, then fetch: never more messages outstanding than the caller wants.

use std::pin::Pin;
use std::time::Duration;

use async_nats::{Message, StatusCode, Subscriber};
use broker_schema::stream::ConsumerDef;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use remuda_telemetry::Chain;
use tokio::sync::watch;
use tokio::time::Instant;

use super::connect::REQUEST_TIMEOUT;
use super::delivery::header;
use super::ledger::{Ledger, Pull};
use super::link::LinkState;
use super::{Broker, BrokerError, Delivery};

/// How long the server keeps a pull.
const EXPIRES: Duration = Duration::from_secs(30);
/// How often the server says that a pull is alive while it has nothing to send.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence after which the pulls are taken for forgotten.
const SILENCE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Fetches from one durable consumer through one long-lived inbox. Survives
/// restarts of the server and the removal of its consumer.
pub struct Puller {
    broker: Broker,
    def: ConsumerDef,
    inbox: Subscriber,
    inbox_prefix: String,
    request_subject: String,
    link: watch::Receiver<LinkState>,
    ledger: Ledger,
    generation: u64,
    heard: Instant,
    not_before: Instant,
    pause: Duration,
    /// Whether the consumer is made again where it is gone.
    mend: bool,
    /// Kept across calls: a caller that gives up on `next` must not undo it.
    repair: Option<BoxFuture<'static, Result<(), BrokerError>>>,
}

impl std::fmt::Debug for Puller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puller")
            .field("consumer", &self.def.durable)
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

impl Broker {
    /// Makes the consumer where it is missing and a puller on it.
    pub async fn puller(&self, def: &ConsumerDef) -> Result<Puller, BrokerError> {
        self.ensure_consumer(def).await?;
        let inbox_prefix = self.nats().new_inbox();
        let subject = format!("{inbox_prefix}.*.*");
        let inbox = self
            .nats()
            .subscribe(subject.clone())
            .await
            .map_err(|error| BrokerError::Subscribe {
                subject,
                source: error.into(),
            })?;
        let mut link = self.link();
        let generation = link.borrow_and_update().generation;
        let now = Instant::now();
        Ok(Puller {
            broker: self.clone(),
            def: def.clone(),
            inbox,
            inbox_prefix,
            request_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", def.stream, def.durable),
            link,
            ledger: Ledger::default(),
            generation,
            heard: now,
            not_before: now,
            pause: FIRST_PAUSE,
            mend: true,
            repair: None,
        })
    }
}

impl Puller {
    /// Tells of a consumer that is gone instead of making it again: somebody
    /// may have removed it to say that it is not the caller's any more.
    #[must_use]
    pub fn without_mending(mut self) -> Self {
        self.mend = false;
        self
    }

    /// How many messages the caller can take now, all told. Each one that
    /// `next` returns takes one off.
    pub fn want(&mut self, n: usize) {
        self.ledger.want(n);
    }

    /// How many more messages may come before `want` is called again.
    pub fn wanted(&self) -> usize {
        self.ledger.wanted()
    }

    /// The next message. Waits while nothing is wanted or there is nothing;
    /// what passes by itself is waited out. An error is something that time
    /// does not mend; the call may be repeated, and then tries again.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Delivery, BrokerError> {
        loop {
            self.observe_link()?;
            self.finish_repair().await?;
            self.top_up().await?;
            let now = Instant::now();
            let reading = self.ledger.wanted() > 0;
            let listening = reading && self.ledger.outstanding() > 0;
            let held_back = self.ledger.due().is_some() && self.not_before > now;
            tokio::select! {
                biased;
                message = self.inbox.next(), if reading => {
                    let Some(message) = message else {
                        return Err(BrokerError::Closed);
                    };
                    if let Some(delivery) = self.take(message)? {
                        return Ok(delivery);
                    }
                }
                changed = self.link.changed() => {
                    if changed.is_err() {
                        return Err(BrokerError::Closed);
                    }
                }
                () = tokio::time::sleep_until(self.heard + SILENCE), if listening => {
                    tracing::debug!(consumer = %self.def.durable, "no heartbeat, pulling again");
                    self.ledger.forget();
                }
                () = tokio::time::sleep_until(self.not_before), if held_back => {}
            }
        }
    }

    /// Stops fetching. Messages that arrived and were not taken go back to the
    /// server at once, or, where it does not answer, after their ack wait.
    pub async fn close(mut self) {
        let hand_back = async {
            if self.inbox.drain().await.is_err() {
                return;
            }
            while let Some(message) = self.inbox.next().await {
                if let Some(delivery) = Delivery::of(message, &self.broker)
                    && let Err(error) = delivery.nak(Duration::ZERO).await
                {
                    tracing::debug!(error = %Chain(&error), "message was not handed back");
                }
            }
        };
        if tokio::time::timeout(REQUEST_TIMEOUT, hand_back)
            .await
            .is_err()
        {
            tracing::debug!(consumer = %self.def.durable, "server did not end the subscription");
        }
    }

    fn observe_link(&mut self) -> Result<(), BrokerError> {
        let state = *self.link.borrow_and_update();
        if state.closed {
            return Err(BrokerError::Closed);
        }
        if state.generation != self.generation {
            self.generation = state.generation;
            self.ledger.forget();
            self.not_before = Instant::now();
        }
        Ok(())
    }

    async fn top_up(&mut self) -> Result<(), BrokerError> {
        let now = Instant::now();
        // What is sent into a broken connection would be asked for twice.
        if self.not_before > now || !self.link.borrow().connected {
            return Ok(());
        }
        while let Some(pull) = self.ledger.due() {
            let reply = format!("{}.{}.{}", self.inbox_prefix, pull.generation, pull.batch);
            let request = format!(
                "{{\"batch\":{},\"expires\":{},\"idle_heartbeat\":{}}}",
                pull.batch,
                EXPIRES.as_nanos(),
                HEARTBEAT.as_nanos()
            );
            self.broker
                .nats()
                .publish_with_reply(self.request_subject.clone(), reply, request.into())
                .await
                .map_err(|error| BrokerError::Consumer {
                    operation: "pull from",
                    stream: self.def.stream.clone(),
                    consumer: self.def.durable.clone(),
                    source: error.into(),
                })?;
            self.ledger.sent(pull);
            self.heard = now;
        }
        Ok(())
    }

    /// A message of the inbox: a delivery, or the server's word on a pull.
    fn take(&mut self, message: Message) -> Result<Option<Delivery>, BrokerError> {
        self.heard = Instant::now();
        if let Some(status) = message.status {
            self.status(status, &message)?;
            return Ok(None);
        }
        let subject = message.subject.clone();
        let Some(delivery) = Delivery::of(message, &self.broker) else {
            tracing::warn!(%subject, "message without JetStream's reply subject was dropped");
            return Ok(None);
        };
        self.pause = FIRST_PAUSE;
        self.ledger.delivered();
        Ok(Some(delivery))
    }

    fn status(&mut self, status: StatusCode, message: &Message) -> Result<(), BrokerError> {
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(());
        }
        let description = message.description.as_deref().unwrap_or_default();
        if let Some(pull) = Pull::parse(&message.subject) {
            let left = header(message.headers.as_ref(), "Nats-Pending-Messages")
                .and_then(|text| text.parse().ok());
            self.ledger.ended(pull, left);
        }
        match Verdict::of(status, description) {
            Verdict::Ended => {}
            Verdict::Wait => self.hold_back(),
            Verdict::Repair => {
                self.ledger.forget();
                self.hold_back();
                if !self.mend {
                    return Err(BrokerError::ConsumerGone {
                        stream: self.def.stream.clone(),
                        consumer: self.def.durable.clone(),
                    });
                }
                self.start_repair();
            }
            Verdict::Hopeless => {
                self.hold_back();
                return Err(BrokerError::ConsumerMismatch {
                    consumer: self.def.durable.clone(),
                    setting: "answer to a pull",
                    expected: "messages".to_owned(),
                    found: description.to_owned(),
                });
            }
        }
        Ok(())
    }

    fn hold_back(&mut self) {
        self.not_before = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn start_repair(&mut self) {
        let (broker, def, not_before) = (self.broker.clone(), self.def.clone(), self.not_before);
        self.repair = Some(Box::pin(async move {
            tokio::time::sleep_until(not_before).await;
            broker.ensure_consumer(&def).await
        }));
    }

    async fn finish_repair(&mut self) -> Result<(), BrokerError> {
        while let Some(repair) = &mut self.repair {
            let outcome = Pin::new(repair).await;
            self.repair = None;
            match outcome {
                Ok(()) => {
                    tracing::info!(consumer = %self.def.durable, "consumer was made again");
                    self.not_before = Instant::now();
                }
                Err(error) => {
                    self.hold_back();
                    self.start_repair();
                    if !error.retryable() {
                        return Err(error);
                    }
                    tracing::debug!(error = %Chain(&error), "consumer cannot be made, trying again");
                }
            }
        }
        Ok(())
    }
}

/// What a status of the server means for pulling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The pull is over; the next may go out at once.
    Ended,
    /// The next had better wait a little.
    Wait,
    /// There is no consumer.
    Repair,
    /// The consumer is not one that can be pulled from like this.
    Hopeless,
}

impl Verdict {
    fn of(status: StatusCode, description: &str) -> Self {
        let text = description.to_ascii_lowercase();
        match status {
            StatusCode::NOT_FOUND | StatusCode::TIMEOUT => Self::Ended,
            StatusCode::NO_RESPONDERS => Self::Repair,
            StatusCode::REQUEST_TERMINATED if text.contains("deleted") => Self::Repair,
            StatusCode::REQUEST_TERMINATED
                if text.contains("push based") || text.contains("exceeded maxrequest") =>
            {
                Self::Hopeless
            }
            StatusCode::REQUEST_TERMINATED if text.contains("batch completed") => Self::Ended,
            _ => Self::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_about_a_pull() {
        for (status, description, expected) in [
            (StatusCode::NOT_FOUND, "No Messages", Verdict::Ended),
            (StatusCode::TIMEOUT, "Request Timeout", Verdict::Ended),
            (StatusCode::NO_RESPONDERS, "", Verdict::Repair),
            (
                StatusCode::REQUEST_TERMINATED,
                "Consumer Deleted",
                Verdict::Repair,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Exceeded MaxWaiting",
                Verdict::Wait,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Leadership Change",
                Verdict::Wait,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Server Shutdown",
                Verdict::Wait,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Batch Completed",
                Verdict::Ended,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Consumer is push based",
                Verdict::Hopeless,
            ),
            (
                StatusCode::REQUEST_TERMINATED,
                "Exceeded MaxRequestBatch of 1",
                Verdict::Hopeless,
            ),
            (
                StatusCode::PIN_ID_MISMATCH,
                "Nats-Pin-Id mismatch",
                Verdict::Wait,
            ),
        ] {
            assert_eq!(Verdict::of(status, description), expected, "{description}");
        }
    }
}
