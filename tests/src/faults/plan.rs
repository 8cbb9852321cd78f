//! What a run submits, decided by its seed before anything starts.

use std::time::Duration;

use broker_schema::{Command, Outcome, PoolId, Priority, Step, StepKind, TaskRequest};
use remuda_client::Client;

use super::random::Random;

/// The size of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) tasks: usize,
    pub(crate) sessions: usize,
    /// Steps of each session.
    pub(crate) steps: usize,
    /// Everything is submitted within this.
    pub(crate) over: Duration,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            tasks: 60,
            sessions: 2,
            steps: 8,
            over: Duration::from_secs(8),
        }
    }
}

/// Everything that a run submits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) tasks: Vec<PlannedTask>,
    pub(crate) sessions: Vec<PlannedSession>,
}

/// A one-shot task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedTask {
    /// After the load began.
    pub(crate) at: Duration,
    pub(crate) work: Work,
    pub(crate) priority: Priority,
    /// Cancelled this long after it was accepted.
    pub(crate) cancel_after: Option<Duration>,
    /// Submitted a second time, by another client, with the same bytes.
    pub(crate) twice: bool,
    /// Its output is read while it runs.
    pub(crate) streamed: bool,
}

/// A session and its steps, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedSession {
    pub(crate) at: Duration,
    /// What lies between the end of a step and the next one.
    pub(crate) pauses: Vec<Duration>,
}

/// What a task does, and what must come of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Work {
    /// Prints its mark.
    Instant { mark: u64 },
    /// Prints the numbers from `first` to `last`, a line each.
    Output { first: u64, last: u64 },
    /// Sleeps, then prints its mark.
    Sleep { mark: u64, time: Duration },
    /// Prints its mark and fails, every time.
    Fail { mark: u64, code: i32, retries: u8 },
    /// Takes longer than it may.
    Overdue { mark: u64 },
    /// Writes a file in one step and prints it in the next.
    File { mark: u64 },
    /// A request of some size, which it prints the mark of.
    Bulk { mark: u64, bytes: usize },
    /// Names the process that the harness looks for, sleeps, prints its mark.
    Marked { mark: u64, time: Duration },
}

/// What the terminal of a task says when nobody cancelled it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) outcome: Outcome,
    pub(crate) code: Option<i32>,
    /// Of the last step.
    pub(crate) stdout: Vec<u8>,
}

impl Plan {
    pub(crate) fn new(seed: u64, size: Size) -> Self {
        let root = Random::new(seed);
        let mut random = root.fork("tasks");
        let over = size.over.as_millis() as u64;
        let mut tasks: Vec<PlannedTask> = (0..size.tasks)
            .map(|index| task(&mut random, index as u64, over))
            .collect();
        tasks.sort_by_key(|task| task.at);
        let mut random = root.fork("sessions");
        let sessions = (0..size.sessions)
            .map(|_| PlannedSession {
                at: random.millis(0, over / 4),
                pauses: (0..size.steps)
                    .map(|_| random.millis(0, 2 * over / size.steps.max(1) as u64))
                    .collect(),
            })
            .collect();
        Self { tasks, sessions }
    }
}

fn task(random: &mut Random, index: u64, over: u64) -> PlannedTask {
    let at = random.millis(0, over);
    // Marks differ: output that is another task's shows.
    let mark = 1_000_000 + index * 1000 + random.below(1000);
    let work = match random.below(100) {
        0..35 => Work::Instant { mark },
        35..55 => Work::Sleep {
            mark,
            time: random.millis(100, 2000),
        },
        55..70 => Work::Output {
            first: mark,
            // 8 bytes a line: up to some MB.
            last: mark + random.between(100, 400_000),
        },
        70..82 => Work::Fail {
            mark,
            code: random.between(1, 100) as i32,
            retries: random.below(3) as u8,
        },
        82..92 => Work::File { mark },
        _ => Work::Overdue { mark },
    };
    PlannedTask {
        at,
        priority: Priority::ALL[random.index(Priority::ALL.len())],
        cancel_after: random.chance(1, 8).then(|| random.millis(0, 1500)),
        twice: random.chance(1, 8),
        streamed: matches!(work, Work::Output { .. }) && random.chance(1, 2),
        work,
    }
}

