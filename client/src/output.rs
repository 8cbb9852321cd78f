//! A task's output as it comes: live copies first, the stored frames where
//! those have gaps, and the sums of the terminal at the end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use async_nats::Subscriber;
use broker_schema::{Frame, TaskId, TaskRequest, Terminal, codec};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _};
use remuda_telemetry::Chain;
use tokio::time::Instant;

use crate::broker::{Broker, BrokerError, format_of, header};
use crate::client::Client;
use crate::error::ClientError;
use crate::follow::frames;
use crate::handed::Handed;
use crate::reader::Until;
use crate::reassemble::{OutputEvent, Reassembler};

/// How long a missing frame may be on its way before it is read from storage.
const GAP_PATIENCE: Duration = Duration::from_millis(200);

type StoredFrames = Pin<Box<dyn Stream<Item = Result<(u64, Frame), BrokerError>> + Send>>;

/// The output of one task. Ends after [`OutputEvent::Done`] or an error.
pub struct OutputStream {
    broker: Broker,
    task: TaskId,
    subject: String,
    live: Subscriber,
    live_open: bool,
    phase: Phase,
    reassembler: Reassembler,
    /// Never more than one frame makes, and what was held behind it.
    events: VecDeque<OutputEvent>,
    /// Stored frames that are being read, one at a time.
    stored: Option<StoredFrames>,
    /// The stream's sequence of the last frame that was in order.
    in_order: u64,
    refill_at: Option<Instant>,
    handed: Handed,
}

enum Phase {
    Running(BoxFuture<'static, Result<Terminal, ClientError>>),
    /// The terminal came; the output is being made whole.
    Ended {
        terminal: Box<Terminal>,
        /// Whether all of it was read from storage.
        reread: bool,
    },
    Over,
}

impl std::fmt::Debug for OutputStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputStream")
            .field("task", &self.task)
            .field("reassembler", &self.reassembler)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Submits a task and hands out its output while it runs.
    #[tracing::instrument(skip_all, fields(task = %request.id, pool = %request.pool))]
    pub async fn stream(&self, request: TaskRequest) -> Result<OutputStream, ClientError> {
        let task = request.id;
        let broker = self.shared.broker.clone();
        let subject = broker
            .subjects()
            .result(&request.tenant, &request.run, task);
        let live_subject = broker.subjects().live(&subject);
        // Before the task is published: what is listened for cannot be missed.
        let live = broker
            .nats()
            .subscribe(live_subject.clone())
            .await
            .map_err(|error| ClientError::Output {
                task,
                source: BrokerError::Subscribe {
                    subject: live_subject,
                    source: error.into(),
                },
            })?;
        let handed = Handed::new(self.shared.history.clone(), request.tenant.clone(), task);
        let mut submitted = self.submit(request).await?;
        Ok(OutputStream {
            broker,
            task,
            subject,
            live,
            live_open: true,
            phase: Phase::Running(Box::pin(async move { submitted.terminal().await })),
            reassembler: Reassembler::default(),
            events: VecDeque::new(),
            stored: None,
            in_order: 0,
            refill_at: None,
            handed,
        })
    }
}

impl OutputStream {
    pub fn task(&self) -> TaskId {
        self.task
    }

