//! Standard output: what programs read, written so that a reader who has gone
//! away is a clean end. And the one line that every failure ends with.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Writes bytes to standard output as they are, at once.
pub(crate) fn bytes(data: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    settle(stdout.write_all(data).and_then(|()| stdout.flush()))
}

/// Writes one line.
pub(crate) fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes a value as one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_vec(value)
        .map_err(|error| Failure::new(format!("the result cannot be written as JSON: {error}")))?;
    text.push(b'\n');
    bytes(&text)
}

/// Writes bytes of the task's standard error to ours, as they are.
pub(crate) fn error_bytes(data: &[u8]) -> Result<(), Failure> {
    let mut stderr = io::stderr().lock();
    settle(stderr.write_all(data).and_then(|()| stderr.flush()))
}

/// Tells a person something; a lost standard error loses it.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A reader that went away has what it wanted.
fn settle(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::reader_gone()),
        Err(error) => Err(Failure::new(format!(
            "the output cannot be written: {error}"
        ))),
    }
}
