//! Dead letters: read, and sent on their way again.

use std::time::Duration;

use broker_schema::codec::{self, Format};
use broker_schema::{
    ErrorCode, ErrorInfo, HEADER_CODE, HEADER_REASON, HEADER_SUBJECT, HEADER_TASK, HEADER_TIME,
    ParsedSubject, Placement, PoolId, Subjects, TaskId, TaskRequest, TenantId, Timestamp,
};

use super::{Broker, BrokerError, Outgoing, StoredMessage};

const PATIENCE: Duration = Duration::from_secs(10);

/// A message that nobody could act on, with why.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub sequence: u64,
    /// When it became one.
    pub time: Timestamp,
    pub tenant: TenantId,
    pub pool: PoolId,
    /// A stable code, as far as this version knows it.
    pub code: String,
    pub reason: String,
    /// Where it was published to.
    pub subject: Option<String>,
    pub task: Option<TaskId>,
    pub message: StoredMessage,
}

/// What a dead letter says.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    Request(Box<TaskRequest>),
    Placement(Box<Placement>),
    Unreadable(ErrorInfo),
}

/// A dead letter that was sent on its way again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requeued {
    pub sequence: u64,
    pub subject: String,
    /// The task as it was, and as it is now: a task that has its terminal, or whose id is another
    /// task's, goes on under a new one. `None` for bytes that nobody can read.
    pub task: Option<(TaskId, TaskId)>,
    pub run: Option<broker_schema::RunId>,
    /// The deadline had passed: it has as long again as it had at first.
    pub new_deadline: bool,
}

/// Why a dead letter stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("what it holds cannot be read ({0}): it would come back, unless the fleet changed")]
    Unreadable(ErrorInfo),
    #[error("it belongs to the session of sandbox {0}, which is most likely gone")]
    Session(broker_schema::SandboxId),
    #[error("it was published to {0:?}, which no dispatcher reads")]
    NoLane(String),
}

