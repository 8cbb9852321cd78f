//! What unit tests share.

use broker_schema::{Epoch, Placement, SandboxId, SandboxRef, TaskRequest, Timestamp};

pub(crate) fn placement() -> Placement {
    let token = |text: &str| text.to_owned();
    Placement {
        task: TaskRequest::new(
            token("t").parse().unwrap(),
            token("r").parse().unwrap(),
            token("p").parse().unwrap(),
            Vec::new(),
        ),
        request_digest: String::new(),
        attempt: 1,
        sandbox: SandboxRef {
            sandbox: SandboxId::new(),
            worker: token("w").parse().unwrap(),
            epoch: Epoch::new(1, 1),
        },
        dispatched_at: Timestamp(1),
    }
}
