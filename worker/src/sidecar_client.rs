//! One sandbox's sidecar over the socket that it inherited.
//!
//! The connection is HTTP/2 itself, without a pool or a reconnect around it: there is one
//! sidecar, one socket, and when that is gone so is the sandbox. What comes back is hostile:
//! every message has a largest size, every call a deadline, every text a length.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use remuda_proto::v1::sidecar_client::SidecarClient as Generated;
use remuda_proto::{ERROR_CODE_KEY, MAX_MESSAGE_BYTES, v1};
use remuda_telemetry::TraceHeaders;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

/// How long a call may take that only has to be answered.
const CALL: Duration = Duration::from_secs(10);
/// How long moving one file, or ending every process, may take.
const SLOW_CALL: Duration = Duration::from_secs(30);
/// Largest answer: one piece of a file and its envelope.
const MAX_ANSWER: usize = 2 * 1024 * 1024;
/// Output that may be on its way before the sidecar has to wait for us.
const WINDOW: u32 = 512 * 1024;
/// Longest text of a sidecar that is carried on.
const LONGEST_TEXT: usize = 512;

/// A call to a sidecar that did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The sidecar answered, and the answer is no.
    #[error("the sidecar refused {call} ({code}): {message}")]
    Refused {
        call: &'static str,
        code: String,
        message: String,
    },
    /// There was no answer and will be none.
    #[error("the sidecar is gone during {call}: {reason}")]
    Lost { call: &'static str, reason: String },
    #[error("the sidecar did not answer {call} within {within:?}")]
    Silent {
        call: &'static str,
        within: Duration,
    },
    #[error("the sidecar answered {call} with nonsense: {reason}")]
    Nonsense { call: &'static str, reason: String },
}

impl CallError {
    pub(crate) fn from_status(call: &'static str, status: &Status) -> Self {
        let code = status
            .metadata()
            .get(ERROR_CODE_KEY)
            .and_then(|value| value.to_str().ok());
        let message = shorten(status.message());
        match code {
            Some(code) => Self::Refused {
                call,
                code: shorten(code),
                message,
            },
            None if status.code() == Code::OutOfRange => Self::Nonsense {
                call,
                reason: message,
            },
            None => Self::Lost {
                call,
                reason: format!("{:?}: {message}", status.code()),
            },
        }
    }

    /// The code of a refusal.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// At most [`LONGEST_TEXT`] bytes, without control characters.
pub(crate) fn shorten(text: &str) -> String {
    let mut short = String::new();
    for character in text.chars() {
        if short.len() + character.len_utf8() > LONGEST_TEXT {
            short.push('…');
            break;
        }
        short.push(if character.is_control() {
            ' '
        } else {
            character
        });
    }
    short
}

/// A connected sidecar. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct SidecarClient {
    client: Generated<Http2>,
}

impl SidecarClient {
    pub(crate) async fn connect(socket: UnixStream) -> Result<Self, CallError> {
        let lost = |error: hyper::Error| CallError::Lost {
            call: "connect",
            reason: error.to_string(),
        };
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW)
            .max_header_list_size(16 * 1024)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(lost)?;
        remuda_telemetry::task::spawn("sidecar connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a sidecar's connection ended");
            }
        });
        let origin = http::Uri::from_static("http://sandbox");
        let client = Generated::with_origin(Http2 { sender }, origin)
            .max_decoding_message_size(MAX_ANSWER)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { client })
    }

    /// The answer comes once the command runs, or could not be started.
    pub(crate) async fn execute(
        &self,
        request: v1::ExecuteRequest,
        trace: &TraceHeaders,
    ) -> Result<tonic::Streaming<v1::ExecuteEvent>, CallError> {
        let mut client = self.client.clone();
        let request = traced(request, trace);
        within("Execute", CALL, client.execute(request)).await
    }

    pub(crate) async fn write_file(
        &self,
        request: v1::WriteFileRequest,
        trace: &TraceHeaders,
    ) -> Result<v1::WriteFileResponse, CallError> {
        let mut client = self.client.clone();
        let request = traced(request, trace);
        within("WriteFile", SLOW_CALL, client.write_file(request)).await
    }

    pub(crate) async fn read_file(
        &self,
        request: v1::ReadFileRequest,
        trace: &TraceHeaders,
    ) -> Result<v1::ReadFileResponse, CallError> {
        let mut client = self.client.clone();
        let request = traced(request, trace);
        within("ReadFile", SLOW_CALL, client.read_file(request)).await
    }

    pub(crate) async fn signal(&self, request: v1::SignalRequest) -> Result<(), CallError> {
        let mut client = self.client.clone();
        within("Signal", CALL, client.signal(request))
            .await
            .map(|_| ())
    }

    pub(crate) async fn reset(&self, request: v1::ResetRequest) -> Result<u32, CallError> {
        let mut client = self.client.clone();
        let answer = within("Reset", SLOW_CALL, client.reset(request)).await?;
        Ok(answer.killed)
    }

    pub(crate) async fn health(&self) -> Result<v1::HealthResponse, CallError> {
        let mut client = self.client.clone();
        within("Health", CALL, client.health(v1::HealthRequest {})).await
    }
}

async fn within<T>(
    call: &'static str,
    within: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(within, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CallError::from_status(call, &status)),
        Err(_) => Err(CallError::Silent { call, within }),
    }
}

fn traced<T>(message: T, trace: &TraceHeaders) -> Request<T> {
    let mut request = Request::new(message);
    trace.inject(|key, value| {
        if let Ok(value) = MetadataValue::try_from(value) {
            request.metadata_mut().insert(key, value);
        }
    });
    request
}

/// The connection as the service that the generated client calls.
#[derive(Debug, Clone)]
struct Http2 {
    sender: SendRequest<Body>,
}

impl Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::MetadataMap;

    #[test]
    fn only_an_answer_with_a_code_is_a_refusal() {
        let mut metadata = MetadataMap::new();
        metadata.insert(ERROR_CODE_KEY, MetadataValue::from_static("not_found"));
        let refused = Status::with_metadata(Code::NotFound, "no\nsuch file", metadata);
        let error = CallError::from_status("ReadFile", &refused);
        assert_eq!(error.code(), Some("not_found"));
        assert!(error.to_string().ends_with("no such file"), "{error}");

        let gone = CallError::from_status("ReadFile", &Status::unavailable("closed"));
        assert!(matches!(gone, CallError::Lost { .. }), "{gone}");
        let large = CallError::from_status("ReadFile", &Status::out_of_range("too large"));
        assert!(matches!(large, CallError::Nonsense { .. }), "{large}");
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let short = shorten(&"é".repeat(10_000));
        assert_eq!(short.len(), LONGEST_TEXT + '…'.len_utf8());
    }

    #[tokio::test]
    async fn garbage_on_the_socket_is_a_lost_sidecar_and_not_a_hang() {
        use tokio::io::AsyncWriteExt as _;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = SidecarClient::connect(ours).await.unwrap();
        theirs.write_all(&[0xff; 4096]).await.unwrap();
        let error = client.health().await.unwrap_err();
        assert!(matches!(error, CallError::Lost { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_closed_socket_is_a_lost_sidecar_and_not_a_hang() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = SidecarClient::connect(ours).await.unwrap();
        drop(theirs);
        let error = client.health().await.unwrap_err();
        assert!(matches!(error, CallError::Lost { .. }), "{error}");
    }
}