    /// The next event; `None` after the last. Dropping the future loses
    /// nothing.
    pub async fn next(&mut self) -> Option<Result<OutputEvent, ClientError>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                self.handed.note(&event);
                return Some(Ok(event));
            }
            let step = if self.stored.is_some() {
                self.read_stored().await
            } else {
                match self.phase {
                    Phase::Over => return None,
                    Phase::Ended { .. } => self.conclude(),
                    Phase::Running(_) => self.listen().await,
                }
            };
            if let Err(error) = step {
                self.phase = Phase::Over;
                self.stored = None;
                self.events.clear();
                self.handed.failed(&error);
                return Some(Err(error));
            }
        }
    }

    /// One live copy, the terminal, or the time to fill a gap.
    async fn listen(&mut self) -> Result<(), ClientError> {
        let Phase::Running(terminal) = &mut self.phase else {
            return Ok(());
        };
        let refill_at = self.refill_at;
        let refill = async {
            match refill_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            message = self.live.next(), if self.live_open => {
                match message {
                    Some(message) => self.take(&message),
                    None => self.live_open = false,
                }
            }
            ended = terminal => {
                let terminal = Box::new(ended?);
                self.ended(terminal);
            }
            () = refill => {
                self.refill_at = None;
                self.start_reading();
            }
        }
        Ok(())
    }

    /// As a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<OutputEvent, ClientError>> + Send {
        futures::stream::unfold(self, |mut output| async move {
            output.next().await.map(|event| (event, output))
        })
    }

    /// A live copy: a hint that may be missing, late or damaged.
    fn take(&mut self, message: &async_nats::Message) {
        let frame = format_of(message.headers.as_ref())
            .and_then(|format| codec::decode::<Frame>(&message.payload, format));
        match frame {
            Ok(frame) => {
                self.reassembler.push(frame, &mut self.events);
                let sequence = header(message.headers.as_ref(), "Nats-Sequence")
                    .and_then(|text| text.parse().ok());
                self.note(sequence);
            }
            Err(error) => {
                tracing::debug!(task = %self.task, %error, "live frame cannot be read");
                self.refill_at
                    .get_or_insert_with(|| Instant::now() + GAP_PATIENCE);
            }
        }
    }

    fn note(&mut self, sequence: Option<u64>) {
        if self.reassembler.has_gap() {
            self.refill_at
                .get_or_insert_with(|| Instant::now() + GAP_PATIENCE);
        } else {
            self.refill_at = None;
            if let Some(sequence) = sequence {
                self.in_order = self.in_order.max(sequence);
            }
        }
    }

    /// Reads the stored frames after the last one that was in order.
    fn start_reading(&mut self) {
        let from = (self.in_order > 0).then_some(self.in_order + 1);
        self.stored = Some(Box::pin(frames(
            &self.broker,
            self.subject.clone(),
            from,
            Until::CaughtUp,
        )));
    }

    async fn read_stored(&mut self) -> Result<(), ClientError> {
        let Some(stored) = &mut self.stored else {
            return Ok(());
        };
        let running = matches!(self.phase, Phase::Running(_));
        match stored.next().await {
            Some(Ok((sequence, frame))) => {
                let wanted = match &self.phase {
                    Phase::Ended { terminal, .. } => frame.is_of(terminal),
                    _ => true,
                };
                if wanted {
                    self.reassembler.push(frame, &mut self.events);
                }
                if !self.reassembler.has_gap() {
                    self.in_order = self.in_order.max(sequence);
                }
            }
            // While it runs this only comes early; at the end it must succeed.
            Some(Err(error)) if running => {
                tracing::debug!(task = %self.task, error = %Chain(&error), "gap not filled yet");
                self.stored = None;
                self.note(None);
            }
            Some(Err(source)) => {
                return Err(ClientError::Output {
                    task: self.task,
                    source,
                });
            }
            None => {
                self.stored = None;
                self.note(None);
            }
        }
        Ok(())
    }

    /// The terminal decides which attempt it was, and under which epoch, also
    /// where a later one had begun.
    fn ended(&mut self, terminal: Box<Terminal>) {
        if terminal.frames == 0 {
            self.reassembler.emit_terminal(&terminal, &mut self.events);
        } else {
            if self.reassembler.is_past(&terminal) {
                self.reassembler.restart(&terminal, &mut self.events);
                self.in_order = 0;
            }
            if !self.reassembler.complete(&terminal) {
                self.start_reading();
            }
        }
        self.phase = Phase::Ended {
            terminal,
            reread: false,
        };
    }

    /// Compares the output with the terminal. Where they differ all of it is
    /// read once more from storage.
    fn conclude(&mut self) -> Result<(), ClientError> {
        let (terminal, reread) = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Ended { terminal, reread } => (terminal, reread),
            other => {
                self.phase = other;
                return Ok(());
            }
        };
        match check(&mut self.reassembler, &terminal) {
            Ok(()) => self.events.push_back(OutputEvent::Done(terminal)),
            Err(detail) if reread || terminal.frames == 0 => {
                return Err(ClientError::OutputDamaged {
                    task: self.task,
                    detail,
                });
            }
            Err(detail) => {
                tracing::debug!(task = %self.task, detail, "output is read again");
                self.reassembler.restart(&terminal, &mut self.events);
                self.in_order = 0;
                self.start_reading();
                self.phase = Phase::Ended {
                    terminal,
                    reread: true,
                };
            }
        }
        Ok(())
    }
}

fn check(reassembler: &mut Reassembler, terminal: &Terminal) -> Result<(), String> {
    if terminal.frames == 0 || reassembler.complete(terminal) {
        reassembler.verify(terminal)
    } else {
        Err(format!(
            "attempt {} is not the {} frames that its terminal counts",
            terminal.attempt, terminal.frames
        ))
    }
}
