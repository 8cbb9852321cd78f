//! Steps of a file: the manifest's shape (`type: Command`, `workDir`, …) or
//! the one that travels (`action: {command: …}`).

use std::collections::BTreeMap;

use broker_schema::{Blob, Command, FilePatch, FileRead, Step, StepKind};
use serde::Deserialize;
use serde_json::Value;

use super::duration::millis;
use super::read::{Problem, join, strict};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct CommandDoc {
    #[serde(default)]
    name: String,
    command: Vec<Blob>,
    work_dir: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, Blob>,
    #[serde(default)]
    stdin: Blob,
    timeout: Option<String>,
    output_limit: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FilePatchDoc {
    #[serde(default)]
    name: String,
    path: String,
    content: Blob,
    mode: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileReadDoc {
    #[serde(default)]
    name: String,
    path: String,
    #[serde(default)]
    offset: u64,
    limit: Option<u64>,
}

/// Every step of a list that stands at `at`.
pub(crate) fn steps(at: &str, values: Vec<Value>) -> Result<Vec<Step>, Problem> {
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| step(&format!("{at}[{index}]"), value))
        .collect()
}

fn step(at: &str, value: Value) -> Result<Step, Problem> {
    let Value::Object(mut fields) = value else {
        return Err(Problem::at(
            at,
            "is no step, expected name, type, and what the type needs",
        ));
    };
    if fields.contains_key("action") {
        return strict(at, Value::Object(fields));
    }
    let kind = match fields.remove("type") {
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(Problem::at(join(at, "type"), "is not text")),
        None => {
            return Err(Problem::at(
                join(at, "type"),
                "is missing, expected Command, FilePatch or FileRead",
            ));
        }
    };
    let fields = Value::Object(fields);
    match kind.as_str() {
        "Command" => command(at, fields),
        "FilePatch" => {
            let doc: FilePatchDoc = strict(at, fields)?;
            let action = StepKind::FilePatch(FilePatch {
                path: doc.path,
                content: doc.content,
                mode: doc.mode,
            });
            Ok(Step {
                name: doc.name,
                action,
            })
        }
        "FileRead" => {
            let doc: FileReadDoc = strict(at, fields)?;
            let action = StepKind::FileRead(FileRead {
                path: doc.path,
                offset: doc.offset,
                limit: doc.limit,
            });
            Ok(Step {
                name: doc.name,
                action,
            })
        }
        other => Err(Problem::at(
            join(at, "type"),
            format!("{other:?} is not known, expected Command, FilePatch or FileRead"),
        )),
    }
}

fn command(at: &str, fields: Value) -> Result<Step, Problem> {
    if fields.get("command").is_some_and(Value::is_string) {
        return Err(Problem::at(
            join(at, "command"),
            "is text, expected a list such as [\"bash\", \"-c\", \"…\"]",
        ));
    }
    let doc: CommandDoc = strict(at, fields)?;
    let timeout_ms = doc
        .timeout
        .map(|text| millis(&join(at, "timeout"), &text))
        .transpose()?;
    let action = StepKind::Command(Command {
        argv: doc.command,
        env: doc.env,
        work_dir: doc.work_dir,
        stdin: doc.stdin,
        timeout_ms,
        output_limit: doc.output_limit,
    });
    Ok(Step {
        name: doc.name,
        action,
    })
}