impl Refusal {
    /// Whether whoever insists has their way.
    pub fn can_be_forced(&self) -> bool {
        !matches!(self, Self::NoLane(_))
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequeueError {
    #[error("dead letter {sequence} is not sent again: {refusal}")]
    Refused { sequence: u64, refusal: Refusal },
    #[error("dead letter {sequence} cannot be sent again")]
    Broker {
        sequence: u64,
        #[source]
        source: BrokerError,
    },
}

impl DeadLetter {
    fn of(message: StoredMessage, subjects: &Subjects) -> Option<Self> {
        let Some(ParsedSubject::DeadLetter { tenant, pool }) = subjects.parse(&message.subject)
        else {
            return None;
        };
        let header = |name| message.header(name).map(str::to_owned);
        Some(Self {
            sequence: message.sequence,
            time: header(HEADER_TIME)
                .and_then(|micros| micros.parse().ok())
                .map_or(message.time, Timestamp),
            tenant,
            pool,
            code: header(HEADER_CODE).unwrap_or_default(),
            reason: header(HEADER_REASON).unwrap_or_default(),
            subject: header(HEADER_SUBJECT),
            task: header(HEADER_TASK).and_then(|task| task.parse().ok()),
            message,
        })
    }

    pub fn body(&self) -> Body {
        let payload = &self.message.payload;
        let format = match self.message.format() {
            Ok(format) => format,
            Err(error) => return Body::Unreadable(error),
        };
        match codec::decode::<TaskRequest>(payload, format) {
            Ok(request) => Body::Request(Box::new(request)),
            Err(error) => match codec::decode::<Placement>(payload, format) {
                Ok(placement) => Body::Placement(Box::new(placement)),
                Err(_) => Body::Unreadable(error),
            },
        }
    }

    /// The request to ask for again, if it can be read.
    fn request(&self) -> Result<TaskRequest, ErrorInfo> {
        match self.body() {
            Body::Request(request) => Ok(*request),
            Body::Placement(placement) => Ok(placement.task),
            Body::Unreadable(error) => Err(error),
        }
    }

    /// Where it goes again: where it was published to, if that is a lane; a placement's task, to
    /// the lane that it came from.
    fn lane(&self, subjects: &Subjects, request: Option<&TaskRequest>) -> Result<String, Refusal> {
        let published = self.subject.as_deref().unwrap_or_default();
        match subjects.parse(published) {
            Some(ParsedSubject::Request { .. }) => Ok(published.to_owned()),
            // One from before subjects were kept, or a placement.
            _ if published.is_empty() || request.is_some() => {
                let pool = request.map_or(&self.pool, |request| &request.pool);
                Ok(subjects.request(&self.tenant, pool))
            }
            _ => Err(Refusal::NoLane(published.to_owned())),
        }
    }

    /// What is published so that it runs again. Pure: the same letter asks for the same task,
    /// so that a repeat is one task.
    fn again(
        &self,
        subjects: &Subjects,
        has_terminal: bool,
        force: bool,
        now: Timestamp,
    ) -> Result<(Outgoing, Requeued), Refusal> {
        let request = match self.request() {
            Ok(request) => request,
            Err(error) if !force => return Err(Refusal::Unreadable(error)),
            Err(_) => return Ok(self.bytes_again(self.lane(subjects, None)?)),
        };
        if let (Some(session), false) = (&request.session, force) {
            return Err(Refusal::Session(session.sandbox));
        }
        let subject = self.lane(subjects, Some(&request))?;
        let (old, mut request) = (request.id, request);
        let spent = [ErrorCode::IdConflict, ErrorCode::AttemptsExhausted]
            .iter()
            .any(|code| self.code == code.as_str());
        if has_terminal || spent {
            let made_of = format!("{old}/{}/{}", self.sequence, self.message.time.0);
            request.id = TaskId::derived(made_of.as_bytes());
        }
        let new_deadline = request.deadline.is_some_and(|deadline| deadline <= now);
        if new_deadline {
            let had = request.deadline.map(|at| at.since(request.submitted_at));
            request.deadline = had.filter(|had| !had.is_zero()).map(|had| now.plus(had));
        }
        request.submitted_at = now;
        // The rest of its group has gone.
        request.group_size = None;
        request.min_valid = None;
        let format = self.message.format().unwrap_or_default();
        let payload = codec::encode(&request, format).map_err(|error| {
            let text = error.to_string();
            Refusal::Unreadable(ErrorInfo::new(ErrorCode::Internal, text))
        })?;
        let message_id = if request.id == old {
            // The server may remember the first one.
            format!("{}/requeue-{}", request.message_id(), self.sequence)
        } else {
            request.message_id()
        };
        let outgoing = Outgoing {
            subject: subject.clone(),
            message_id: Some(message_id),
            format,
            payload: payload.into(),
            trace: self.message.trace(),
            headers: Vec::new(),
        };
        let requeued = Requeued {
            sequence: self.sequence,
            subject,
            task: Some((old, request.id)),
            run: Some(request.run),
            new_deadline,
        };
        Ok((outgoing, requeued))
    }

    fn bytes_again(&self, subject: String) -> (Outgoing, Requeued) {
        let outgoing = Outgoing {
            subject: subject.clone(),
            message_id: Some(format!("dlq/{}/{}", self.sequence, self.message.time.0)),
            format: self.message.format().unwrap_or(Format::MessagePack),
            payload: self.message.payload.clone(),
            trace: self.message.trace(),
            headers: Vec::new(),
        };
        let requeued = Requeued {
            sequence: self.sequence,
            subject,
            task: None,
            run: None,
            new_deadline: false,
        };
        (outgoing, requeued)
    }
}

impl Broker {
    /// The first dead letter from `sequence` on, of one tenant and pool where they are said.
    pub async fn next_dead_letter(
        &self,
        tenant: Option<&TenantId>,
        pool: Option<&PoolId>,
        sequence: u64,
    ) -> Result<Option<DeadLetter>, BrokerError> {
        let filter = self.subjects().dead_letters_of(tenant, pool);
        let mut from = sequence;
        loop {
            let stream = &self.streams().dead_letters;
            let Some(message) = self.next_stored(stream, &filter, from).await? else {
                return Ok(None);
            };
            from = message.sequence + 1;
            // Another program's message under a name that cannot be is none.
            if let Some(letter) = DeadLetter::of(message, self.subjects()) {
                return Ok(Some(letter));
            }
        }
    }

    /// One dead letter.
    pub async fn dead_letter(&self, sequence: u64) -> Result<Option<DeadLetter>, BrokerError> {
        let stream = &self.streams().dead_letters;
        let stored = self.stored_message(stream, sequence).await?;
        Ok(stored.and_then(|message| DeadLetter::of(message, self.subjects())))
    }

    /// Asks for a dead letter's task again and takes the letter out. Where that is cut short in
    /// between, doing it again asks for the same task, once.
    pub async fn requeue(
        &self,
        letter: &DeadLetter,
        force: bool,
    ) -> Result<Requeued, RequeueError> {
        let sequence = letter.sequence;
        let failed = |source| RequeueError::Broker { sequence, source };
        let has_terminal = match letter.request() {
            Ok(request) => self
                .stored_terminal(&letter.tenant, &request.run, request.id)
                .await
                .map_err(failed)?
                .is_some(),
            Err(_) => false,
        };
        let (outgoing, requeued) = letter
            .again(self.subjects(), has_terminal, force, Timestamp::now())
            .map_err(|refusal| RequeueError::Refused { sequence, refusal })?;
        self.publish(outgoing, PATIENCE).await.map_err(failed)?;
        let stream = &self.streams().dead_letters;
        self.delete_stored(stream, sequence).await.map_err(failed)?;
        Ok(requeued)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::HeaderMap;
    use broker_schema::{Epoch, SandboxId, SandboxRef, Step};

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn task() -> TaskRequest {
        let ids = ["acme", "r1", "py"].map(str::to_owned);
        let mut task = TaskRequest::new(
            ids[0].parse().unwrap(),
            ids[1].parse().unwrap(),
            ids[2].parse().unwrap(),
            vec![Step::command(["true"])],
        );
        task.submitted_at = Timestamp(1_000_000);
        task
    }

    fn letter(payload: Vec<u8>, subject: &str, code: ErrorCode) -> DeadLetter {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER_CODE, code.as_str());
        headers.insert(HEADER_SUBJECT, subject);
        let message = StoredMessage {
            sequence: 7,
            subject: "remuda.dlq.acme.py".to_owned(),
            headers,
            payload: payload.into(),
            time: Timestamp(5),
        };
        DeadLetter::of(message, &Subjects::default()).unwrap()
    }

    fn bytes(task: &TaskRequest) -> Vec<u8> {
        codec::encode(task, Format::MessagePack).unwrap()
    }

    fn again(
        letter: &DeadLetter,
        has_terminal: bool,
        force: bool,
    ) -> Result<(Outgoing, Requeued), Refusal> {
        letter.again(&Subjects::default(), has_terminal, force, NOW)
    }

    #[test]
    fn a_task_that_has_ended_or_is_anothers_gets_a_new_id() {
        let task = task();
        let subject = "remuda.req.acme.py";
        for (code, has_terminal, new) in [
            (ErrorCode::AttemptsExhausted, true, true),
            (ErrorCode::AttemptsExhausted, false, true),
            (ErrorCode::IdConflict, false, true),
            (ErrorCode::InvalidToken, true, true),
            (ErrorCode::InvalidToken, false, false),
        ] {
            let letter = letter(bytes(&task), subject, code);
            let (outgoing, requeued) = again(&letter, has_terminal, false).unwrap();
            let (old, id) = requeued.task.unwrap();
            assert_eq!((old, id != old), (task.id, new), "{code} {has_terminal}");
            let sent: TaskRequest = codec::decode(&outgoing.payload, Format::MessagePack).unwrap();
            assert_eq!((sent.id, sent.submitted_at), (id, NOW));
            assert_eq!(outgoing.subject, subject);
            let message_id = outgoing.message_id.clone().unwrap();
            assert_ne!(message_id, task.message_id(), "the server may remember it");
            assert!(message_id.starts_with(&sent.message_id()));
            let repeat = again(&letter, has_terminal, false).unwrap().0;
            assert_eq!(repeat.message_id, outgoing.message_id);
            assert_eq!(repeat.payload, outgoing.payload);
        }
    }

    #[test]
    fn a_placement_is_asked_for_again_as_a_request_with_time_to_run() {
        let mut task = task();
        task.deadline = Some(task.submitted_at.plus(Duration::from_secs(60)));
        let sandbox = SandboxRef {
            sandbox: SandboxId::new(),
            worker: "w".parse().unwrap(),
            epoch: Epoch::new(1, 1),
        };
        let mut placement = Placement {
            task,
            request_digest: String::new(),
            attempt: 3,
            sandbox: sandbox.clone(),
            dispatched_at: Timestamp(2),
        };
        let encode = |placement: &Placement| codec::encode(placement, Format::MessagePack).unwrap();
        let subject = format!("remuda.run.w.acme.{}", sandbox.sandbox);
        let first = letter(encode(&placement), &subject, ErrorCode::AttemptsExhausted);
        let (outgoing, requeued) = again(&first, true, false).unwrap();
        assert_eq!(outgoing.subject, "remuda.req.acme.py");
        assert!(requeued.new_deadline);
        let sent: TaskRequest = codec::decode(&outgoing.payload, Format::MessagePack).unwrap();
        assert_eq!(sent.deadline, Some(NOW.plus(Duration::from_secs(60))));

        placement.task.session = Some(sandbox.clone());
        let of_session = letter(encode(&placement), &subject, ErrorCode::AttemptsExhausted);
        let refused = again(&of_session, true, false).unwrap_err();
        assert_eq!(refused, Refusal::Session(sandbox.sandbox));
        assert!(refused.can_be_forced() && again(&of_session, true, true).is_ok());
    }

    #[test]
    fn what_cannot_be_read_goes_only_by_force_and_only_where_somebody_reads() {
        let garbage = b"\xc1garbage".to_vec();
        let readable = letter(
            garbage.clone(),
            "remuda.req.acme.py",
            ErrorCode::UnparsablePayload,
        );
        assert!(matches!(
            again(&readable, false, false),
            Err(Refusal::Unreadable(_))
        ));
        let (outgoing, requeued) = again(&readable, false, true).unwrap();
        assert_eq!(
            (outgoing.payload.as_ref(), requeued.task),
            (&*garbage, None)
        );
        assert_eq!(outgoing.subject, "remuda.req.acme.py");
        let stray = letter(garbage, "remuda.req.a b.py", ErrorCode::InvalidToken);
        let refused = again(&stray, false, true).unwrap_err();
        assert!(!refused.can_be_forced(), "{refused}");
    }
}
