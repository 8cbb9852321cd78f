//! File steps: written in one call, read piece by piece.

use broker_schema::{ExitStatus, FilePatch, FileRead, FrameKind};
use bytes::Bytes;
use remuda_proto::v1;
use remuda_telemetry::history::Call;

use super::{Closed, Run, failed, unpublished};
use crate::outcome::{Budget, StepEnd};

/// Bytes of a file when the step does not say.
const DEFAULT_READ: u64 = 8 << 20;
/// Bytes of a file in one call.
const PIECE: u64 = 1 << 20;

impl Run<'_> {
    pub(super) async fn write(&mut self, patch: &FilePatch, budget: Budget) -> Closed {
        let request = v1::WriteFileRequest {
            epoch: self.epoch(),
            path: Bytes::copy_from_slice(patch.path.as_bytes()),
            content: Bytes::copy_from_slice(patch.content.as_slice()),
            mode: patch.mode.unwrap_or(0),
        };
        self.note_call(Call::WriteFile);
        let call = self.attempt.sandbox.write_file(request, self.attempt.trace);
        let end = match tokio::time::timeout(budget.time, call).await {
            Ok(Ok(_)) => StepEnd::FileDone,
            Ok(Err(error)) => self.call_failed(&error),
            Err(_) => self.slow(budget.limit).await,
        };
        let exit = failed(&end);
        Closed::new(end, exit)
    }

    pub(super) async fn read(&mut self, read: &FileRead, budget: Budget) -> Closed {
        let mut closed = Closed::new(StepEnd::FileDone, ExitStatus::code(0));
        match tokio::time::timeout(budget.time, self.read_pieces(read)).await {
            Ok(Ok(left)) => closed.dropped[0] = left,
            Ok(Err(end)) => closed = Closed::new(end.clone(), failed(&end)),
            Err(_) => closed = Closed::new(self.slow(budget.limit).await, ExitStatus::code(1)),
        }
        closed
    }

    /// Returns how many bytes lie beyond the limit.
    async fn read_pieces(&mut self, read: &FileRead) -> Result<u64, StepEnd> {
        let limit = read.limit.unwrap_or(DEFAULT_READ);
        let mut taken = 0;
        loop {
            let most = (limit - taken).min(PIECE);
            let request = v1::ReadFileRequest {
                epoch: self.epoch(),
                path: Bytes::copy_from_slice(read.path.as_bytes()),
                offset: read.offset.saturating_add(taken),
                // 0 would mean the default.
                limit: most.max(1),
            };
            self.note_call(Call::ReadFile);
            let call = self.attempt.sandbox.read_file(request, self.attempt.trace);
            let mut answer = call.await.map_err(|error| self.call_failed(&error))?;
            // More than was asked for is not taken.
            answer.content.truncate(most as usize);
            taken += answer.content.len() as u64;
            let end = read.offset.saturating_add(taken);
            self.room().await.map_err(|error| unpublished(&error))?;
            self.take(FrameKind::Stdout, &answer.content)
                .await
                .map_err(|error| unpublished(&error))?;
            if taken >= limit || answer.content.is_empty() || answer.eof {
                let left = answer.size.saturating_sub(end);
                return Ok(if answer.eof && taken < limit { 0 } else { left });
            }
        }
    }
}
