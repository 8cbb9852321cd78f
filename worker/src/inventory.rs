//! The sandboxes on this worker, and every decision about them. Pure: handles are carried, never
//! used.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use broker_schema::pool::PoolSpec;
use broker_schema::{Epoch, ErrorCode, PoolId, SandboxId, TenantId};
use remuda_lease::{PoolCount, PoolTarget};

use crate::clock::BootTime;
use crate::reconcile::{Here, Snapshot};

/// All sandboxes. `S` is the handle of an idle one, `H` that of whoever holds a leased one.
#[derive(Debug)]
pub(crate) struct Inventory<S, H> {
    entries: HashMap<SandboxId, Entry<S, H>>,
}

#[derive(Debug)]
struct Entry<S, H> {
    spec: Arc<PoolSpec>,
    state: State<S, H>,
}

#[derive(Debug)]
enum State<S, H> {
    Creating,
    Warm(Warm<S>),
    Leased(Leased<H>),
    Destroying,
}

#[derive(Debug)]
struct Warm<S> {
    sandbox: S,
    /// Redis has it, as far as we know.
    offered: bool,
    /// It is to go as soon as nobody can be given it any more.
    retiring: bool,
}

#[derive(Debug)]
struct Leased<H> {
    holder: H,
    tenant: TenantId,
    epoch: Epoch,
    session: bool,
    /// When the lease can no longer be counted on.
    deadline: BootTime,
}

/// What a placement names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Named<'a> {
    pub(crate) sandbox: SandboxId,
    pub(crate) epoch: Epoch,
    pub(crate) tenant: &'a TenantId,
    /// Whether the task goes to an open session.
    pub(crate) session: bool,
}

/// Where a placement goes.
#[derive(Debug)]
pub(crate) enum Place<S, H> {
    /// Its sandbox was idle and is leased from now on.
    Adopt(S, Arc<PoolSpec>),
    /// To whoever holds the sandbox.
    Queue(H),
    /// It cannot run here: back to the dispatcher.
    HandBack(&'static str),
    /// Its session is not here.
    Gone(ErrorCode, &'static str),
}

/// What the pool loop should do.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) create: Vec<(Arc<PoolSpec>, u32)>,
    /// To be withdrawn and, once that is certain, destroyed.
    pub(crate) retire: Vec<SandboxId>,
}

impl<S, H> Default for Inventory<S, H> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
        }
    }
}

impl<S, H: Clone> Inventory<S, H> {
    /// Compares what is here with what should be. With `keep_none` every idle sandbox goes.
    pub(crate) fn plan(&mut self, targets: &[PoolTarget], keep_none: bool) -> Plan {
        let mut plan = Plan::default();
        let targets = if keep_none { &[][..] } else { targets };
        for target in targets {
            let (mut idle, mut alive) = (0, 0);
            let mut surplus = Vec::new();
            for (id, entry) in &self.entries {
                if entry.spec.name != target.spec.name {
                    continue;
                }
                match &entry.state {
                    State::Destroying => continue,
                    State::Creating if *entry.spec == target.spec => idle += 1,
                    State::Warm(warm) if *entry.spec == target.spec && !warm.retiring => {
                        idle += 1;
                        surplus.push(*id);
                    }
                    _ => {}
                }
                alive += 1;
            }
            let missing = target.warm.saturating_sub(idle);
            let room = target.max.saturating_sub(alive);
            if missing.min(room) > 0 {
                let spec = Arc::new(target.spec.clone());
                plan.create.push((spec, missing.min(room)));
            }
            // The youngest go: the others were offered for longer.
            surplus.sort();
            let too_many = idle.saturating_sub(target.warm) as usize;
            plan.retire.extend(surplus.into_iter().rev().take(too_many));
        }
        for (id, entry) in &mut self.entries {
            let State::Warm(warm) = &mut entry.state else {
                continue;
            };
            let wanted = targets.iter().any(|target| target.spec == *entry.spec);
            warm.retiring |= !wanted || plan.retire.contains(id);
            if warm.retiring && !plan.retire.contains(id) {
                plan.retire.push(*id);
            }
        }
        plan
    }

    pub(crate) fn begin(&mut self, sandbox: SandboxId, spec: Arc<PoolSpec>) {
        let state = State::Creating;
        self.entries.insert(sandbox, Entry { spec, state });
    }

