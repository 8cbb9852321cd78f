//! From the command line to a client of the fleet.

use std::time::{Duration, Instant, SystemTime};

use broker_schema::RunId;
use remuda_client::broker::{Broker, BrokerError, BrokerOptions};
use remuda_client::{Client, ClientError, ClientOptions};

use crate::failure::Failure;
use crate::fleet::Fleet;
use crate::globals::Globals;
use crate::out;

/// How long a server that `remuda up` starts again may be away.
const RESTART_PATIENCE: Duration = Duration::from_secs(10);
/// A loss that is over sooner is not worth a word.
const LOSS_PATIENCE: Duration = Duration::from_secs(5);
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
            Ok(client) => {
                let watch = tell_losses(client.broker().clone());
                let _watch = remuda_telemetry::task::spawn("connection", watch);
                return Ok(client);
            }
            Err(error) => return Err(failure(&error)),
        }
    }
}

/// Says that the fleet cannot be reached and since when, once for each time, and that it can be
/// again. What waits goes on waiting: what was accepted is not lost.
async fn tell_losses(broker: Broker) {
    loop {
        broker.lost_for(LOSS_PATIENCE).await;
        let since = SystemTime::now() - LOSS_PATIENCE;
        out::note(format_args!(
            "remuda: no connection to nats-server at {} since {}: still waiting, what was \
             accepted is kept",
            broker.url(),
            humantime::format_rfc3339_seconds(since)
        ));
        if !broker.regained().await {
            return;
        }
        out::note("remuda: connected again");
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
