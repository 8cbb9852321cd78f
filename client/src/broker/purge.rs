//! Taking messages out of streams for good.

use super::error::Cause;
use super::{Broker, BrokerError};

impl Broker {
    /// Removes one message; false where it is gone already.
    pub async fn delete_message(&self, stream: &str, sequence: u64) -> Result<bool, BrokerError> {
        let failed = |source: Cause| BrokerError::Stream {
            operation: "remove a message of",
            stream: stream.to_owned(),
            source,
        };
        self.jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .delete_message(sequence)
            .await
            .map_err(|error| failed(error.into()))
    }

    /// Removes everything that a stream holds under one subject; how much there was.
    pub async fn purge(&self, stream: &str, subject: &str) -> Result<u64, BrokerError> {
        let failed = |source: Cause| BrokerError::Stream {
            operation: "remove messages of",
            stream: stream.to_owned(),
            source,
        };
        let purged = self
            .jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .purge()
            .filter(subject)
            .await
            .map_err(|error| failed(error.into()))?;
        Ok(purged.purged)
    }
}
