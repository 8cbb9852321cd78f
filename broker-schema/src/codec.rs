//! Bytes to messages and back: MessagePack with named fields, or JSON.

use std::io::Cursor;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{ErrorCode, ErrorInfo};

/// How a payload is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Format {
    #[default]
    MessagePack,
    Json,
}

impl Format {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::MessagePack => "application/msgpack",
            Self::Json => "application/json",
        }
    }

    /// From a `Content-Type` header; absent means MessagePack.
    pub fn from_content_type(value: Option<&str>) -> Result<Self, ErrorInfo> {
        let essence = value.map(|v| v.split(';').next().unwrap_or(v).trim().to_ascii_lowercase());
        match essence.as_deref() {
            None | Some("" | "application/msgpack" | "application/x-msgpack") => {
                Ok(Self::MessagePack)
            }
            Some("application/json") => Ok(Self::Json),
            Some(other) => Err(ErrorInfo::new(
                ErrorCode::UnparsablePayload,
                format!(
                    "content type {other:?} is not known, use application/msgpack or application/json"
                ),
            )
            .at("Content-Type")),
        }
    }
}

/// A message that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode {what} as {format:?}")]
pub struct EncodeError {
    what: &'static str,
    format: Format,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Writes a message.
pub fn encode<T: Serialize>(message: &T, format: Format) -> Result<Vec<u8>, EncodeError> {
    let failed = |source| EncodeError {
        what: std::any::type_name::<T>(),
        format,
        source,
    };
    match format {
        Format::MessagePack => rmp_serde::to_vec_named(message).map_err(|e| failed(e.into())),
        Format::Json => serde_json::to_vec(message).map_err(|e| failed(e.into())),
    }
}

/// Reads a message. The error names the field that it stopped at. Bytes after
/// the message are an error too: they would be silently lost.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], format: Format) -> Result<T, ErrorInfo> {
    match format {
        Format::MessagePack => {
            let mut reader = rmp_serde::Deserializer::new(Cursor::new(bytes));
            // Deeper than any message of ours; a hostile one must not reach
            // the end of the stack.
            reader.set_max_depth(64);
            let message = serde_path_to_error::deserialize(&mut reader).map_err(explain)?;
            match bytes.len() as u64 - reader.position() {
                0 => Ok(message),
                left => Err(trailing(left)),
            }
        }
        Format::Json => {
            let mut reader = serde_json::Deserializer::from_slice(bytes);
            let message = serde_path_to_error::deserialize(&mut reader).map_err(explain)?;
            reader.end().map_err(|error| {
                ErrorInfo::new(
                    ErrorCode::UnparsablePayload,
                    format!("after the message: {error}"),
                )
            })?;
            Ok(message)
        }
    }
}

fn trailing(left: u64) -> ErrorInfo {
    ErrorInfo::new(
        ErrorCode::UnparsablePayload,
        format!("{left} bytes follow the message, send one message per payload"),
    )
}

fn explain<E: std::error::Error>(error: serde_path_to_error::Error<E>) -> ErrorInfo {
    let path = error.path().to_string();
    let reason = error.into_inner().to_string();
    // A step that this version does not know is the one parse error that a
    // newer client can run into: it has a code of its own.
    let code = if path.ends_with("action") && reason.starts_with("unknown variant") {
        ErrorCode::UnknownStepType
    } else if ["UUID", "[A-Za-z0-9_-]"].iter().any(|m| reason.contains(m)) {
        ErrorCode::InvalidToken
    } else {
        ErrorCode::UnparsablePayload
    };
    let info = ErrorInfo::new(code, reason);
    if matches!(path.as_str(), "." | "?") {
        info
    } else {
        info.at(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TaskRequest;

    #[test]
    fn errors_name_the_field() {
        let text = br#"{"id":"x"}"#;
        let error = decode::<TaskRequest>(text, Format::Json).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidToken);
        assert_eq!(error.field.as_deref(), Some("id"));
    }

    #[test]
    fn content_types() {
        assert_eq!(
            Format::from_content_type(None).unwrap(),
            Format::MessagePack
        );
        assert_eq!(
            Format::from_content_type(Some("application/JSON; charset=utf-8")).unwrap(),
            Format::Json
        );
        assert!(Format::from_content_type(Some("text/plain")).is_err());
    }
}
