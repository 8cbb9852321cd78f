//! From the command line to a client of the fleet.

use broker_schema::RunId;
use remuda_client::broker::BrokerOptions;
use remuda_client::{Client, ClientError, ClientOptions};

use crate::failure::Failure;
use crate::fleet::Fleet;
use crate::globals::Globals;

/// Connects for one run.
pub(crate) async fn client(globals: &Globals, run: RunId) -> Result<Client, Failure> {
    let fleet = Fleet::locate(globals)?;
    let broker = BrokerOptions {
        url: fleet.nats,
        prefix: fleet.prefix,
        name: "remuda".to_owned(),
        ..BrokerOptions::default()
    };
    let options = ClientOptions {
        broker,
        ..ClientOptions::new(globals.tenant.clone(), run)
    };
    Client::connect(options)
        .await
        .map_err(|error| failure(&error))
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
