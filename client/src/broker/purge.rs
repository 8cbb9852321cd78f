//! Taking all messages of a subject out of a stream for good.

use super::{Broker, BrokerError};

impl Broker {
    /// Removes everything that a stream holds under one subject; how much there was.
    pub async fn purge(&self, stream: &str, subject: &str) -> Result<u64, BrokerError> {
        let purging = self.stream(stream).await?.purge().filter(subject);
        match purging.await {
            Ok(purged) => Ok(purged.purged),
            Err(error) => Err(BrokerError::Stream {
                operation: "remove messages of",
                stream: stream.to_owned(),
                source: error.into(),
            }),
        }
    }
}
