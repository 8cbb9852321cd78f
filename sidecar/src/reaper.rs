//! Takes the status of every child that ended, the orphans' too, and hands
//! those of commands to who waits for them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tokio::sync::{Notify, oneshot};

use crate::sys::spawn::{Plan, spawn};
use crate::sys::{Reaped, Waited, wait_any};

#[derive(Debug, Default)]
pub(crate) struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Reaped>>>,
    reaped: Notify,
}

impl Reaper {
    /// Starts a command. The look for ended children runs on the same thread,
    /// so none can come between the fork and the entry in the table.
    pub(crate) fn spawn(&self, plan: &Plan<'_>) -> Result<(i32, oneshot::Receiver<Reaped>), Errno> {
        let mut waiting = self.waiting();
        let pid = spawn(plan)?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(pid, sender);
        Ok((pid, receiver))
    }

    /// Takes every status there is. `false` when no child is left at all.
    pub(crate) fn reap(&self) -> bool {
        let mut waiting = self.waiting();
        loop {
            match wait_any() {
                Waited::Ended(pid, reaped) => {
                    if let Some(sender) = waiting.remove(&pid) {
                        // Nobody waits for a cancelled command.
                        let _cancelled = sender.send(reaped);
                    }
                    self.reaped.notify_waiters();
                }
                Waited::StillRunning => return true,
                Waited::NoChildren => return false,
            }
        }
    }

    /// Whether the command is alive and was started here.
    pub(crate) fn runs(&self, pid: i32) -> bool {
        self.waiting().contains_key(&pid)
    }

    /// Waits until some child was reaped.
    pub(crate) async fn changed(&self) {
        self.reaped.notified().await;
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Reaped>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
