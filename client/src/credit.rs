//! Credit: what a pool has to give, as its dispatcher tells it once a second.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use broker_schema::{Credit, PoolId, codec};
use futures::{Stream, StreamExt as _};

use crate::broker::{BrokerError, format_of};
use crate::client::Client;
use crate::error::ClientError;

/// A dispatcher that took over a moment ago tells it within that.
const PATIENCE: Duration = Duration::from_secs(10);

/// Credits of one pool as they come. One that is missed is replaced by the
/// next.
#[derive(Debug)]
pub struct CreditStream {
    pool: PoolId,
    messages: async_nats::Subscriber,
}

impl Client {
    /// What a pool has to give: the next credit that is told.
    pub async fn credit(&self, pool: &PoolId) -> Result<Credit, ClientError> {
        let mut credits = self.credits(pool).await?;
        match tokio::time::timeout(PATIENCE, credits.next()).await {
            Ok(Some(credit)) => Ok(credit),
            Ok(None) | Err(_) => Err(ClientError::NoCredit {
                pool: pool.clone(),
                waited: PATIENCE,
            }),
        }
    }

    /// What a pool has to give, again and again.
    pub async fn credits(&self, pool: &PoolId) -> Result<CreditStream, ClientError> {
        let broker = &self.shared.broker;
        let subject = broker.subjects().credit(pool);
        let subscribed = broker.nats().subscribe(subject.clone()).await;
        let messages = subscribed.map_err(|error| ClientError::Credit {
            pool: pool.clone(),
            source: BrokerError::Subscribe {
                subject,
                source: error.into(),
            },
        })?;
        Ok(CreditStream {
            pool: pool.clone(),
            messages,
        })
    }
}

impl Stream for CreditStream {
    type Item = Credit;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Credit>> {
        loop {
            let Some(message) = ready!(self.messages.poll_next_unpin(context)) else {
                return Poll::Ready(None);
            };
            let credit = format_of(message.headers.as_ref())
                .and_then(|format| codec::decode::<Credit>(&message.payload, format));
            match credit {
                Ok(credit) if credit.pool == self.pool => return Poll::Ready(Some(credit)),
                Ok(_) => {}
                Err(error) => tracing::debug!(pool = %self.pool, %error, "credit cannot be read"),
            }
        }
    }
}
