//! For tests: what readers were handed, output added up from the events themselves.

use std::collections::BTreeMap;

use broker_schema::digest::Running;
use broker_schema::{FrameKind, TaskId, TenantId, Terminal};
use remuda_telemetry::history::{Event, History, Sum};

use crate::broker::recorded_digest;
use crate::error::ClientError;
use crate::reassemble::OutputEvent;

/// A terminal goes to its reader.
pub(crate) fn note_terminal(history: &History, tenant: &TenantId, terminal: &Terminal) {
    history.record(|| Event::TerminalRead {
        tenant: tenant.to_string(),
        task: terminal.task.to_string(),
        attempt: terminal.attempt,
        outcome: terminal.outcome.to_string(),
        digest: recorded_digest(terminal),
    });
}

/// The output of one task, as it goes to its reader.
#[derive(Debug)]
pub(crate) struct Handed {
    history: History,
    tenant: TenantId,
    task: TaskId,
    sums: BTreeMap<(u32, &'static str), (u64, Running)>,
}

impl Handed {
    pub(crate) fn new(history: History, tenant: TenantId, task: TaskId) -> Self {
        Self {
            history,
            tenant,
            task,
            sums: BTreeMap::new(),
        }
    }

    /// An event goes to the reader.
    pub(crate) fn note(&mut self, event: &OutputEvent) {
        if !self.history.is_on() {
            return;
        }
        match event {
            OutputEvent::Output { step, kind, bytes } => {
                let kind = match kind {
                    FrameKind::Stderr => "stderr",
                    _ => "stdout",
                };
                let sum = self.sums.entry((*step, kind)).or_default();
                sum.0 += bytes.len() as u64;
                sum.1.update(bytes);
            }
            OutputEvent::Reset { .. } => self.sums.clear(),
            OutputEvent::StepExit { .. } => {}
            OutputEvent::Done(terminal) => {
                let sums = std::mem::take(&mut self.sums).into_iter();
                let sums = sums.map(|((step, kind), (bytes, digest))| Sum {
                    step,
                    kind: kind.to_owned(),
                    bytes,
                    sha256: digest.finish(),
                });
                let streams = sums.collect();
                self.history.record(|| Event::OutputRead {
                    tenant: self.tenant.to_string(),
                    task: self.task.to_string(),
                    attempt: terminal.attempt,
                    streams,
                });
            }
        }
    }

    /// The reader is told that there is no whole output.
    pub(crate) fn failed(&self, error: &ClientError) {
        if let ClientError::OutputDamaged { detail, .. } = error {
            self.history.record(|| Event::OutputDamaged {
                tenant: self.tenant.to_string(),
                task: self.task.to_string(),
                detail: detail.clone(),
            });
        }
    }
}
