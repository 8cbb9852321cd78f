//! The manual's examples, and every kind of mistake.

use broker_schema::{Step, StepKind};

use super::*;

const HELLO: &str = r#"
# task.yaml
apiVersion: arl.infra.io/v1alpha1
kind: Task
metadata:
  name: hello-task
spec:
  sandboxRef: my-workspace       # which sandbox to run in
  timeout: 30s
  steps:
    - name: write-code
      type: FilePatch
      path: /workspace/hello.py
      content: |
        print("Hello from ARL!")
        print("Task executed successfully")

    - name: run-code
      type: Command
      command: ["python", "/workspace/hello.py"]
"#;

const ENV_TASK: &str = r#"
steps:
  - name: run-with-env
    type: Command
    command: ["python", "app.py"]
    workDir: /workspace
    env:
      APP_ENV: "production"
      VERSION: "1.0.0"
"#;

const SCRIPT: &str = r#"
pool: python-pool
run: r1
timeout: 1m
retries: 3
steps:
- name: start-and-record-pid
  type: Command
  command:
    - bash
    - -c
    - |
      nohup python server.py > /tmp/server.log 2>&1 &
      echo $! > /tmp/server.pid
---
steps:
- {name: get-pid, type: Command, command: ["cat", "/tmp/server.pid"]}
"#;

fn one(text: &str) -> TaskDoc {
    let mut docs = parse("task.yaml", text).unwrap();
    assert_eq!(docs.len(), 1);
    docs.remove(0)
}

fn error(text: &str) -> String {
    parse("task.yaml", text).unwrap_err().to_string()
}

fn command(step: &Step) -> &broker_schema::Command {
    match &step.action {
        StepKind::Command(command) => command,
        other => panic!("{} is no command", other.name()),
    }
}

#[test]
fn a_manifest() {
    let doc = one(HELLO);
    assert_eq!(doc.name.as_deref(), Some("hello-task"));
    assert_eq!(doc.timeout_ms, Some(30_000));
    let content = "print(\"Hello from ARL!\")\nprint(\"Task executed successfully\")\n";
    assert_eq!(
        doc.steps[0],
        Step {
            name: "write-code".into(),
            ..Step::write("/workspace/hello.py", content)
        }
    );
    let argv: Vec<_> = command(&doc.steps[1]).argv.iter().map(Blob::text).collect();
    assert_eq!(argv, ["python", "/workspace/hello.py"]);
    assert!(doc.notes[0].contains("my-workspace"), "{:?}", doc.notes);
}

#[test]
fn results_may_be_kept_for_less_long() {
    let bare = "ttlSecondsAfterFinished: 60\nsteps: [{type: Command, command: [a]}]";
    assert_eq!(one(bare).ttl_seconds_after_finished, Some(60));
    assert_eq!(one(ENV_TASK).ttl_seconds_after_finished, None);
    let negative = "ttlSecondsAfterFinished: -1\nsteps: [{type: Command, command: [a]}]";
    let told = error(negative);
    assert!(told.contains("ttlSecondsAfterFinished"), "{told}");
}

#[test]
fn environment_and_folder_of_a_step() {
    let doc = one(ENV_TASK);
    let command = command(&doc.steps[0]);
    assert_eq!(command.work_dir.as_deref(), Some("/workspace"));
    assert_eq!(command.env["VERSION"], Blob::from("1.0.0"));
}

#[test]
fn several_documents_keep_their_order() {
    let docs = parse("many.yaml", SCRIPT).unwrap();
    assert_eq!(docs.len(), 2);
    assert_eq!(docs[0].pool.as_ref().unwrap().as_str(), "python-pool");
    assert_eq!(docs[0].timeout_ms, Some(60_000));
    assert_eq!(docs[0].retries, 3);
    let script = command(&docs[0].steps[0]).argv[2].text().into_owned();
    assert_eq!(
        script,
        "nohup python server.py > /tmp/server.log 2>&1 &\necho $! > /tmp/server.pid\n"
    );
    assert_eq!(docs[1].steps[0].name, "get-pid");
}

#[test]
fn json_and_the_shape_that_travels() {
    let text = r#"{"steps": [{"name": "a", "action": {"command": {"argv": ["true"]}}}]}
                  {"steps": [{"type": "FileRead", "path": "x", "limit": 4}]}"#;
    for file in ["tasks.json", "-"] {
        let docs = parse(file, text).unwrap();
        assert_eq!(docs.len(), 2);
        assert_eq!(command(&docs[0].steps[0]).argv, [Blob::from("true")]);
    }
}

#[test]
fn other_kinds_are_refused_by_name() {
    let text = "apiVersion: arl.infra.io/v1alpha1\nkind: WarmPool\nmetadata: {name: p}\nspec: {}";
    assert_eq!(
        error(text),
        "task.yaml: document 1: kind: \"WarmPool\" cannot be submitted, only Task can; \
         pools are given to `remuda up`"
    );
}

#[test]
fn an_unknown_field_is_named_with_its_place() {
    for (text, place) in [
        ("steps: [{type: Command, comand: [a]}]", "steps[0].comand"),
        ("stepz: []", "stepz"),
        (
            "steps: [{action: {command: {argv: [a], workdir: x}}}]",
            "steps[0].action.workdir",
        ),
        (
            "steps: [{type: Command, command: [a], action: 1}]",
            "steps[0].action",
        ),
        (
            "apiVersion: arl.infra.io/v1alpha1\nkind: Task\nmetadata: {name: a}\nspec: {step: []}",
            "spec.step",
        ),
    ] {
        let error = error(text);
        assert!(error.starts_with("task.yaml: document 1: "), "{error}");
        assert!(error.contains(place), "{error} lacks {place}");
    }
}

#[test]
fn wrong_values_are_named_with_their_place() {
    for (text, expected) in [
        ("steps: []", "steps: has no steps"),
        ("steps: [{command: [a]}]", "steps[0].type: is missing"),
        (
            "steps: [{type: Shell}]",
            "steps[0].type: \"Shell\" is not known",
        ),
        (
            "steps: [{type: Command, command: ls}]",
            "steps[0].command: is text, expected a list",
        ),
        (
            "steps: [{type: Command, command: [a], env: {D: true}}]",
            "steps[0].env.D: ",
        ),
        (
            "steps: [{type: Command, command: [a]}]\ntimeout: soon",
            "timeout: \"soon\"",
        ),
        (
            "steps: [{type: Command, command: [a]}]\npool: a.b",
            "pool: ",
        ),
        (
            "steps: [{type: Command, command: [a]}]\nretries: 1000",
            "retries: is 1000",
        ),
        ("- 1", "is no task"),
        (
            "apiVersion: v1\nkind: Task\nmetadata: {name: a}\nspec: {}",
            "apiVersion: \"v1\"",
        ),
        ("apiVersion: arl.infra.io/v1alpha1", "kind: is missing"),
    ] {
        let error = error(text);
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn what_is_no_yaml_or_empty_says_so() {
    assert!(error("steps: [").starts_with("task.yaml: "));
    assert_eq!(error(""), "task.yaml: holds no task");
    assert_eq!(error("---\n# nothing\n"), "task.yaml: holds no task");
    let json = parse("a.json", "{").unwrap_err().to_string();
    assert!(json.starts_with("a.json: EOF"), "{json}");
}
