//! Live copies of terminals: one subscription per run, handed out by task.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use broker_schema::{ParsedSubject, RunId, Subjects, TaskId, TenantId, Terminal, codec};
use futures::StreamExt as _;
use remuda_telemetry::TaskGroup;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::broker::{Broker, BrokerError, format_of};

/// Runs whose subscription is kept although nobody waits.
const IDLE_RUNS: usize = 64;

type Slot = watch::Sender<Option<Arc<Terminal>>>;
type Slots = Arc<Mutex<HashMap<TaskId, Slot>>>;

/// The subscriptions of a client.
#[derive(Debug)]
pub(crate) struct Listeners {
    broker: Broker,
    tenant: TenantId,
    tasks: TaskGroup,
    runs: Mutex<HashMap<RunId, Arc<Listener>>>,
}

#[derive(Debug)]
struct Listener {
    slots: Slots,
    _stop: DropGuard,
}

/// A place for the terminal of one task.
#[derive(Debug)]
pub(crate) struct Ticket {
    task: TaskId,
    listener: Arc<Listener>,
    receiver: watch::Receiver<Option<Arc<Terminal>>>,
}

impl Listeners {
    pub(crate) fn new(broker: Broker, tenant: TenantId, tasks: TaskGroup) -> Self {
        Self {
            broker,
            tenant,
            tasks,
            runs: Mutex::default(),
        }
    }

    /// Listens for a task's terminal. What is published on this connection
    /// afterwards cannot overtake the subscription.
    pub(crate) async fn ticket(&self, run: &RunId, task: TaskId) -> Result<Ticket, BrokerError> {
        let known = lock(&self.runs).get(run).cloned();
        let listener = match known {
            Some(listener) => listener,
            None => self.listen(run).await?,
        };
        let receiver = lock(&listener.slots)
            .entry(task)
            .or_insert_with(|| Slot::new(None))
            .subscribe();
        Ok(Ticket {
            task,
            listener,
            receiver,
        })
    }

    async fn listen(&self, run: &RunId) -> Result<Arc<Listener>, BrokerError> {
        let subjects = self.broker.subjects();
        let subject = subjects.live(&subjects.terminals_of_run(&self.tenant, run));
        let mut subscriber = self
            .broker
            .nats()
            .subscribe(subject.clone())
            .await
            .map_err(|error| BrokerError::Subscribe {
                subject,
                source: error.into(),
            })?;
        let mut runs = lock(&self.runs);
        if let Some(other) = runs.get(run) {
            return Ok(Arc::clone(other));
        }
        if runs.len() >= IDLE_RUNS {
            runs.retain(|_, listener| Arc::strong_count(listener) > 1);
        }
        let slots = Slots::default();
        let stop: CancellationToken = self.tasks.token().child_token();
        let listener = Arc::new(Listener {
            slots: Arc::clone(&slots),
            _stop: stop.clone().drop_guard(),
        });
        runs.insert(run.clone(), Arc::clone(&listener));
        drop(runs);
        let subjects = subjects.clone();
        let _handle = self.tasks.spawn_apart("live terminals", async move {
            let hand_out = async {
                while let Some(message) = subscriber.next().await {
                    deliver(&subjects, &slots, &message);
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = hand_out => {}
            }
        });
        Ok(listener)
    }
}

/// Hands a live copy to whoever waits for it. What cannot be read is left to
/// the direct get, whose error somebody sees.
fn deliver(subjects: &Subjects, slots: &Slots, message: &async_nats::Message) {
    let Some(task) = task_of(subjects, &message.subject) else {
        return;
    };
    let Some(slot) = lock(slots).get(&task).cloned() else {
        return;
    };
    let decoded = format_of(message.headers.as_ref())
        .and_then(|format| codec::decode::<Terminal>(&message.payload, format));
    match decoded {
        Ok(terminal) if terminal.task == task => {
            slot.send_replace(Some(Arc::new(terminal)));
        }
        Ok(_) => tracing::debug!(%task, "live terminal names another task"),
        Err(error) => tracing::debug!(%task, %error, "live terminal cannot be read"),
    }
}

fn task_of(subjects: &Subjects, live: &str) -> Option<TaskId> {
    let prefix = subjects.prefix();
    let rest = live.strip_prefix(prefix)?.strip_prefix(".live")?;
    match subjects.parse(&format!("{prefix}{rest}"))? {
        ParsedSubject::Terminal { task, .. } => Some(task),
        _ => None,
    }
}

impl Ticket {
    /// Waits for the live copy. Dropping the future loses nothing.
    pub(crate) async fn arrived(&mut self) -> Arc<Terminal> {
        let arrived = self.receiver.wait_for(Option::is_some).await;
        let terminal = arrived
            .ok()
            .and_then(|terminal| terminal.as_ref().map(Arc::clone));
        match terminal {
            Some(terminal) => terminal,
            // Nobody sends any more; the direct get still answers.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut slots = lock(&self.listener.slots);
        // This ticket's own receiver is still counted.
        if slots
            .get(&self.task)
            .is_some_and(|slot| slot.receiver_count() <= 1)
        {
            slots.remove(&self.task);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_subject_names_its_task() {
        let subjects = Subjects::default();
        let task = TaskId::new();
        assert_eq!(
            task_of(&subjects, &format!("remuda.live.term.t.r.{task}")),
            Some(task)
        );
        for other in [
            format!("remuda.live.res.t.r.{task}"),
            format!("remuda.term.t.r.{task}"),
            "remuda.live.term.t.r.x".to_owned(),
        ] {
            assert_eq!(task_of(&subjects, &other), None, "{other}");
        }
    }
}
