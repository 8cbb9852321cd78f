//! Whatever is wrong with a request is told with a stable code, the field and
//! the reason, and the fleet goes on.
#![expect(clippy::unwrap_used, reason = "a test")]

mod cases;
mod client;
mod links;
mod requests;
mod stranger;

use std::sync::Arc;
use std::time::Duration;

use remuda_tests::fleet::{Fleet, SharedFleet, default_config};

const PATIENCE: Duration = Duration::from_secs(30);

async fn fleet() -> Arc<Fleet> {
    static FLEET: SharedFleet = SharedFleet::new();
    FLEET.get(default_config).await.unwrap()
}

async fn goes_on(fleet: &Fleet) {
    let finished = fleet.run(["echo", "goes on"]).await.unwrap();
    assert_eq!(finished.text(), "goes on\n", "{}", finished.stderr);
}
