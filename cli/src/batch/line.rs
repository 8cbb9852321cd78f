//! One line of a batch: a task.

use std::collections::BTreeMap;

use broker_schema::{
    Blob, GroupId, PoolId, Priority, RequestLimits, RunId, Step, TaskRequest, TenantId,
};
use serde::Deserialize;
use serde_json::Value;

use crate::task_file::{Problem, millis, steps, strict};

/// A line as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LineDoc {
    tag: Option<String>,
    command: Option<Vec<Blob>>,
    steps: Option<Vec<Value>>,
    /// Written before the first step: path to content.
    #[serde(default)]
    files: BTreeMap<String, Blob>,
    #[serde(default)]
    env: BTreeMap<String, Blob>,
    timeout: Option<String>,
    pool: Option<PoolId>,
    #[serde(default)]
    priority: Priority,
    #[serde(default)]
    continue_on_failure: bool,
    group: Option<GroupId>,
    group_size: Option<u32>,
    min_valid: Option<u32>,
}

/// A line that can be submitted.
#[derive(Debug, PartialEq)]
pub(crate) struct Line {
    /// The caller's name for it; the result carries it back.
    pub(crate) tag: Option<String>,
    pub(crate) request: TaskRequest,
}

/// What the command line says for every line.
#[derive(Debug, Clone)]
pub(crate) struct Defaults {
    pub(crate) tenant: TenantId,
    pub(crate) run: RunId,
    pub(crate) pool: PoolId,
    pub(crate) timeout_ms: Option<u64>,
}

/// Reads a line and checks everything that can be known without a fleet.
pub(crate) fn parse(text: &[u8], defaults: &Defaults) -> Result<Line, Problem> {
    let value: Value =
        serde_json::from_slice(text).map_err(|error| Problem::at("", error.to_string()))?;
    if !value.is_object() {
        return Err(Problem::at(
            "",
            "is no object, expected {\"steps\": …} or {\"command\": …}",
        ));
    }
    let doc: LineDoc = strict("", value)?;
    let mut all: Vec<Step> = doc
        .files
        .into_iter()
        .map(|(path, content)| Step::write(path, content))
        .collect();
    match (doc.command, doc.steps) {
        (Some(argv), None) => all.push(Step::command(argv.iter().map(Blob::as_slice))),
        (None, Some(values)) => all.extend(steps("steps", values)?),
        (Some(_), Some(_)) => {
            return Err(Problem::at(
                "command",
                "stands beside steps, give one of the two",
            ));
        }
        (None, None) => return Err(Problem::at("steps", "is missing, give steps or command")),
    }
    let timeout_ms = doc
        .timeout
        .map(|text| millis("timeout", &text))
        .transpose()?;
    let pool = doc.pool.unwrap_or_else(|| defaults.pool.clone());
    let mut request = TaskRequest::new(defaults.tenant.clone(), defaults.run.clone(), pool, all);
    request.env = doc.env;
    request.timeout_ms = timeout_ms.or(defaults.timeout_ms);
    request.priority = doc.priority;
    request.continue_on_failure = doc.continue_on_failure;
    request.group = doc.group;
    request.group_size = doc.group_size;
    request.min_valid = doc.min_valid;
    request
        .validate(&RequestLimits::default())
        .map_err(|invalid| {
            let info = invalid.into_info();
            let what = format!("{} [{}]", info.message, info.code);
            Problem::at(info.field.unwrap_or_default(), what)
        })?;
    Ok(Line {
        tag: doc.tag,
        request,
    })
}

#[cfg(test)]
mod tests {
    use broker_schema::StepKind;

    use super::*;

    fn defaults() -> Defaults {
        Defaults {
            tenant: "t".parse().unwrap(),
            run: "r".parse().unwrap(),
            pool: "p".parse().unwrap(),
            timeout_ms: Some(5000),
        }
    }

    fn line(text: &str) -> Result<Line, String> {
        parse(text.as_bytes(), &defaults()).map_err(|problem| problem.to_string())
    }

    #[test]
    fn files_come_before_the_command() {
        let line = line(
            r#"{"tag": "HumanEval/1", "files": {"a.py": "x = 1"}, "command": ["python3", "a.py"],
                "env": {"A": "b"}, "timeout": "10s", "pool": "other"}"#,
        )
        .unwrap();
        assert_eq!(line.tag.as_deref(), Some("HumanEval/1"));
        assert_eq!(line.request.timeout_ms, Some(10_000));
        assert_eq!(line.request.pool.as_str(), "other");
        assert_eq!(line.request.env["A"], Blob::from("b"));
        assert_eq!(
            line.request.steps,
            [
                Step::write("a.py", "x = 1"),
                Step::command(["python3", "a.py"])
            ]
        );
    }

    #[test]
    fn steps_in_either_shape() {
        let line = line(
            r#"{"steps": [{"type": "Command", "command": ["a"], "workDir": "/workspace"},
                          {"action": {"file_read": {"path": "b"}}}]}"#,
        )
        .unwrap();
        let kinds: Vec<_> = line.request.steps.iter().map(|s| s.action.name()).collect();
        assert_eq!(kinds, ["command", "file_read"]);
        assert!(matches!(&line.request.steps[0].action,
            StepKind::Command(c) if c.work_dir.as_deref() == Some("/workspace")));
        assert_eq!(line.request.timeout_ms, Some(5000));
    }

    #[test]
    fn a_bad_line_says_where() {
        for (text, expected) in [
            ("{", "EOF while parsing"),
            ("[]", "is no object"),
            ("{}", "steps: is missing"),
            (
                r#"{"command": []}"#,
                "steps[0].action.command.argv: names no program",
            ),
            (
                r#"{"command": ["a"], "steps": []}"#,
                "command: stands beside steps",
            ),
            (r#"{"command": ["a"], "timout": "1s"}"#, "timout"),
            (
                r#"{"steps": [{"type": "Command", "comand": ["a"]}]}"#,
                "steps[0].comand",
            ),
            (
                r#"{"command": ["a"], "files": {"../../x": ""}}"#,
                "leads out of the sandbox",
            ),
        ] {
            let error = line(text).unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }
}
