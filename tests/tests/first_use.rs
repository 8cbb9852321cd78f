//! What a newcomer does, with the programs as they are installed.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use remuda_tests::fleet::{Fleet, SharedFleet, default_config, finish};
use remuda_tests::process::Process;
use remuda_tests::wait::eventually;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// The default pool, and one that runs one task at a time.
async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    let config = || {
        let mut config = default_config();
        let narrow = json!({"name": "narrow", "warm": 1, "max": 1});
        config["pools"].as_array_mut().unwrap().push(narrow);
        config
    };
    FLEET.get(config).await.unwrap()
}

/// Waits until a command has printed exactly this, and still runs.
async fn printed(process: &Process, expected: &str) {
    eventually("line while the command runs", PATIENCE, async || {
        let stdout = process.stdout().map_err(|error| error.to_string())?;
        match process.try_exit() {
            Ok(None) if stdout == expected.as_bytes() => Ok(()),
            other => Err(format!("{other:?} {}", process.stderr_tail())),
        }
    })
    .await
    .unwrap();
}

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

async fn ps(fleet: &Fleet) -> Value {
    let finished = fleet.remuda(["ps", "--output", "json"]).await.unwrap();
    assert_eq!(finished.code(), 0, "{finished:?}");
    serde_json::from_slice(&finished.stdout).unwrap()
}

