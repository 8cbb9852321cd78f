//! The terminals of a run and the frames of a task, as they are stored.

use broker_schema::{Frame, RunId, TaskId, Terminal};
use futures::Stream;

use crate::broker::{Broker, BrokerError};
use crate::client::Client;
use crate::error::ClientError;
use crate::handed::note_terminal;
use crate::reader::{Reader, Removal, Until};

impl Client {
    /// The terminals of a run in the order they were stored, each with its
    /// sequence. Resume with the last sequence read plus one: each comes once,
    /// in order, whatever happened in between; where something after that place
    /// has been removed since, or the stream was lost, that is an error, and the
    /// last item. The same holds from the first result on for as long as this is
    /// read, however often nats-server goes away meanwhile.
    ///
    /// A sequence does not say of which stream it is: after nats-server has lost
    /// its data, read from the start.
    ///
    /// A stored terminal that cannot be read is an error too, and what follows
    /// it comes all the same.
    pub fn results(
        &self,
        run: &RunId,
        from: Option<u64>,
        until: Until,
    ) -> impl Stream<Item = Result<(u64, Terminal), ClientError>> + Send + use<> {
        let broker = self.shared.broker.clone();
        let filter = broker.subjects().terminals_of_run(&self.shared.tenant, run);
        let stream = broker.streams().terminals.clone();
        let reader = Reader::new(broker, stream, filter, from, Removal::Told, until);
        let noted = (self.shared.history.clone(), self.shared.tenant.clone());
        let start = (reader, run.clone(), noted);
        futures::stream::unfold(start, |(mut reader, run, noted)| async move {
            let item = reader.next().await?;
            let item = item
                .and_then(|stored| Ok((stored.sequence, stored.decode()?)))
                .map_err(|source| ClientError::Results {
                    run: run.clone(),
                    source,
                });
            if let Ok((_, terminal)) = &item {
                note_terminal(&noted.0, &noted.1, terminal);
            }
            Some((item, (reader, run, noted)))
        })
    }

    /// The stored frames of one task, all attempts, each with its sequence.
    /// Frames of a lower attempt, and repeats, are the reader's to drop:
    /// [`Client::stream`] does. What is no frame is left out.
    pub fn output(
        &self,
        run: &RunId,
        task: TaskId,
        from: Option<u64>,
        until: Until,
    ) -> impl Stream<Item = Result<(u64, Frame), ClientError>> + Send + use<> {
        let broker = &self.shared.broker;
        let filter = broker.subjects().result(&self.shared.tenant, run, task);
        let frames = frames(broker, filter, from, until);
        futures::StreamExt::map(frames, move |item| {
            item.map_err(|source| ClientError::Output { task, source })
        })
    }
}

/// The frames stored under one subject.
pub(crate) fn frames(
    broker: &Broker,
    subject: String,
    from: Option<u64>,
    until: Until,
) -> impl Stream<Item = Result<(u64, Frame), BrokerError>> + Send + use<> {
    let stream = broker.streams().results.clone();
    let removal = Removal::PassedOver;
    let reader = Reader::new(broker.clone(), stream, subject, from, removal, until);
    futures::stream::unfold(reader, |mut reader| async move {
        loop {
            let stored = match reader.next().await? {
                Ok(stored) => stored,
                Err(error) => return Some((Err(error), reader)),
            };
            match stored.decode::<Frame>() {
                Ok(frame) => return Some((Ok((stored.sequence, frame)), reader)),
                // Whatever it is, it is not of the output: the terminal's sums tell whether
                // anything is missing.
                Err(error) => tracing::warn!(
                    sequence = stored.sequence, %error, "what is stored there is no frame, left out"
                ),
            }
        }
    })
}
