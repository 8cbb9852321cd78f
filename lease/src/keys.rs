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
//! | `worker:<worker>` | hash | `record` (JSON), `incarnation`, `draining` |
//! | `held:<worker>` | set | its sandboxes, warm and leased |
//! | `targets:<worker>` | hash | pool → `warm:max` |
//! | `pools` | hash | pool → its spec (JSON) |
//! | `warm:<pool>` | sorted set | warm sandbox → milliseconds when it was offered |
//! | `sandbox:<sandbox>` | hash | `worker`, `pool`, `state` (`warm`, `leased`), `incarnation`; of a lease also `counter`, `until`, `tenant`, `run`, `task`, `attempt`, `nonce` |
//! | `task:<tenant>:<task>` | hash | `digest`, `attempts`, `cancelled`, `finished`; of a live claim also `sandbox`, `incarnation`, `counter`, `nonce` |
//! | `dead` | sorted set | dead worker → when to tell of it again |
//!
//! Only task records expire by themselves; everything else goes with its worker.

use std::time::Duration;

/// How long a claimed task's record is kept without being finished: as long as its terminal
/// would be.
pub(crate) const CLAIMED_FOR: Duration = Duration::from_secs(72 * 3600);
/// How long a finished task's record is kept. It only spares a look at the terminal, which
/// carries the digest too, so it need not outlive the memory for message ids by much.
pub(crate) const FINISHED_FOR: Duration = Duration::from_secs(15 * 60);
/// How long a cancellation waits for a task that was never claimed.
pub(crate) const CANCELLED_FOR: Duration = Duration::from_secs(6 * 3600);
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
