//! From the command line to a client of the fleet.

use std::time::{Duration, Instant};

use broker_schema::RunId;
use remuda_client::broker::{BrokerError, BrokerOptions};
use remuda_client::{Client, ClientError, ClientOptions};

use crate::failure::Failure;
use crate::fleet::Fleet;
use crate::globals::Globals;

/// How long a server that `remuda up` starts again may be away.
const RESTART_PATIENCE: Duration = Duration::from_secs(10);
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Connects for one run.
pub(crate) async fn client(globals: &Globals, run: RunId) -> Result<Client, Failure> {
    let fleet = Fleet::locate(globals)?;
    let broker = BrokerOptions {
        url: fleet.nats.clone(),
        prefix: fleet.prefix.clone(),
        name: "remuda".to_owned(),
        ..BrokerOptions::default()
    };
    let options = ClientOptions {
        broker,
        ..ClientOptions::new(globals.tenant.clone(), run)
    };
    let give_up = Instant::now() + RESTART_PATIENCE;
    loop {
        match Client::connect(options.clone()).await {
            Err(ClientError::Connect(BrokerError::Connect { .. }))
                if fleet.supervised && Instant::now() < give_up =>
            {
                tokio::time::sleep(TRY_AGAIN).await;
            }
            connected => return connected.map_err(|error| failure(&error)),
        }
    }
}

/// A run that nobody else has, for a command that was given none.
pub(crate) fn fresh_run() -> Result<RunId, Failure> {
    let id = broker_schema::TaskId::new();
    RunId::new(&format!("cli-{id}")).map_err(|error| Failure::chain(&error))
}

/// What a client's error is for a person.
pub(crate) fn failure(error: &ClientError) -> Failure {
    let failure = Failure::chain(error).code(error.code());
    match error {
        ClientError::Connect(_) => {
            failure.mend("is the fleet running? `remuda up` starts one, `remuda doctor` looks")
        }
        _ => failure,
    }
}
