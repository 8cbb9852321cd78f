//! Named, tracked tasks. The only place that starts a task on the runtime, so that every task
//! carries its span, a panic names the task it ended, and a shutdown knows what it waits for.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

/// Starts a task that belongs to no group. A panic in it is logged with `name`, then seen by
/// whoever awaits the handle. The task runs on in the caller's span.
///
/// Like every way to start a task it must be called inside a runtime.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    start(name, future, ())
}

/// Tasks that are stopped and waited for together. Clones are the same group.
#[derive(Clone, Debug, Default)]
pub struct TaskGroup {
    token: CancellationToken,
    /// This group's own members last, those of the groups around it before.
    members: Vec<Members>,
    own: Members,
}

impl TaskGroup {
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the group, or one around it, is told to stop.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// A group inside this one: it can be stopped alone, is stopped with this one, and this one
    /// waits for its tasks too.
    #[must_use]
    pub fn child(&self) -> Self {
        let mut members = self.members.clone();
        members.push(self.own.clone());
        Self {
            token: self.token.child_token(),
            members,
            own: Members::default(),
        }
    }

    /// Starts a task of this group. A panic in it is logged with `name`, then seen by whoever
    /// awaits the handle; the rest of the group goes on.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let around: Vec<Membership> = self.members.iter().map(|group| group.enter(name)).collect();
        start(name, future, (self.own.enter(name), around))
    }

    /// How many tasks have not ended, those of inner groups included.
    pub fn running(&self) -> usize {
        self.own.tracker.len()
    }

    /// Tells every task to stop. They end when they heed their token.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Tells every task to stop and waits until all have ended, at most `bound`. True when all
    /// have; otherwise the names of those that have not are logged. They are left running: a task
    /// that does not heed its token holds something that only its owner can let go of.
    pub async fn close_and_wait(&self, bound: Duration) -> bool {
        self.cancel();
        self.wait(bound).await
    }

    /// Waits until all tasks have ended by themselves, at most `bound`. True when all have.
    pub async fn wait(&self, bound: Duration) -> bool {
        self.own.tracker.close();
        let ended = tokio::time::timeout(bound, self.own.tracker.wait())
            .await
            .is_ok();
        // A group may be used again after a wait: a drain is followed by a close.
        self.own.tracker.reopen();
        if !ended {
            tracing::warn!(
                tasks = %self.own.names(),
                bound_ms = bound.as_millis() as u64,
                "tasks did not end in time"
            );
        }
        ended
    }
}

/// Who runs in one group: the tracker says when all have ended, the names say who has not.
#[derive(Clone, Debug, Default)]
struct Members {
    tracker: TaskTracker,
    names: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

impl Members {
    fn enter(&self, name: &'static str) -> Membership {
        *self.lock().entry(name).or_insert(0) += 1;
        Membership {
            name,
            group: self.clone(),
            _token: self.tracker.token(),
        }
    }

    fn leave(&self, name: &'static str) {
        let mut names = self.lock();
        if let Some(count) = names.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                names.remove(name);
            }
        }
    }

    fn names(&self) -> String {
        let names: Vec<String> = self
            .lock()
            .iter()
            .map(|(name, count)| format!("{name} ({count})"))
            .collect();
        names.join(", ")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held by a running task; its name is taken back before the tracker counts it as ended.
struct Membership {
    name: &'static str,
    group: Members,
    _token: tokio_util::task::task_tracker::TaskTrackerToken,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.group.leave(self.name);
    }
}

fn start<F, G>(name: &'static str, future: F, membership: G) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
    G: Send + 'static,
{
    let watched = async move {
        let outcome = AssertUnwindSafe(future).catch_unwind().await;
        // A caller that sees the handle ready also sees the group without this task.
        drop(membership);
        match outcome {
            Ok(output) => output,
            Err(panic) => {
                tracing::error!(task = name, panic = panic_text(&*panic), "task panicked");
                std::panic::resume_unwind(panic)
            }
        }
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that starts tasks; everything else goes through it"
    )]
    tokio::spawn(watched.in_current_span())
}

/// What a panic said, for a log line. Payloads other than text say nothing.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(not text)")
}
