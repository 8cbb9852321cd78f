//! Text to values, and values to types in which nothing is overlooked: an
//! unknown field is an error that says where it stands.

use std::fmt;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is wrong with a document, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) field: String,
    pub(crate) message: String,
}

impl Problem {
    pub(crate) fn at(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

/// All documents of a file: JSON where the name says so or the text is, YAML
/// otherwise. Empty documents are left out.
pub(super) fn documents(file: &str, text: &str) -> Result<Vec<Value>, String> {
    let json = || {
        serde_json::Deserializer::from_str(text)
            .into_iter::<Value>()
            .collect::<Result<Vec<_>, _>>()
    };
    let values = if is_json_name(file) {
        json().map_err(|error| error.to_string())?
    } else {
        // Several JSON documents one after the other are no YAML.
        match json() {
            Ok(values) if text.trim_start().starts_with('{') => values,
            _ => serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?,
        }
    };
    Ok(values
        .into_iter()
        .filter(|value| !value.is_null())
        .collect())
}

fn is_json_name(file: &str) -> bool {
    std::path::Path::new(file)
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

/// A value as a type, nothing ignored. `at` is where the value stands.
pub(crate) fn strict<T: DeserializeOwned>(at: &str, value: Value) -> Result<T, Problem> {
    let mut unknown = None;
    let mut note = |path: serde_ignored::Path<'_>| {
        unknown.get_or_insert_with(|| path.to_string().replace(".?", ""));
    };
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let parsed = serde_ignored::deserialize(tracked, &mut note);
    match (parsed, unknown) {
        (Err(error), _) => {
            let error: serde_json::Error = error;
            let path = track.path().to_string();
            Err(Problem::at(join(at, &path), plain(&error)))
        }
        (Ok(_), Some(path)) => Err(Problem::at(
            join(at, &path),
            "is not a field that is known here",
        )),
        (Ok(parsed), None) => Ok(parsed),
    }
}

/// One field inside another: `spec` and `steps[0]`.
pub(super) fn join(at: &str, field: &str) -> String {
    match (at, field) {
        (at, "" | ".") => at.to_owned(),
        ("", field) => field.to_owned(),
        (at, field) if field.starts_with('[') => format!("{at}{field}"),
        (at, field) => format!("{at}.{field}"),
    }
}

/// Without the position, which a value no longer has.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.find(" at line 0") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