    pub(crate) fn ready(&mut self, id: SandboxId, sandbox: S) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.state = State::Warm(Warm {
                sandbox,
                offered: false,
                retiring: false,
            });
        }
    }

    /// Nothing is left of a sandbox.
    pub(crate) fn gone(&mut self, sandbox: SandboxId) {
        self.entries.remove(&sandbox);
    }

    /// Takes an idle sandbox out to be destroyed.
    pub(crate) fn take_warm(&mut self, sandbox: SandboxId) -> Option<S> {
        let entry = self.entries.get_mut(&sandbox)?;
        match std::mem::replace(&mut entry.state, State::Destroying) {
            State::Warm(warm) => Some(warm.sandbox),
            other => {
                entry.state = other;
                None
            }
        }
    }

    /// Finds the place of a placement; an idle sandbox becomes leased to `holder`.
    pub(crate) fn place(
        &mut self,
        named: Named<'_>,
        incarnation: u32,
        deadline: BootTime,
        holder: impl FnOnce() -> H,
    ) -> Place<S, H> {
        let lost = |code, why| {
            if named.session {
                Place::Gone(code, why)
            } else {
                Place::HandBack(why)
            }
        };
        let Some(entry) = self.entries.get_mut(&named.sandbox) else {
            return lost(ErrorCode::SandboxLost, "the sandbox is not on this worker");
        };
        match &entry.state {
            State::Leased(leased) => {
                let session = named.session && leased.tenant == *named.tenant;
                if session && leased.epoch == named.epoch {
                    Place::Queue(leased.holder.clone())
                } else if session {
                    lost(ErrorCode::StaleEpoch, "the session was under another lease")
                } else {
                    // A stranger learns as much as of a sandbox that never was.
                    lost(ErrorCode::SandboxLost, "the sandbox is not on this worker")
                }
            }
            State::Warm(_) if named.session => {
                lost(ErrorCode::SandboxLost, "the sandbox is not on this worker")
            }
            State::Warm(_) if named.epoch.incarnation() != incarnation => {
                lost(ErrorCode::StaleEpoch, "the lease is of another incarnation")
            }
            State::Warm(_) => {
                let leased = State::Leased(Leased {
                    holder: holder(),
                    tenant: named.tenant.clone(),
                    epoch: named.epoch,
                    session: false,
                    deadline,
                });
                match std::mem::replace(&mut entry.state, leased) {
                    State::Warm(warm) => Place::Adopt(warm.sandbox, entry.spec.clone()),
                    _ => unreachable!("its state was looked at above"),
                }
            }
            State::Creating | State::Destroying => {
                lost(ErrorCode::SandboxLost, "the sandbox is not on this worker")
            }
        }
    }

    /// A leased sandbox is kept for the tasks that follow.
    pub(crate) fn opened(&mut self, sandbox: SandboxId) {
        if let Some(leased) = self.leased_mut(sandbox) {
            leased.session = true;
        }
    }

    /// A leased sandbox takes no more placements and will be destroyed.
    pub(crate) fn end(&mut self, sandbox: SandboxId) {
        if let Some(entry) = self.entries.get_mut(&sandbox) {
            entry.state = State::Destroying;
        }
    }

    fn leased_mut(&mut self, sandbox: SandboxId) -> Option<&mut Leased<H>> {
        match &mut self.entries.get_mut(&sandbox)?.state {
            State::Leased(leased) => Some(leased),
            _ => None,
        }
    }

    fn leased(&self) -> impl Iterator<Item = (SandboxId, &Leased<H>)> {
        let entries = self.entries.iter();
        entries.filter_map(|(id, entry)| match &entry.state {
            State::Leased(leased) => Some((*id, leased)),
            _ => None,
        })
    }

    /// What is to be renewed.
    pub(crate) fn leases(&self) -> Vec<(SandboxId, Epoch)> {
        self.leased()
            .map(|(id, leased)| (id, leased.epoch))
            .collect()
    }

    pub(crate) fn renewed(&mut self, sandbox: SandboxId, epoch: Epoch, deadline: BootTime) {
        if let Some(leased) = self.leased_mut(sandbox)
            && leased.epoch == epoch
        {
            leased.deadline = leased.deadline.max(deadline);
        }
    }

    /// Whether a lease can be counted on at `now`.
    pub(crate) fn holds(&self, sandbox: SandboxId, epoch: Epoch, now: BootTime) -> bool {
        let found = self.leased().find(|(id, _)| *id == sandbox);
        found.is_some_and(|(_, leased)| leased.epoch == epoch && leased.deadline > now)
    }

    /// Who holds this sandbox under this epoch.
    pub(crate) fn holder(&self, sandbox: SandboxId, epoch: Epoch) -> Option<H> {
        match &self.entries.get(&sandbox)?.state {
            State::Leased(leased) if leased.epoch == epoch => Some(leased.holder.clone()),
            _ => None,
        }
    }

    /// Everybody who holds a sandbox.
    pub(crate) fn holders(&self) -> Vec<H> {
        self.leased()
            .map(|(_, leased)| leased.holder.clone())
            .collect()
    }

    /// Holders whose lease can no longer be counted on.
    pub(crate) fn overdue(&self, now: BootTime) -> Vec<H> {
        let overdue = self.leased().filter(|(_, leased)| leased.deadline <= now);
        overdue.map(|(_, leased)| leased.holder.clone()).collect()
    }

    pub(crate) fn next_deadline(&self) -> Option<BootTime> {
        self.leased().map(|(_, leased)| leased.deadline).min()
    }

    /// Everything idle is to be offered again.
    pub(crate) fn forget_offers(&mut self) {
        for entry in self.entries.values_mut() {
            if let State::Warm(warm) = &mut entry.state {
                warm.offered = false;
            }
        }
    }

    /// These are to be offered again.
    pub(crate) fn forget_offers_of(&mut self, sandboxes: &[SandboxId]) {
        for id in sandboxes {
            if let Some(Entry {
                state: State::Warm(warm),
                ..
            }) = self.entries.get_mut(id)
            {
                warm.offered = false;
            }
        }
    }

    /// What is here now, as the registry should know it.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let entries = self.entries.iter();
        entries
            .map(|(id, entry)| {
                let here = match &entry.state {
                    State::Warm(warm) if warm.retiring => Here::Retiring,
                    State::Warm(_) => Here::Warm,
                    State::Leased(leased) => Here::Leased(leased.epoch),
                    State::Creating | State::Destroying => Here::Unusable,
                };
                (*id, here)
            })
            .collect()
    }

    /// Idle sandboxes that Redis does not have, by pool.
    pub(crate) fn to_offer(&self) -> BTreeMap<PoolId, Vec<SandboxId>> {
        let mut pools = BTreeMap::<PoolId, Vec<SandboxId>>::new();
        for (id, entry) in &self.entries {
            if let State::Warm(warm) = &entry.state
                && !warm.offered
                && !warm.retiring
            {
                pools.entry(entry.spec.name.clone()).or_default().push(*id);
            }
        }
        pools
    }

    pub(crate) fn offered(&mut self, sandboxes: &[SandboxId]) {
        for id in sandboxes {
            if let Some(Entry {
                state: State::Warm(warm),
                ..
            }) = self.entries.get_mut(id)
            {
                warm.offered = true;
            }
        }
    }

    /// The idle ones for which `dead` says so.
    pub(crate) fn dead(&self, mut dead: impl FnMut(&S) -> bool) -> Vec<SandboxId> {
        let mut found = Vec::new();
        for (id, entry) in &self.entries {
            if let State::Warm(warm) = &entry.state
                && dead(&warm.sandbox)
            {
                found.push(*id);
            }
        }
        found
    }

    /// Marks a sandbox so that it goes as soon as it can be withdrawn.
    pub(crate) fn retire(&mut self, sandbox: SandboxId) {
        if let Some(Entry {
            state: State::Warm(warm),
            ..
        }) = self.entries.get_mut(&sandbox)
        {
            warm.retiring = true;
        }
    }

    pub(crate) fn counts(&self) -> BTreeMap<PoolId, PoolCount> {
        let mut counts = BTreeMap::<PoolId, PoolCount>::new();
        for entry in self.entries.values() {
            let count = counts.entry(entry.spec.name.clone()).or_default();
            match entry.state {
                State::Warm(_) => count.warm += 1,
                State::Leased(_) => count.leased += 1,
                State::Creating | State::Destroying => {}
            }
        }
        counts
    }

    /// Sandboxes by state, for gauges: creating, warm, leased, session, destroying.
    pub(crate) fn by_state(&self) -> [u32; 5] {
        let mut states = [0; 5];
        for entry in self.entries.values() {
            let at = match &entry.state {
                State::Creating => 0,
                State::Warm(_) => 1,
                State::Leased(leased) if !leased.session => 2,
                State::Leased(_) => 3,
                State::Destroying => 4,
            };
            states[at] += 1;
        }
        states
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