/// The tasks of a run that hold a sandbox.
async fn leased(fleet: &Fleet, run: &str) -> Vec<String> {
    let state = ps(fleet).await;
    let leases = state["leases"].as_array().unwrap().iter();
    leases
        .filter(|lease| lease["run"] == run)
        .map(|lease| lease["task"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn output_arrives_while_the_command_runs_and_ctrl_c_ends_it() {
    let fleet = fleet().await;
    let run = ["run", "--run", "ctrl-c", "--", "sh", "-c"];
    let command = fleet
        .command([&run[..], &["echo first; echo aside >&2; sleep 50"]].concat())
        .unwrap();
    let process = Process::spawn(command).unwrap();
    printed(&process, "first\n").await;
    assert_eq!(process.stderr().unwrap(), "aside\n");
    assert_eq!(leased(&fleet, "ctrl-c").await.len(), 1);

    process.signal(Signal::SIGINT).unwrap();
    let status = process.wait_exit(PATIENCE).await.unwrap();
    let stderr = process.stderr().unwrap();
    assert_eq!(status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("error: cancelled: "), "{stderr}");
    let results = fleet.remuda(["results", "ctrl-c"]).await.unwrap();
    assert_eq!(lines(&results.text())[0]["outcome"], "cancelled");
}

#[tokio::test]
async fn standard_input_is_passed_on_byte_for_byte() {
    let fleet = fleet().await;
    let sent: Vec<u8> = (0..1_000_003_u32).map(|n| (n * 7 % 251) as u8).collect();
    let command = fleet.command(["run", "--", "cat"]).unwrap();
    let mut process = Process::spawn_with_stdin(command).unwrap();
    let mut stdin = process.take_stdin().unwrap();
    let bytes = sent.clone();
    tokio::task::spawn_blocking(move || stdin.write_all(&bytes).unwrap())
        .await
        .unwrap();
    let status = process.wait_exit(PATIENCE).await.unwrap();
    assert!(status.success(), "{}", process.stderr_tail());
    assert!(process.stdout().unwrap() == sent, "other bytes came back");
}

#[tokio::test]
async fn the_exit_status_is_the_command_s() {
    let fleet = fleet().await;
    let hog = "kept = []\nwhile True: kept.append(bytearray(1 << 24))";
    let cases: [(&[&str], &[&str], i32, &str); 8] = [
        (&[], &["true"], 0, ""),
        (&[], &["sh", "-c", "exit 3"], 3, ""),
        (
            &[],
            &["no-such-program"],
            127,
            "no-such-program: not found, or its interpreter is not [file_not_found]",
        ),
        (
            &[],
            &["/etc/passwd"],
            126,
            "/etc/passwd: Permission denied [permission_denied]",
        ),
        (
            &[],
            &["/usr"],
            126,
            "/usr: Permission denied [permission_denied]",
        ),
        (&[], &["sh", "-c", "kill -9 $$"], 137, ""),
        (
            &["--timeout", "300ms"],
            &["sleep", "50"],
            124,
            "error: timed_out: ",
        ),
        (&[], &["python3", "-c", hog], 137, "error: oom_killed: "),
    ];
    for (options, command, code, told) in cases {
        let args = [&["run"], options, &["--"], command].concat();
        let finished = fleet.remuda(&args).await.unwrap();
        assert_eq!(finished.code(), code, "{args:?}: {finished:?}");
        assert_eq!(finished.text(), "", "{args:?}");
        if told.is_empty() {
            assert_eq!(finished.stderr, "", "{args:?}");
        } else {
            assert!(finished.stderr.contains(told), "{args:?}: {finished:?}");
            assert_eq!(finished.stderr.lines().count(), 1, "{args:?}: {finished:?}");
        }
    }
}

/// The manual's first task; Debian's Python has a 3 in its name.
const HELLO: &str = r#"
apiVersion: arl.infra.io/v1alpha1
kind: Task
metadata:
  name: hello-task
spec:
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
      command: ["python3", "/workspace/hello.py"]
"#;

#[tokio::test]
async fn a_task_file_prints_what_its_steps_print_and_no_more() {
    let fleet = fleet().await;
    let file = fleet.data().join("hello.yaml");
    std::fs::write(&file, HELLO).unwrap();
    let file = file.to_str().unwrap();
    let finished = fleet.remuda(["task", "submit", file]).await.unwrap();
    assert_eq!(finished.code(), 0, "{finished:?}");
    assert_eq!(
        finished.text(),
        "Hello from ARL!\nTask executed successfully\n"
    );
    for told in ["write-code", "run-code", "hello-task: succeeded after "] {
        assert!(finished.stderr.contains(told), "{}", finished.stderr);
    }

    let args = ["task", "submit", "--output", "json", file];
    let finished = fleet.remuda(args).await.unwrap();
    let terminals = lines(&finished.text());
    assert_eq!(terminals.len(), 1);
    let steps = terminals[0]["steps"].as_array().unwrap();
    let exits: Vec<&Value> = steps.iter().map(|step| &step["exit"]["code"]).collect();
    assert_eq!(exits, [0, 0]);
    assert_eq!(steps[0]["stdout"]["bytes"], 0);
}

#[tokio::test]
async fn a_batch_ends_each_task_once_and_its_results_can_be_read_again() {
    let fleet = fleet().await;
    let kinds = [
        (30, json!(["sh", "-c", "echo $TAG"]), "succeeded", 0),
        (20, json!(["sh", "-c", "echo $TAG; exit 3"]), "failed", 3),
        (10, json!(["no-such-program"]), "failed", 127),
    ];
    let mut text = String::new();
    for (kind, (count, command, ..)) in kinds.iter().enumerate() {
        for n in 0..*count {
            let tag = format!("{kind}-{n}");
            let line = json!({"tag": tag, "command": command, "env": {"TAG": tag}});
            text += &line.to_string();
            text.push('\n');
        }
    }
    let file = fleet.data().join("tasks.jsonl");
    std::fs::write(&file, text).unwrap();
    let args = ["batch", file.to_str().unwrap(), "--run", "sixty"];
    let finished = fleet.remuda(args).await.unwrap();
    assert_eq!(finished.code(), 0, "{}", finished.stderr);
    let results = lines(&finished.text());
    assert_eq!(results.len(), 60);
    for (kind, (count, _, outcome, code)) in kinds.iter().enumerate() {
        let of_kind = |n: i32| {
            let tag = format!("{kind}-{n}");
            let mut found = results.iter().filter(|line| line["tag"] == tag.as_str());
            let result = found.next().unwrap_or_else(|| panic!("no result of {tag}"));
            assert!(found.next().is_none(), "{tag} ended twice");
            (tag, result)
        };
        for (tag, result) in (0..*count).map(of_kind) {
            assert_eq!(result["outcome"], *outcome, "{result}");
            assert_eq!(result["exit"]["code"], *code, "{result}");
            let printed = if *code == 127 {
                String::new()
            } else {
                tag + "\n"
            };
            assert_eq!(result["stdout"], printed.as_str(), "{result}");
        }
    }
    let counts: Vec<Vec<&str>> = finished
        .stderr
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for row in [["failed", "30"], ["succeeded", "30"]] {
        assert!(counts.contains(&row.to_vec()), "{}", finished.stderr);
    }

    // From the stream, in the order in which they were stored.
    let again = fleet.remuda(["results", "sixty"]).await.unwrap();
    let again = lines(&again.text());
    let ids = |lines: &[Value]| {
        let mut ids: Vec<String> = lines.iter().map(|line| line["task"].to_string()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&again), ids(&results));
    let seqs: Vec<u64> = again
        .iter()
        .map(|line| line["seq"].as_u64().unwrap())
        .collect();
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    let from = seqs[45].to_string();
    let rest = fleet.remuda(["results", "sixty", "--from", &from]).await;
    assert_eq!(lines(&rest.unwrap().text()), again[45..]);
}

#[tokio::test]
async fn what_runs_and_what_waits_can_be_cancelled() {
    let fleet = fleet().await;
    let start = |run: &str| {
        let args = [
            "run",
            "--pool",
            "narrow",
            "--run",
            run,
            "--",
            "sh",
            "-c",
            "echo up; sleep 50",
        ];
        Process::spawn(fleet.command(args).unwrap()).unwrap()
    };
    let running = start("runs");
    printed(&running, "up\n").await;
    let task = leased(&fleet, "runs").await.remove(0);

    // The pool has one sandbox at most: this one waits for it.
    let client = fleet.client("waits").await.unwrap();
    let step = broker_schema::Step::command(["true"]);
    let request = client.task(&"narrow".parse().unwrap(), vec![step]);
    let mut waiting = client.submit(request).await.unwrap();
    let queued = waiting.task().to_string();
    let finished = fleet.remuda(["cancel", &queued, "--run", "waits"]).await;
    assert_eq!(finished.unwrap().text(), "cancelled\n");
    let terminal = waiting.terminal().await.unwrap();
    assert_eq!(terminal.outcome.as_str(), "cancelled");
    assert_eq!((terminal.attempt, terminal.times.started), (0, None));
    assert!(running.try_exit().unwrap().is_none());

    let finished = fleet.remuda(["cancel", &task]).await.unwrap();
    assert_eq!(finished.text(), "cancelling\n", "{}", finished.stderr);
    let status = running.wait_exit(PATIENCE).await.unwrap();
    assert_eq!(status.code(), Some(125), "{}", running.stderr_tail());
    let finished = fleet.remuda(["cancel", &task]).await.unwrap();
    assert_eq!(finished.text(), "finished\n");
    // Its sandbox makes room for the next.
    let next = ["run", "--pool", "narrow", "--", "echo", "next"];
    assert_eq!(fleet.remuda(next).await.unwrap().text(), "next\n");
}

#[tokio::test]
async fn a_session_keeps_its_files_until_it_is_closed() {
    let fleet = fleet().await;
    let opened = fleet.remuda(["session", "open"]).await.unwrap();
    assert_eq!(opened.code(), 0, "{opened:?}");
    let session = opened.text().trim().to_owned();
    let exec = async |script: &str| {
        let args = ["session", "exec", &session, "--", "sh", "-c", script];
        fleet.remuda(args).await.unwrap()
    };
    let first = exec("echo kept > note; (sleep 50 &) ; exit 4").await;
    assert_eq!(first.code(), 4, "{first:?}");
    let second = exec("cat note; big=$(head -c 100000 /dev/zero | tr '\\0' x); echo $big").await;
    assert_eq!(second.code(), 0, "{second:?}");
    let text = second.text();
    assert_eq!((text.len(), &text[..6]), (100_006, "kept\nx"));
    let renewed = fleet.remuda(["session", "renew", &session]).await.unwrap();
    assert_eq!(renewed.code(), 0, "{renewed:?}");
    let closed = fleet.remuda(["session", "close", &session]).await.unwrap();
    assert_eq!(closed.code(), 0, "{closed:?}");
    let gone = exec("cat note").await;
    assert_eq!(gone.code(), 125, "{gone:?}");
    assert!(gone.stderr.contains("[session_closed]"), "{gone:?}");
}

#[tokio::test]
async fn ps_shows_workers_pools_and_leases() {
    let fleet = fleet().await;
    let table = fleet.remuda(["ps"]).await.unwrap().text();
    for told in ["WORKER", "alive", "POOL", "default", "narrow", "local"] {
        assert!(table.contains(told), "{table}");
    }
    let args = [
        "run",
        "--run",
        "seen",
        "--",
        "sh",
        "-c",
        "echo up; sleep 50",
    ];
    let running = Process::spawn(fleet.command(args).unwrap()).unwrap();
    printed(&running, "up\n").await;
    let state = ps(&fleet).await;
    assert_eq!(state["workers"][0]["alive"], true, "{state}");
    let leases = state["leases"].as_array().unwrap();
    let lease = leases.iter().find(|lease| lease["run"] == "seen").unwrap();
    assert_eq!(lease["tenant"], "default", "{state}");
    running.signal(Signal::SIGTERM).unwrap();
    running.wait_exit(PATIENCE).await.unwrap();
    eventually("freed lease", PATIENCE, async || {
        match leased(&fleet, "seen").await {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_second_up_on_the_same_data_is_refused() {
    let fleet = fleet().await;
    let refused = finish(fleet.second().unwrap()).await.unwrap();
    assert_eq!(refused.code(), 1, "{refused:?}");
    let told = format!("another `remuda up` (process {})", fleet.up().pid());
    assert!(refused.stderr.contains(&told), "{refused:?}");
    assert!(refused.stderr.contains("--data"), "{refused:?}");
    assert_eq!(fleet.run(["echo", "on"]).await.unwrap().text(), "on\n");
}
