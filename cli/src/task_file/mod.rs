//! Task files: YAML or JSON, one or more documents, in the bare form
//! (`steps:` beside pool, run, timeout, …) or as a manifest
//! (`apiVersion`, `kind: Task`, `metadata`, `spec`).

mod document;
mod duration;
mod read;
mod step;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use broker_schema::{Blob, PoolId, Priority, RunId, Step};

pub(crate) use duration::millis;
pub(crate) use read::{Problem, strict};
pub(crate) use step::steps;

/// One task as a file describes it.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct TaskDoc {
    pub(crate) name: Option<String>,
    pub(crate) pool: Option<PoolId>,
    pub(crate) run: Option<RunId>,
    pub(crate) priority: Priority,
    pub(crate) timeout_ms: Option<u64>,
    /// How often the task is submitted again when it did not succeed.
    pub(crate) retries: u8,
    /// Its results are removed so long after its end.
    pub(crate) ttl_seconds_after_finished: Option<u64>,
    pub(crate) continue_on_failure: bool,
    pub(crate) env: BTreeMap<String, Blob>,
    pub(crate) steps: Vec<Step>,
    /// What the file says that changes nothing here, for the person to know.
    pub(crate) notes: Vec<String>,
}

/// Why a task file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskFileError {
    #[error("{file}: {reason}")]
    Syntax { file: String, reason: String },
    #[error("{file}: holds no task")]
    Empty { file: String },
    #[error("{file}: document {document}: {problem}")]
    Document {
        file: String,
        document: usize,
        problem: Problem,
    },
}

/// Reads every document of a file. `file` is what errors call it.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<TaskDoc>, TaskFileError> {
    let values = read::documents(file, text).map_err(|reason| TaskFileError::Syntax {
        file: file.to_owned(),
        reason,
    })?;
    if values.is_empty() {
        return Err(TaskFileError::Empty {
            file: file.to_owned(),
        });
    }
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            document::task(value).map_err(|problem| TaskFileError::Document {
                file: file.to_owned(),
                document: index + 1,
                problem,
            })
        })
        .collect()
}

/// Reads a file of one document as a type, nothing ignored; empty is null's
/// worth of it.
pub(crate) fn single<T: DeserializeOwned + Default>(
    file: &str,
    text: &str,
) -> Result<T, TaskFileError> {
    let mut values = read::documents(file, text).map_err(|reason| TaskFileError::Syntax {
        file: file.to_owned(),
        reason,
    })?;
    if values.len() > 1 {
        return Err(TaskFileError::Syntax {
            file: file.to_owned(),
            reason: format!("holds {} documents, expected one", values.len()),
        });
    }
    let Some(value) = values.pop() else {
        return Ok(T::default());
    };
    strict("", value).map_err(|problem| TaskFileError::Document {
        file: file.to_owned(),
        document: 1,
        problem,
    })
}

#[cfg(test)]
mod tests;
