//! Runs the script of one fake command.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use remuda_proto::v1::execute_event::Event;
use remuda_proto::{code, v1};
use tokio::sync::{mpsc, watch};

use super::{Shared, refused};
use crate::sidecar_client::CallError;

/// Output of one piece of a flood.
const PIECE: usize = 32 * 1024;
const KILLED: i32 = 9;
const CALL: &str = "Execute";

pub(super) struct Run {
    pub(super) pid: i32,
    pub(super) request: v1::ExecuteRequest,
    pub(super) events: mpsc::Sender<Result<Event, CallError>>,
    pub(super) signals: watch::Receiver<i32>,
}

/// Why a script stopped.
enum Stop {
    Exit(i32),
    Signal(i32),
    TimedOut,
    /// Nobody listens any more, or the sandbox has ended: no exit is told.
    Gone,
    NotFound(String),
    /// Its exit makes no sense.
    Garbled,
    /// Its time is over, and it cannot be killed.
    Immortal,
}

/// What was written to one stream.
#[derive(Default)]
struct Written {
    bytes: u64,
    dropped: u64,
}

impl Written {
    /// What is within the limit of `data`.
    fn keep(&mut self, mut data: Bytes, limit: u64) -> Bytes {
        let room = limit.saturating_sub(self.bytes - self.dropped);
        self.bytes += data.len() as u64;
        let kept = room.min(data.len() as u64);
        self.dropped += data.len() as u64 - kept;
        data.truncate(kept as usize);
        data
    }
}

impl Run {
    pub(super) async fn run(mut self, shared: &Shared) {
        let started = Instant::now();
        let begun = Event::Started(v1::Started {
            pid: self.pid,
            unix_nanos: unix_nanos(),
        });
        if self.events.send(Ok(begun)).await.is_err() {
            return;
        }
        let mut streams = [Written::default(), Written::default()];
        let stop = self.until_stopped(shared, &mut streams).await;
        let mut exited = v1::Exited::default();
        match stop {
            Stop::Gone => return,
            Stop::Exit(code) => exited.code = code,
            Stop::Signal(signal) => (exited.code, exited.signal) = (128 + signal, signal),
            Stop::TimedOut => {
                (exited.code, exited.signal) = (128 + KILLED, KILLED);
                exited.timed_out = true;
            }
            Stop::NotFound(why) => (exited.code, exited.spawn_error) = (127, why),
            Stop::Garbled => {
                let reason = "an event without content".to_owned();
                return self.fail(CallError::Nonsense { call: CALL, reason }).await;
            }
            Stop::Immortal => {
                let message = "processes outlived SIGKILL for 5 s";
                return self.fail(refused(CALL, code::KILL_FAILED, message)).await;
            }
        }
        [exited.stdout_bytes, exited.stderr_bytes] = [0, 1].map(|at: usize| streams[at].bytes);
        [exited.stdout_dropped, exited.stderr_dropped] =
            [0, 1].map(|at: usize| streams[at].dropped);
        exited.wall_micros = started.elapsed().as_micros() as u64;
        exited.unix_nanos = unix_nanos();
        // Who has stopped listening does not want to know.
        let _ = self.events.send(Ok(Event::Exited(exited))).await;
    }

    async fn fail(&self, error: CallError) {
        let _ = self.events.send(Err(error)).await;
    }

    async fn until_stopped(&mut self, shared: &Shared, streams: &mut [Written; 2]) -> Stop {
        let mut signals = self.signals.clone();
        let events = self.events.clone();
        let timeout = match self.request.timeout_ms {
            0 => Duration::from_secs(365 * 24 * 3600),
            millis => Duration::from_millis(millis),
        };
        tokio::select! {
            biased;
            () = shared.died.cancelled() => Stop::Gone,
            () = events.closed() => Stop::Gone,
            signal = signals.wait_for(|signal| *signal != 0) => {
                signal.map_or(Stop::Gone, |signal| Stop::Signal(*signal))
            }
            () = strike(shared, timeout) => self.out_of_time(),
            stop = self.script(shared, streams) => stop,
        }
    }

