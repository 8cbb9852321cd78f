//! Many tasks at once, with a bound on how many are under way.

use broker_schema::{PoolId, TaskId, TaskRequest, Terminal};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, Stream, StreamExt as _};

use crate::client::Client;
use crate::credit::CreditStream;
use crate::error::ClientError;
use crate::pace::Pacer;

type Ended = (TaskId, Result<Terminal, ClientError>);

impl Client {
    /// Submits what `requests` yields, at most `in_flight` at a time without a
    /// terminal, and yields terminals as they come.
    pub fn submit_many<S>(
        &self,
        requests: S,
        in_flight: usize,
    ) -> impl Stream<Item = Ended> + use<S>
    where
        S: Stream<Item = TaskRequest>,
    {
        let client = self.clone();
        requests
            .map(move |request| {
                let client = client.clone();
                async move {
                    let task = request.id;
                    (task, client.run(request).await)
                }
            })
            .buffer_unordered(in_flight.max(1))
    }

    /// The same, paced by the credit of the pool that the requests are for: no
    /// more are under way than keep the pool busy, however many there are.
    pub async fn submit_paced<S>(
        &self,
        pool: &PoolId,
        requests: S,
        pacer: Pacer,
    ) -> Result<impl Stream<Item = Ended> + use<S>, ClientError>
    where
        S: Stream<Item = TaskRequest> + Unpin,
    {
        let paced = Paced {
            client: self.clone(),
            requests: Some(requests),
            credits: Some(self.credits(pool).await?),
            pacer,
            under_way: FuturesUnordered::new(),
        };
        Ok(futures::stream::unfold(paced, |mut paced| async move {
            let ended = paced.next().await?;
            Some((ended, paced))
        }))
    }
}

struct Paced<S> {
    client: Client,
    /// None when all were submitted.
    requests: Option<S>,
    /// None when the connection was closed for good.
    credits: Option<CreditStream>,
    pacer: Pacer,
    under_way: FuturesUnordered<BoxFuture<'static, Ended>>,
}

impl<S: Stream<Item = TaskRequest> + Unpin> Paced<S> {
    async fn next(&mut self) -> Option<Ended> {
        loop {
            let room = self.pacer.allows(self.under_way.len());
            if self.requests.is_none() && self.under_way.is_empty() {
                return None;
            }
            tokio::select! {
                biased;
                Some(ended) = self.under_way.next(), if !self.under_way.is_empty() => {
                    return Some(ended);
                }
                credit = maybe(&mut self.credits) => match credit {
                    Some(credit) => self.pacer.observe(&credit, self.under_way.len()),
                    None => self.credits = None,
                },
                request = maybe(&mut self.requests), if room => match request {
                    Some(request) => {
                        let client = self.client.clone();
                        let run = async move {
                            let task = request.id;
                            (task, client.run(request).await)
                        };
                        self.under_way.push(run.boxed());
                    }
                    None => self.requests = None,
                },
            }
        }
    }
}

/// The next of a stream; waits for ever where there is none.
async fn maybe<S: Stream + Unpin>(stream: &mut Option<S>) -> Option<S::Item> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}
