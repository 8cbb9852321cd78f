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
    start(name, future, (), tracing::Span::current())
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
        self.start(name, future, tracing::Span::current())
    }

    /// The same outside the caller's span, for what outlives it: a span is not over, and is not
    /// exported, while a task runs in it.
    pub fn spawn_apart<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.start(name, future, tracing::Span::none())
    }

    fn start<F>(&self, name: &'static str, future: F, span: tracing::Span) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let around: Vec<Membership> = self.members.iter().map(|group| group.enter(name)).collect();
        start(name, future, (self.own.enter(name), around), span)
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

fn start<F, G>(
    name: &'static str,
    future: F,
    membership: G,
    span: tracing::Span,
) -> JoinHandle<F::Output>
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
    tokio::spawn(watched.instrument(span))
}

/// What a panic said, for a log line. Payloads other than text say nothing.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(not text)")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::sync::Once;
    use std::time::{Duration, Instant};

    use super::{TaskGroup, spawn};

    const LONG: Duration = Duration::from_secs(10);

    thread_local! {
        static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    /// What was logged on this thread: a test and its tasks run on one, beside other tests.
    struct Log;

    impl Log {
        fn capture() {
            // One subscriber for all: a scoped one may miss call sites that another test met first.
            static INIT: Once = Once::new();
            INIT.call_once(|| {
                let subscriber = tracing_subscriber::fmt()
                    .with_ansi(false)
                    .with_writer(|| Log);
                tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
            });
        }

        fn text() -> String {
            LOG.with_borrow(|log| String::from_utf8(log.clone()).unwrap())
        }
    }

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            LOG.with_borrow_mut(|log| log.extend_from_slice(bytes));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_panic_is_logged_with_the_task_and_its_span_and_spares_the_group() {
        Log::capture();
        let group = TaskGroup::new();
        let span = tracing::info_span!("attempt", task_id = 7);
        let bad = span.in_scope(|| group.spawn("renewer", async { panic!("no {}", "lease") }));
        let good = group.spawn("fetcher", async { 5 });
        let error: tokio::task::JoinError = bad.await.map(|(): ()| ()).unwrap_err();
        assert!(error.is_panic());
        assert_eq!(good.await.unwrap(), 5);
        assert_eq!(group.running(), 0);
        let text = Log::text();
        for part in [
            "ERROR",
            "attempt{task_id=7}",
            "task=\"renewer\"",
            "no lease",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[tokio::test]
    async fn a_task_without_a_group_is_watched_too() {
        Log::capture();
        assert!(
            spawn("alone", async { panic!("boom") })
                .await
                .map(|(): ()| ())
                .is_err()
        );
        let text = Log::text();
        assert!(
            text.contains("task=\"alone\"") && text.contains("boom"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn closing_ends_the_tasks_of_inner_groups_first_and_all() {
        let group = TaskGroup::new();
        let inner = group.child();
        for owner in [&group, &inner] {
            let token = owner.token().clone();
            owner.spawn("loop", async move { token.cancelled().await });
        }
        assert_eq!((group.running(), inner.running()), (2, 1));
        assert!(inner.close_and_wait(LONG).await);
        assert_eq!((group.running(), inner.running()), (1, 0));
        assert!(!group.token().is_cancelled());
        assert!(group.close_and_wait(LONG).await);
    }

    #[tokio::test]
    async fn closing_a_group_waits_for_inner_groups() {
        let group = TaskGroup::new();
        let inner = group.child();
        let (release, wait) = tokio::sync::oneshot::channel::<()>();
        inner.spawn("stubborn", wait);
        assert!(!group.close_and_wait(Duration::from_millis(20)).await);
        assert!(inner.token().is_cancelled());
        release.send(()).unwrap();
        assert!(group.close_and_wait(LONG).await);
    }

    #[tokio::test]
    async fn the_bound_holds_and_names_who_did_not_end() {
        Log::capture();
        let group = TaskGroup::new();
        let stuck = group.spawn("stuck", std::future::pending::<()>());
        group.spawn("brief", async {});
        let began = Instant::now();
        assert!(!group.close_and_wait(Duration::from_millis(30)).await);
        assert!(began.elapsed() >= Duration::from_millis(30));
        assert!(began.elapsed() < LONG);
        let text = Log::text();
        assert!(
            text.contains("stuck (1)") && !text.contains("brief"),
            "{text}"
        );
        stuck.abort();
        assert!(group.wait(LONG).await, "an aborted task has ended");
    }

    #[tokio::test]
    async fn waiting_does_not_cancel() {
        let group = TaskGroup::new();
        assert_eq!(group.spawn("sum", async { 1 + 1 }).await.unwrap(), 2);
        assert!(group.wait(LONG).await);
        assert!(!group.token().is_cancelled());
    }
}
