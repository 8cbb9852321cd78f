//! Logs and traces of a command, as the command line asks for them.

use remuda_telemetry::{Telemetry, TelemetryOptions};

use crate::failure::Failure;
use crate::globals::Globals;

pub(crate) fn start(globals: &Globals) -> Result<Telemetry, Failure> {
    let options = TelemetryOptions {
        log_filter: globals.log.clone(),
        otlp_endpoint: globals.otlp.clone(),
        ..TelemetryOptions::default()
    };
    remuda_telemetry::init("remuda", &options).map_err(|error| {
        Failure::chain(&error).mend("give --log a filter and --otlp a URL that can be used")
    })
}
