//! What travels between trainers, dispatchers and workers.
//!
//! Ids, subjects, stream definitions, messages, outcomes, error codes and the
//! codec. Nothing in here does I/O, so that a front door, a daemon and a test
//! read the same contract. `docs/protocol.md` tells it in prose.

mod blob;
mod cancel;
pub mod codec;
pub mod credit;
pub mod digest;
mod error;
pub mod event;
mod frame;
mod ids;
mod notices;
mod outcome;
mod placement;
pub mod pool;
mod schema;
pub mod session;
mod step;
pub mod stream;
mod subject;
mod task;
mod terminal;
mod time;
mod validate;

pub use blob::Blob;
pub use cancel::{CancelCause, CancelNotice, CancelRequest, CancelScope, CancelTarget};
pub use credit::Credit;
pub use error::{ErrorCode, ErrorInfo};
pub use frame::{Frame, FrameKind};
pub use ids::{
    DispatcherId, Epoch, GroupId, InvalidId, PoolId, RunId, SandboxId, TaskId, TenantId, Term,
    Token, WorkerId,
};
pub use notices::Notices;
pub use outcome::{Attribution, ExitStatus, Outcome};
pub use placement::{ControlMessage, Placement};
pub use schema::json_schemas;
pub use session::{SandboxRef, SessionOptions};
pub use step::{Command, FilePatch, FileRead, Step, StepKind};
pub use subject::{ParsedSubject, Subjects, subject_matches};
pub use task::{Priority, TaskRequest};
pub use terminal::{Output, StepResult, Terminal, Times, Usage};
pub use time::Timestamp;
pub use validate::{Invalid, Limits as RequestLimits};

/// Version of every payload in this crate, sent in the header [`HEADER_SCHEMA`].
/// Fields are only added; a reader ignores what it does not know.
pub const SCHEMA_VERSION: u32 = 1;
/// Oldest version that this code still reads.
pub const SCHEMA_OLDEST: u32 = 1;

/// Header: schema version of the payload, decimal.
pub const HEADER_SCHEMA: &str = "Remuda-Schema";
/// Header: `application/msgpack` (also when absent) or `application/json`.
pub const HEADER_CONTENT_TYPE: &str = "Content-Type";
/// Header: W3C trace context.
pub const HEADER_TRACEPARENT: &str = "traceparent";
/// Header: W3C trace state.
pub const HEADER_TRACESTATE: &str = "tracestate";
/// Header: digest of a request as it was first published, on one that is handed back.
pub const HEADER_DIGEST: &str = "Remuda-Digest";
/// Header of a dead letter: the code of why it is one.
pub const HEADER_CODE: &str = "Remuda-Code";
/// Header of a dead letter: why it is one.
pub const HEADER_REASON: &str = "Remuda-Reason";
/// Header of a dead letter: the subject that the message was published to.
pub const HEADER_SUBJECT: &str = "Remuda-Subject";
/// Header of a dead letter: the task, where the message could be read so far.
pub const HEADER_TASK: &str = "Remuda-Task";
/// Header of a dead letter: whose it is, `unknown` where nobody can tell.
pub const HEADER_TENANT: &str = "Remuda-Tenant";
/// Header of a dead letter: when it became one, microseconds since 1970 UTC.
pub const HEADER_TIME: &str = "Remuda-Time";
