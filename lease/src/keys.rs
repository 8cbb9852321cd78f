//! The layout of the keys. Scripts build them; this page is what they follow.
//!
//! All keys begin with a root, `{<prefix>}`: the braces keep them in one slot of a cluster.
//!
//! | key | type | holds |
//! | --- | --- | --- |
//! | `incarnation` | string | the incarnation in force; absent in a Redis that is new or was flushed |
//! | `server` | string | `run_id` of the process that it was put in force in: another one grants nothing under it |
//! | `counter` | string | low half of the last epoch; begins at 0 with each incarnation |
//! | `workers` | sorted set | worker → milliseconds of its last heartbeat, by Redis's clock |
//! | `worker:<worker>` | hash | `record` (JSON), `incarnation`, `draining`, `process` that it is |
//! | `held:<worker>` | set | its sandboxes, warm and leased |
//! | `targets:<worker>` | hash | pool → `warm:max` |
//! | `pools` | hash | pool → its spec (JSON) |
//! | `warm:<pool>` | sorted set | warm sandbox → milliseconds when it was offered |
//! | `sandbox:<sandbox>` | hash | `worker`, `pool`, `state` (`warm`, `leased`), `incarnation`; of a lease also `counter`, `until`, `tenant`, `run`, `task`, `attempt`, `nonce`, and where it has one `group`, of a session's `session` |
//! | `task:<tenant>:<task>` | hash | `digest`, `attempts`, `cancelled`, `finished`; of a live claim also `sandbox`, `incarnation`, `counter`, `nonce` |
//! | `schema` | string | `oldest:newest`: schema versions of workers that the fleet takes |
//! | `leased:<pool>` | sorted set | leased sandbox → when its lease runs out |
//! | `use:<tenant>:sandboxes`, `…:running`, `…:sessions` | sorted set | the same for one tenant: all its leases, those with a task, those of sessions |
//! | `stop:<tenant>:<run>`, `stop:<tenant>:<run>:<group>` | string | why the run or the group was cancelled |
//! | `valid:<tenant>:<run>:<group>` | set | tasks of a group that ended with a valid result, where it asks for a number of them |
//! | `credit` | hash | pool → its last credit (JSON), for people |
//! | `refused` | hash | what was refused (`heartbeat`, `renewal`, `release`) → how often |
//! | `removals` | sorted set | `tenant/run/task` → when its results may be removed |
//! | `dead` | sorted set | dead worker → when to tell of it again |
//! | `dispatchers` | sorted set | dispatcher → milliseconds when it was last heard of |
//! | `leader:<pool>` | hash | `dispatcher`, `incarnation` and `counter` of its term, `until`, `ttl` |
//! | `terms` | string | low half of the last term |
//!
//! Only task records, flags and the counts of groups expire by themselves; everything else goes with its worker.

use std::time::Duration;

/// How long a claimed task's record is kept without being finished: as long as its terminal
/// would be.
pub(crate) const CLAIMED_FOR: Duration = Duration::from_secs(72 * 3600);
/// How long a finished task's record is kept. It only spares a look at the terminal, which
/// carries the digest too, so it need not outlive the memory for message ids by much.
pub(crate) const FINISHED_FOR: Duration = Duration::from_secs(15 * 60);
/// How long a cancellation waits for a task that was never claimed.
pub(crate) const CANCELLED_FOR: Duration = Duration::from_secs(6 * 3600);
/// How long a cancelled run or group takes no more tasks.
pub(crate) const STOPPED_FOR: Duration = CANCELLED_FOR;
/// How long valid results of a group are remembered after the last one.
pub(crate) const COUNTED_FOR: Duration = CLAIMED_FOR;
/// A dead worker that nobody buried is told of again after this long.
pub(crate) const TOLD_AGAIN: Duration = Duration::from_secs(30);

/// What every key begins with.
pub(crate) fn root(prefix: &str) -> String {
    format!("{{{prefix}}}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn keys_of_a_fleet_share_a_slot() {
        assert_eq!(super::root("remuda"), "{remuda}");
    }
}
