//! One document of a task file.

use std::collections::BTreeMap;

use broker_schema::{Blob, PoolId, Priority, RunId, TaskRequest};
use serde::Deserialize;
use serde_json::Value;

use super::TaskDoc;
use super::duration::millis;
use super::read::{Problem, join, strict};
use super::step::steps;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Manifest {
    api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    spec: Value,
}

/// Of a manifest's metadata only the name means something here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
    #[serde(default, rename = "namespace")]
    _namespace: Option<String>,
    #[serde(default, rename = "labels")]
    _labels: Option<BTreeMap<String, String>>,
    #[serde(default, rename = "annotations")]
    _annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    sandbox_ref: Option<String>,
    pool_ref: Option<PoolId>,
    timeout: Option<String>,
    #[serde(default)]
    retries: u32,
    ttl_seconds_after_finished: Option<u64>,
    steps: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Bare {
    name: Option<String>,
    pool: Option<PoolId>,
    run: Option<RunId>,
    #[serde(default)]
    priority: Priority,
    timeout: Option<String>,
    #[serde(default)]
    retries: u32,
    #[serde(alias = "ttl_seconds_after_finished")]
    ttl_seconds_after_finished: Option<u64>,
    #[serde(default, alias = "continue_on_failure")]
    continue_on_failure: bool,
    #[serde(default)]
    env: BTreeMap<String, Blob>,
    steps: Vec<Value>,
}

/// The API group whose tasks have the shape that is read here.
const API_GROUP: &str = "arl.infra.io/";

pub(super) fn task(value: Value) -> Result<TaskDoc, Problem> {
    let Value::Object(fields) = &value else {
        return Err(Problem::at(
            "",
            "is no task, expected `steps:` or `kind: Task`",
        ));
    };
    let kind = fields.get("kind").cloned();
    match kind {
        Some(Value::String(kind)) if kind == "Task" => manifest(value),
        Some(Value::String(kind)) => Err(Problem::at(
            "kind",
            format!("{kind:?} cannot be submitted, only Task can; pools are given to `remuda up`"),
        )),
        Some(_) => Err(Problem::at("kind", "is not text")),
        None if fields.contains_key("apiVersion") => {
            Err(Problem::at("kind", "is missing, expected Task"))
        }
        None => bare(value),
    }
}

fn manifest(value: Value) -> Result<TaskDoc, Problem> {
    let manifest: Manifest = strict("", value)?;
    if !manifest.api_version.starts_with(API_GROUP) {
        return Err(Problem::at(
            "apiVersion",
            format!(
                "{:?} is not known, expected {API_GROUP}v1alpha1",
                manifest.api_version
            ),
        ));
    }
    let spec: Spec = strict("spec", manifest.spec)?;
    let mut notes = Vec::new();
    if let Some(sandbox) = spec.sandbox_ref {
        notes.push(format!(
            "spec.sandboxRef: no sandbox called {sandbox:?} is kept here, the task gets a fresh one of its pool"
        ));
    }
    Ok(TaskDoc {
        name: Some(manifest.metadata.name),
        pool: spec.pool_ref,
        timeout_ms: timeout("spec", spec.timeout)?,
        retries: retries("spec", spec.retries)?,
        ttl_seconds_after_finished: spec.ttl_seconds_after_finished,
        steps: some_steps("spec", spec.steps)?,
        notes,
        ..TaskDoc::default()
    })
}

fn bare(value: Value) -> Result<TaskDoc, Problem> {
    let doc: Bare = strict("", value)?;
    Ok(TaskDoc {
        name: doc.name,
        pool: doc.pool,
        run: doc.run,
        priority: doc.priority,
        timeout_ms: timeout("", doc.timeout)?,
        retries: retries("", doc.retries)?,
        ttl_seconds_after_finished: doc.ttl_seconds_after_finished,
        continue_on_failure: doc.continue_on_failure,
        env: doc.env,
        steps: some_steps("", doc.steps)?,
        notes: Vec::new(),
    })
}

fn timeout(at: &str, text: Option<String>) -> Result<Option<u64>, Problem> {
    text.map(|text| millis(&join(at, "timeout"), &text))
        .transpose()
}

fn retries(at: &str, retries: u32) -> Result<u8, Problem> {
    u8::try_from(retries)
        .ok()
        .filter(|retries| *retries <= TaskRequest::MOST_RETRIES)
        .ok_or_else(|| {
            let most = TaskRequest::MOST_RETRIES;
            Problem::at(
                join(at, "retries"),
                format!("is {retries}, at most {most} are made"),
            )
        })
}

fn some_steps(at: &str, values: Vec<Value>) -> Result<Vec<broker_schema::Step>, Problem> {
    let at = join(at, "steps");
    if values.is_empty() {
        return Err(Problem::at(at, "has no steps, give at least one"));
    }
    steps(&at, values)
}
