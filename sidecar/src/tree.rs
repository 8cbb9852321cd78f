//! The process table, and ending whole trees of processes.

use std::collections::{HashMap, HashSet};
use std::fs;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// One line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) group: i32,
    pub(crate) session: i32,
    /// Ended; only its status is left.
    pub(crate) ended: bool,
}

/// Whether processes are this sidecar's to end because it is their init.
pub(crate) fn is_init() -> bool {
    own_pid() == 1
}

fn own_pid() -> i32 {
    Pid::this().as_raw()
}

/// Every process that can be seen. One that ends meanwhile is left out.
pub(crate) fn snapshot() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
        })
        .collect()
}

/// Reads `/proc/<pid>/stat`. The name in it is the process's own choice and
/// may hold parentheses and spaces: what counts comes after the last one.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = std::str::from_utf8(stat.get(after_name..)?)
        .ok()?
        .split_ascii_whitespace();
    let state = fields.next()?;
    let mut number = || fields.next()?.parse().ok();
    Some(Process {
        pid,
        parent: number()?,
        group: number()?,
        session: number()?,
        ended: matches!(state, "Z" | "X"),
    })
}

/// The living processes below `root`, itself left out; `sessions` adds those
/// of the session that `root` leads, and what is below them.
fn below(table: &[Process], root: i32, sessions: bool) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<&Process>> = HashMap::new();
    for process in table {
        children.entry(process.parent).or_default().push(process);
    }
    let mut seen = HashSet::from([root]);
    let mut todo = vec![root];
    let mut found = Vec::new();
    if sessions {
        for process in table.iter().filter(|process| process.session == root) {
            if seen.insert(process.pid) {
                todo.push(process.pid);
                if !process.ended {
                    found.push(process.pid);
                }
            }
        }
    }
    while let Some(parent) = todo.pop() {
        for process in children.get(&parent).into_iter().flatten() {
            if seen.insert(process.pid) {
                todo.push(process.pid);
                if !process.ended {
                    found.push(process.pid);
                }
            }
        }
    }
    found
}

/// The living processes of the sandbox.
pub(crate) fn living() -> Vec<Process> {
    let own = own_pid();
    let table = snapshot();
    if is_init() {
        return table
            .into_iter()
            .filter(|process| process.pid != own && !process.ended)
            .collect();
    }
    let ours: HashSet<i32> = below(&table, own, false).into_iter().collect();
    table
        .into_iter()
        .filter(|process| ours.contains(&process.pid))
        .collect()
}

/// Ends a command that leads its own session and everything it started. The
/// leader must not have been reaped yet.
pub(crate) fn kill_command(leader: i32) {
    end_all(|table| below(table, leader, true), Some(leader));
    send(leader, Signal::SIGKILL);
    // An empty group is no error worth telling.
    let _gone = killpg(Pid::from_raw(leader), Signal::SIGKILL);
}

/// Ends every process of the sandbox, once. Whoever needs them gone waits.
pub(crate) fn kill_below_self() {
    if is_init() {
        let _none_left = kill(Pid::from_raw(-1), Signal::SIGKILL);
    } else {
        let own = own_pid();
        end_all(|table| below(table, own, false), None);
    }
}

/// Stops what is found until a look finds nothing new, then kills it: stopped
/// processes start no others and keep their place in the tree.
fn end_all(find: impl Fn(&[Process]) -> Vec<i32>, leader: Option<i32>) {
    const MOST_ROUNDS: usize = 64;
    let mut stopped = HashSet::new();
    if let Some(leader) = leader {
        send(leader, Signal::SIGSTOP);
    }
    for _ in 0..MOST_ROUNDS {
        let before = stopped.len();
        for pid in find(&snapshot()) {
            if stopped.insert(pid) {
                send(pid, Signal::SIGSTOP);
            }
        }
        if stopped.len() == before {
            break;
        }
    }
    for pid in stopped {
        send(pid, Signal::SIGKILL);
    }
}

fn send(pid: i32, signal: Signal) {
    // It may have ended by itself.
    let _gone = kill(Pid::from_raw(pid), signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        Process {
            pid,
            parent,
            group: session,
            session,
            ended: false,
        }
    }

    #[test]
    fn stat_lines() {
        let expected = Process {
            pid: 7,
            parent: 3,
            group: 4,
            session: 5,
            ended: false,
        };
        for (line, expected) in [
            (&b"7 (sh) S 3 4 5 0 -1"[..], Some(expected)),
            (b"7 (a) R 9 9 9) S 3 4 5 0", Some(expected)),
            (b"7 (\xff\n) S 3 4 5 0", Some(expected)),
            (
                b"7 (x) Z 3 4 5 0",
                Some(Process {
                    ended: true,
                    ..expected
                }),
            ),
            (b"7 (x) S 3 4", None),
            (b"7 x S 3 4 5", None),
            (b"", None),
        ] {
            assert_eq!(parse_stat(7, line), expected, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn trees() {
        let mut table = vec![
            process(1, 0, 1),
            process(10, 1, 10),
            process(11, 10, 10),
            // Left its session, still a child.
            process(12, 11, 12),
            // Its parent ended, still of the session.
            process(13, 1, 10),
            process(14, 13, 14),
            // Another command.
            process(20, 1, 20),
        ];
        table.push(Process {
            ended: true,
            ..process(15, 10, 10)
        });
        let sorted = |mut pids: Vec<i32>| {
            pids.sort_unstable();
            pids
        };
        assert_eq!(sorted(below(&table, 10, true)), [11, 12, 13, 14]);
        assert_eq!(sorted(below(&table, 10, false)), [11, 12]);
        assert_eq!(sorted(below(&table, 1, false)), [10, 11, 12, 13, 14, 20]);
        assert_eq!(below(&table, 99, true), [0_i32; 0]);
        // A table taken while it changed may hold a loop.
        let looped = [process(5, 6, 5), process(6, 5, 5)];
        assert_eq!(sorted(below(&looped, 5, true)), [6]);
    }
}
