//! Output reaches its reader byte for byte, however much, whatever it is.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use broker_schema::digest::Running;
use broker_schema::{Command, FrameKind, Outcome, PoolId, Step, StepKind, TaskRequest, Terminal};
use futures::StreamExt as _;
use remuda_client::{Client, OutputEvent, Until};
use remuda_tests::fleet::{Fleet, SharedFleet, default_config};

const PATIENCE: Duration = Duration::from_secs(120);
/// Much more than anything on the way may hold in memory.
const FLOOD: u64 = if cfg!(debug_assertions) { 64 } else { 256 } << 20;
/// What a worker may grow by while it passes a flood on.
const GROWTH: u64 = 24 << 20;

async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    FLEET.get(default_config).await.unwrap()
}

fn pool() -> PoolId {
    "default".parse().unwrap()
}

/// A command with room for all of its output, and time for it.
fn python(client: &Client, program: &str) -> TaskRequest {
    let step = Step {
        name: String::new(),
        action: StepKind::Command(Command {
            argv: ["python3", "-c", program]
                .iter()
                .map(|argument| argument.as_bytes().into())
                .collect(),
            output_limit: Some(1 << 30),
            ..Command::default()
        }),
    };
    TaskRequest {
        timeout_ms: Some(PATIENCE.as_millis() as u64),
        ..client.task(&pool(), vec![step])
    }
}

/// What a reader got of one task.
#[derive(Default)]
struct Got {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    terminal: Option<Terminal>,
}

async fn read(client: &Client, request: TaskRequest) -> Got {
    let mut got = Got::default();
    let mut output = client.stream(request).await.unwrap();
    while let Some(event) = output.next().await {
        match event.unwrap() {
            OutputEvent::Output { kind, bytes, .. } => match kind {
                FrameKind::Stdout => got.stdout.extend_from_slice(&bytes),
                FrameKind::Stderr => got.stderr.extend_from_slice(&bytes),
                other => panic!("output of kind {other:?}"),
            },
            OutputEvent::Done(terminal) => got.terminal = Some(*terminal),
            _ => {}
        }
    }
    got
}

