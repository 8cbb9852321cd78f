//! Redis: each method is one script of `src/scripts/`, line for line where it matters.
//!
//! There is no clock: a lease is `live` until an event says that it ran out, and that event may
//! come at any time, which is what a clock that is wrong looks like.

use crate::state::{Epoch, Grant, SandboxId, TASKS, WORKERS};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Record {
    Warm {
        incarnation: u8,
    },
    Leased {
        epoch: Epoch,
        live: bool,
        task: usize,
    },
}

/// A task's record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Claimed {
    pub(crate) attempts: u8,
    pub(crate) cancelled: bool,
    pub(crate) finished: bool,
    pub(crate) lease: Option<(SandboxId, Epoch)>,
    /// The dispatcher whose present nonce this claim was made under.
    pub(crate) nonce: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Redis {
    /// 0 where there is none.
    pub(crate) incarnation: u8,
    /// Whether it was put in force in the process that runs.
    pub(crate) in_force: bool,
    pub(crate) counter: u8,
    /// Workers with a heartbeat that has not run out.
    pub(crate) alive: [bool; WORKERS],
    /// Workers that the reaper is told of.
    pub(crate) dead: [bool; WORKERS],
    pub(crate) sandboxes: Vec<(SandboxId, Record)>,
    pub(crate) tasks: [Claimed; TASKS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    Granted(Grant),
    NoneWarm,
    Busy,
    Cancelled,
    Finished,
    Exhausted,
    NoIncarnation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cancel {
    Finished,
    Unplaced,
    Placed,
}

impl Redis {
    pub(crate) fn empty() -> Self {
        Self {
            incarnation: 0,
            in_force: false,
            counter: 0,
            alive: [false; WORKERS],
            dead: [false; WORKERS],
            sandboxes: Vec::new(),
            tasks: [Claimed::default(); TASKS],
        }
    }

    pub(crate) fn record(&self, sandbox: SandboxId) -> Option<Record> {
        let place = self.place(sandbox)?;
        Some(self.sandboxes[place].1)
    }

    fn place(&self, sandbox: SandboxId) -> Option<usize> {
        self.sandboxes.iter().position(|(id, _)| *id == sandbox)
    }

    pub(crate) fn set(&mut self, sandbox: SandboxId, record: Record) {
        match self.place(sandbox) {
            Some(place) => self.sandboxes[place].1 = record,
            None => self.sandboxes.push((sandbox, record)),
        }
        self.sandboxes.sort_unstable();
    }

    fn forget(&mut self, sandbox: SandboxId) {
        self.sandboxes.retain(|(id, _)| *id != sandbox);
    }

    /// `holds` and `leased` of prelude.lua.
    pub(crate) fn held(&self, sandbox: SandboxId, epoch: Epoch) -> bool {
        matches!(
            self.record(sandbox),
            Some(Record::Leased { epoch: held, live: true, .. }) if held == epoch
        )
    }

    /// The live lease that a task's claim names.
    pub(crate) fn live_claim(&self, task: usize) -> Option<(SandboxId, Epoch)> {
        let (sandbox, epoch) = self.tasks[task].lease?;
        let record = self.record(sandbox)?;
        let ours = matches!(
            record,
            Record::Leased { epoch: held, live: true, task: of } if held == epoch && of == task
        );
        (ours && self.alive[sandbox.worker]).then_some((sandbox, epoch))
    }

    /// Sandboxes that `pick` of claim.lua may hand out; it takes the oldest, which may be any.
    pub(crate) fn warm(&self) -> impl Iterator<Item = SandboxId> {
        self.sandboxes
            .iter()
            .filter(|(id, record)| {
                let incarnation = self.incarnation;
                *record == Record::Warm { incarnation } && self.alive[id.worker]
            })
            .map(|(id, _)| *id)
    }

    /// claim.lua. `pick` chooses among the warm ones.
    pub(crate) fn claim(
        &mut self,
        task: usize,
        most: u8,
        nonce: usize,
        again: bool,
        pick: Option<SandboxId>,
    ) -> Claim {
        if self.incarnation == 0 || !self.in_force {
            return Claim::NoIncarnation;
        }
        let claimed = self.tasks[task];
        if claimed.cancelled {
            return Claim::Cancelled;
        }
        if claimed.finished && !again {
            return Claim::Finished;
        }
        if let Some((sandbox, epoch)) = self.live_claim(task) {
            if claimed.nonce == Some(nonce) {
                let attempt = claimed.attempts;
                return Claim::Granted(Grant {
                    sandbox,
                    epoch,
                    attempt,
                });
            }
            return Claim::Busy;
        }
        if let Some((sandbox, _)) = claimed.lease
            && matches!(self.record(sandbox), Some(Record::Leased { task: of, .. }) if of == task)
        {
            self.forget(sandbox);
        }
        if claimed.attempts >= most {
            return Claim::Exhausted;
        }
        let Some(sandbox) = pick else {
            return Claim::NoneWarm;
        };
        self.counter += 1;
        Claim::Granted(self.write_grant(task, nonce, sandbox, self.counter, claimed.attempts + 1))
    }

    /// The last lines of claim.lua.
    pub(crate) fn write_grant(
        &mut self,
        task: usize,
        nonce: usize,
        sandbox: SandboxId,
        counter: u8,
        attempt: u8,
    ) -> Grant {
        let epoch = Epoch {
            incarnation: self.incarnation,
            counter,
        };
        self.counter = counter;
        let live = true;
        self.set(sandbox, Record::Leased { epoch, live, task });
        self.tasks[task] = Claimed {
            attempts: attempt,
            finished: false,
            lease: Some((sandbox, epoch)),
            nonce: Some(nonce),
            ..self.tasks[task]
        };
        Grant {
            sandbox,
            epoch,
            attempt,
        }
    }

    /// A dispatcher has a new nonce: what it claimed before is nobody's any more.
    pub(crate) fn new_nonce(&mut self, dispatcher: usize) {
        for claimed in &mut self.tasks {
            if claimed.nonce == Some(dispatcher) {
                claimed.nonce = None;
            }
        }
    }

    pub(crate) fn swap_nonces(&mut self) {
        for claimed in &mut self.tasks {
            claimed.nonce = claimed.nonce.map(|dispatcher| 1 - dispatcher);
        }
    }

    /// unclaim.lua.
    pub(crate) fn unclaim(&mut self, task: usize, nonce: usize, grant: Grant) {
        let claimed = &mut self.tasks[task];
        if claimed.nonce != Some(nonce) || claimed.lease != Some((grant.sandbox, grant.epoch)) {
            return;
        }
        claimed.lease = None;
        claimed.nonce = None;
        self.expire(grant.sandbox);
    }

    /// finish.lua; `task` is what has its terminal.
    pub(crate) fn finish(&mut self, sandbox: SandboxId, epoch: Epoch, task: Option<usize>) {
        if let Some(task) = task {
            let claimed = &mut self.tasks[task];
            if claimed.lease == Some((sandbox, epoch)) {
                claimed.lease = None;
                claimed.nonce = None;
                claimed.cancelled = false;
                claimed.finished = true;
            }
        }
        if matches!(self.record(sandbox), Some(Record::Leased { epoch: held, .. }) if held == epoch)
        {
            self.forget(sandbox);
        }
    }

    /// A lease's time is over.
    pub(crate) fn expire(&mut self, sandbox: SandboxId) {
        if let Some(Record::Leased { epoch, task, .. }) = self.record(sandbox) {
            let live = false;
            self.set(sandbox, Record::Leased { epoch, live, task });
        }
    }

    /// cancel.lua.
    pub(crate) fn cancel(&mut self, task: usize) -> Cancel {
        if self.tasks[task].finished {
            return Cancel::Finished;
        }
        self.tasks[task].cancelled = true;
        match self.live_claim(task) {
            Some(_) => Cancel::Placed,
            None => Cancel::Unplaced,
        }
    }

    /// offer.lua, after heartbeat.lua under the incarnation in force.
    pub(crate) fn offer(&mut self, sandbox: SandboxId) {
        let incarnation = self.incarnation;
        let keep = match self.record(sandbox) {
            Some(Record::Leased { live, .. }) => live,
            Some(Record::Warm { incarnation: of }) => of == incarnation,
            None => false,
        };
        if !keep {
            self.set(sandbox, Record::Warm { incarnation });
        }
    }

    /// reap.lua for one worker.
    pub(crate) fn reap(&mut self, worker: usize) {
        self.sandboxes.retain(|(id, _)| id.worker != worker);
        self.alive[worker] = false;
        self.dead[worker] = true;
    }

    /// The script `install_incarnation.lua`.
    pub(crate) fn install(&mut self, candidate: u8) {
        if !(self.incarnation != 0 && self.in_force) && candidate > self.incarnation {
            self.incarnation = candidate;
            self.in_force = true;
            self.counter = 0;
        }
    }
}
