//! Many tasks at once, with a bound on how many are under way.

use broker_schema::{TaskId, TaskRequest, Terminal};
use futures::{Stream, StreamExt as _};

use crate::client::Client;
use crate::error::ClientError;

impl Client {
    /// Submits what `requests` yields, at most `in_flight` at a time without a
    /// terminal, and yields terminals as they come.
    pub fn submit_many<S>(
        &self,
        requests: S,
        in_flight: usize,
    ) -> impl Stream<Item = (TaskId, Result<Terminal, ClientError>)> + use<S>
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
}