    fn out_of_time(&self) -> Stop {
        if self.request.argv.iter().any(|word| word == "fake:immortal") {
            Stop::Immortal
        } else {
            Stop::TimedOut
        }
    }

    async fn script(&self, shared: &Shared, streams: &mut [Written; 2]) -> Stop {
        let mut words = self.request.argv.iter();
        while let Some(word) = words.next() {
            let mut argument = || words.next().cloned().unwrap_or_default();
            let text = String::from_utf8_lossy(word);
            match text.as_ref() {
                "true" | "/bin/true" => return Stop::Exit(0),
                "false" | "/bin/false" => return Stop::Exit(1),
                "fake:exit" => return Stop::Exit(number(&argument()) as i32),
                "fake:signal" => return Stop::Signal(number(&argument()) as i32),
                "fake:sleep" => {
                    tokio::time::sleep(Duration::from_millis(number(&argument()))).await;
                }
                "fake:print" => self.write(0, argument(), streams).await,
                "fake:error" => self.write(1, argument(), streams).await,
                "fake:cat" => self.write(0, self.request.stdin.clone(), streams).await,
                "fake:env" => {
                    let value = self.env(&argument());
                    self.write(0, value, streams).await;
                }
                "fake:pwd" => {
                    let dir = match self.request.work_dir.as_ref() {
                        b"" => Bytes::from_static(b"/workspace"),
                        _ => self.request.work_dir.clone(),
                    };
                    self.write(0, dir, streams).await;
                }
                "fake:flood" => self.flood(number(&argument()), streams).await,
                "fake:host-oom" => {
                    shared.oom_kills.fetch_add(1, Ordering::SeqCst);
                    return Stop::Signal(KILLED);
                }
                "fake:hang" => {
                    shared.hung.store(true, Ordering::SeqCst);
                    return std::future::pending().await;
                }
                "fake:immortal" => std::future::pending().await,
                "fake:garble" => {
                    shared.garbled.store(true, Ordering::SeqCst);
                    return Stop::Garbled;
                }
                "fake:oom" => {
                    shared.limit_hits.fetch_add(1, Ordering::SeqCst);
                    shared.oom_kills.fetch_add(1, Ordering::SeqCst);
                    return Stop::Signal(KILLED);
                }
                "fake:die" => {
                    shared.died.cancel();
                    return Stop::Gone;
                }
                other => return Stop::NotFound(format!("{other}: not found")),
            }
        }
        Stop::Exit(0)
    }

    fn env(&self, name: &[u8]) -> Bytes {
        let entries = self.request.env.iter();
        let found = entries.rev().find_map(|entry| {
            let rest = entry.strip_prefix(name)?.strip_prefix(b"=")?;
            Some(Bytes::copy_from_slice(rest))
        });
        found.unwrap_or_default()
    }

    async fn flood(&self, bytes: u64, streams: &mut [Written; 2]) {
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(PIECE as u64) as usize;
            self.write(0, Bytes::from(vec![b'x'; piece]), streams).await;
            left -= piece as u64;
        }
    }

    async fn write(&self, stream: usize, data: Bytes, streams: &mut [Written; 2]) {
        let kept = streams[stream].keep(data, self.request.output_limit);
        if kept.is_empty() {
            // Every piece must let the others run, the time-out above all.
            tokio::task::yield_now().await;
            return;
        }
        let event = match stream {
            0 => Event::Stdout(kept),
            _ => Event::Stderr(kept),
        };
        // A listener that has gone is noticed above.
        let _ = self.events.send(Ok(event)).await;
    }
}

/// The end of a command's time, which one that hangs does not notice.
async fn strike(shared: &Shared, after: Duration) {
    tokio::time::sleep(after).await;
    if shared.hung.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
}

fn number(text: &[u8]) -> u64 {
    String::from_utf8_lossy(text).parse().unwrap_or(0)
}

fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}