impl Work {
    pub(crate) fn steps(&self) -> Vec<Step> {
        let shell = |script: String| vec![Step::command(["sh", "-c", &script])];
        match self {
            Self::Instant { mark } => shell(format!("echo {mark}")),
            Self::Output { first, last } => vec![Step {
                name: String::new(),
                action: StepKind::Command(Command {
                    argv: ["seq", &first.to_string(), &last.to_string()]
                        .iter()
                        .map(|word| word.as_bytes().into())
                        .collect(),
                    output_limit: Some(64 << 20),
                    ..Command::default()
                }),
            }],
            Self::Sleep { mark, time } => {
                shell(format!("sleep {:.3}; echo {mark}", time.as_secs_f64()))
            }
            Self::Fail { mark, code, .. } => shell(format!("echo {mark}; exit {code}")),
            Self::Overdue { mark } => shell(format!("echo {mark}; sleep 50")),
            Self::File { mark } => vec![
                Step::write("mark", format!("{mark}\n").into_bytes()),
                Step::command(["cat", "mark"]),
            ],
            Self::Bulk { mark, bytes } => vec![
                Step::write("bulk", vec![b'x'; *bytes]),
                Step::command(["echo", &mark.to_string()]),
            ],
            Self::Marked { mark, time } => shell(format!(
                ": {}; sleep {:.3}; echo {mark}",
                Self::marker(*mark),
                time.as_secs_f64()
            )),
        }
    }

    /// What the command line of a marked task's process holds.
    pub(crate) fn marker(mark: u64) -> String {
        format!("remuda-faults-marked-{mark}")
    }

    /// How often it may be tried at most beside the infrastructure's attempts.
    pub(crate) fn retries(&self) -> u8 {
        match self {
            Self::Fail { retries, .. } => *retries,
            _ => 0,
        }
    }

    pub(crate) fn expected(&self) -> Expected {
        let line = |mark: &u64| format!("{mark}\n").into_bytes();
        let (outcome, code, stdout) = match self {
            Self::Instant { mark }
            | Self::Sleep { mark, .. }
            | Self::File { mark }
            | Self::Bulk { mark, .. }
            | Self::Marked { mark, .. } => (Outcome::Succeeded, Some(0), line(mark)),
            Self::Output { first, last } => {
                let lines = (*first..=*last).flat_map(|n| line(&n));
                (Outcome::Succeeded, Some(0), lines.collect())
            }
            Self::Fail { mark, code, .. } => (Outcome::Failed, Some(*code), line(mark)),
            Self::Overdue { mark } => (Outcome::TimedOut, None, line(mark)),
        };
        Expected {
            outcome,
            code,
            stdout,
        }
    }

    /// The request, with a new id.
    pub(crate) fn request(&self, client: &Client, pool: &PoolId) -> TaskRequest {
        TaskRequest {
            retries: self.retries(),
            timeout_ms: Some(match self {
                Self::Overdue { .. } => 700,
                _ => 30_000,
            }),
            ..client.task(pool, self.steps())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_its_load() {
        let size = Size::default();
        assert_eq!(Plan::new(3, size), Plan::new(3, size));
        assert_ne!(Plan::new(3, size), Plan::new(4, size));
    }

    #[test]
    fn a_load_has_everything_and_keeps_its_time() {
        let size = Size {
            tasks: 300,
            ..Size::default()
        };
        let plan = Plan::new(1, size);
        assert_eq!(plan.tasks.len(), 300);
        assert_eq!(plan.sessions.len(), size.sessions);
        assert!(plan.tasks.iter().all(|task| task.at <= size.over));
        assert!(plan.tasks.is_sorted_by_key(|task| task.at));
        let kinds: BTreeSet<_> = plan
            .tasks
            .iter()
            .map(|task| task.work.expected().outcome.as_str())
            .collect();
        assert_eq!(kinds.len(), 3, "{kinds:?}");
        assert!(plan.tasks.iter().any(|task| task.cancel_after.is_some()));
        assert!(plan.tasks.iter().any(|task| task.twice));
        assert!(plan.tasks.iter().any(|task| task.streamed));
        // Whose output it is can be told.
        let first = |task: &PlannedTask| task.work.expected().stdout[..8].to_vec();
        let marks: BTreeSet<_> = plan.tasks.iter().map(first).collect();
        assert_eq!(marks.len(), 300);
    }

    #[test]
    fn what_is_expected_is_what_the_script_prints() {
        let work = Work::Output { first: 8, last: 11 };
        assert_eq!(work.expected().stdout, b"8\n9\n10\n11\n");
        let run = |work: &Work| {
            let steps = work.steps();
            let StepKind::Command(command) = &steps[steps.len() - 1].action else {
                panic!("no command");
            };
            let words: Vec<_> = command
                .argv
                .iter()
                .map(|word| String::from_utf8_lossy(word.as_slice()).into_owned())
                .collect();
            let output = std::process::Command::new(&words[0])
                .args(&words[1..])
                .output()
                .unwrap();
            (output.stdout, output.status.code())
        };
        for work in [
            work,
            Work::Fail {
                mark: 5,
                code: 7,
                retries: 2,
            },
            Work::Marked {
                mark: 9,
                time: Duration::ZERO,
            },
        ] {
            let expected = work.expected();
            assert_eq!(run(&work), (expected.stdout, expected.code));
        }
    }
}