/// Resident memory of a process, the most there was since the mark was reset.
fn peak(pid: nix::unistd::Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn reset_peak(pid: nix::unistd::Pid) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

#[tokio::test]
async fn a_flood_is_exact_and_no_part_of_the_fleet_holds_it() {
    // Its own: what others do would be counted too.
    let fleet = Fleet::start().await.unwrap();
    let client = fleet.client("flood").await.unwrap();
    // Numbered lines: a piece that is lost, repeated or misplaced shows.
    let program = format!(
        "
import hashlib, sys
h, n, left = hashlib.sha256(), 0, {FLOOD}
while left:
    block = b''.join(b'%015d\\n' % (n + i) for i in range(4096))[:left]
    n += 4096
    left -= len(block)
    h.update(block)
    sys.stdout.buffer.write(block)
sys.stderr.write(h.hexdigest())
"
    );
    let worker = fleet.pid("worker").unwrap();
    // Whatever is only made once is made now.
    read(&client, python(&client, "print('x' * 10**6)")).await;
    reset_peak(worker);
    let before = peak(worker);

    let (mut sum, mut bytes, mut told) = (Running::default(), 0, Vec::new());
    let mut ended = None;
    let mut output = client.stream(python(&client, &program)).await.unwrap();
    while let Some(event) = output.next().await {
        match event.unwrap() {
            OutputEvent::Output {
                kind: FrameKind::Stdout,
                bytes: piece,
                ..
            } => {
                bytes += piece.len() as u64;
                sum.update(&piece);
            }
            OutputEvent::Output { bytes, .. } => told.extend_from_slice(&bytes),
            OutputEvent::Reset { .. } => panic!("it started over"),
            OutputEvent::StepExit { exit, .. } => assert_eq!(exit.code, 0),
            OutputEvent::Done(terminal) => ended = Some(terminal),
        }
    }
    let terminal = ended.unwrap();
    assert_eq!(
        terminal.outcome,
        Outcome::Succeeded,
        "{}",
        terminal.evidence
    );
    let sum = sum.finish();
    assert_eq!(bytes, FLOOD);
    assert_eq!(sum, String::from_utf8(told).unwrap());
    let stdout = &terminal.steps[0].stdout;
    assert_eq!((stdout.bytes, stdout.dropped), (FLOOD, 0));
    assert_eq!(stdout.sha256, sum);
    let grown = peak(worker).saturating_sub(before);
    assert!(grown < GROWTH, "the worker grew by {} KiB", grown >> 10);
    assert!(fleet.stop().await.unwrap().success());
}

#[tokio::test]
async fn every_byte_passes_in_frames_and_in_terminals() {
    let fleet = fleet().await;
    let client = fleet.client("bytes").await.unwrap();
    for times in [4, 4096] {
        let program = format!(
            "import sys\nsys.stdout.buffer.write(bytes(range(256)) * {times} + b'\\xff\\x00\\xc3')"
        );
        let got = read(&client, python(&client, &program)).await;
        let mut expected: Vec<u8> = (0..=255_u8).collect::<Vec<u8>>().repeat(times);
        expected.extend_from_slice(b"\xff\x00\xc3");
        assert!(got.stdout == expected, "{times}: other bytes came");
        assert!(got.stderr.is_empty());
        let terminal = got.terminal.unwrap();
        // Small output is in the terminal, large output in frames before it.
        assert_eq!(terminal.frames == 0, times == 4, "{}", terminal.frames);
    }
}

#[tokio::test]
async fn the_two_streams_are_kept_apart_each_in_its_order() {
    let fleet = fleet().await;
    let client = fleet.client("apart").await.unwrap();
    let program = "
import os
for n in range(20000):
    os.write(1 + n % 2, b'%d\\n' % n)
";
    let got = read(&client, python(&client, program)).await;
    let every_second = |first: u32| -> String {
        (first..20_000)
            .step_by(2)
            .map(|n| n.to_string() + "\n")
            .collect()
    };
    assert!(got.stdout == every_second(0).as_bytes(), "stdout differs");
    assert!(got.stderr == every_second(1).as_bytes(), "stderr differs");
    assert_eq!(got.terminal.unwrap().outcome, Outcome::Succeeded);
}

#[tokio::test]
async fn a_reader_goes_on_where_it_left_off() {
    let fleet = fleet().await;
    let client = fleet.client("resume").await.unwrap();
    let program = "import sys\nfor n in range(200000): sys.stdout.write('%07d\\n' % n)";
    let request = python(&client, program);
    let (run, task) = (request.run.clone(), request.id);
    let terminal = client.run(request).await.unwrap();
    assert!(terminal.frames > 10, "{}", terminal.frames);

    let mut read = Vec::new();
    let mut last = 0;
    let mut first = Box::pin(client.output(&run, task, None, Until::CaughtUp));
    for _ in 0..terminal.frames / 2 {
        let (sequence, frame) = first.next().await.unwrap().unwrap();
        assert!(sequence > last);
        last = sequence;
        read.extend_from_slice(frame.data.as_slice());
    }
    drop(first);
    assert!(!read.is_empty() && read.len() < 1_600_000);

    // Somebody else, later, elsewhere.
    let other = fleet.client("another-run").await.unwrap();
    let mut rest = Box::pin(other.output(&run, task, Some(last + 1), Until::CaughtUp));
    let mut frames = terminal.frames / 2;
    while let Some(item) = rest.next().await {
        let (sequence, frame) = item.unwrap();
        assert!(sequence > last);
        last = sequence;
        assert_eq!((frame.attempt, frame.n), (terminal.attempt, frames));
        frames += 1;
        read.extend_from_slice(frame.data.as_slice());
    }
    assert_eq!(frames, terminal.frames);
    assert_eq!(
        broker_schema::digest::sha256_hex(&read),
        terminal.steps[0].stdout.sha256
    );
    assert_eq!(read.len(), 1_600_000);
    assert!(read.ends_with(b"0199999\n"));
}
