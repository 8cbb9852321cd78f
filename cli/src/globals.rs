//! The command line that every command shares.

use broker_schema::TenantId;

const EXIT_STATUS: &str = "\
Exit status:
  0    done
  1    failed; standard error tells what, its code and the mend
  2    the command line makes no sense
  130  told to stop, twice or before there was anything to wait for
  `remuda run` exits as its command does, and with
  124  timed out
  125  not the command's doing: rejected, cancelled, expired, or the infrastructure
  126  the command is there and cannot be run
  127  there is no such command
  137  out of memory
  128+n  ended by signal n";

/// Warm sandboxes that run tasks from a message queue.
#[derive(Debug, clap::Parser)]
#[command(name = "remuda", version, after_help = EXIT_STATUS)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: crate::commands::Command,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Globals {
    /// The fleet's nats-server; without it, the fleet that `remuda up` runs
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "REMUDA_NATS",
        hide_env_values = true
    )]
    pub(crate) nats: Option<String>,
    /// The fleet's Redis server
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "REMUDA_REDIS",
        hide_env_values = true
    )]
    pub(crate) redis: Option<String>,
    /// First token of every subject [default: remuda]
    #[arg(long, global = true, value_name = "TOKEN", env = "REMUDA_PREFIX")]
    pub(crate) prefix: Option<String>,
    /// Whose tasks these are
    #[arg(
        long,
        global = true,
        value_name = "TENANT",
        env = "REMUDA_TENANT",
        default_value = "default"
    )]
    pub(crate) tenant: TenantId,
    /// What is logged to standard error, e.g. info or `remuda_client=debug`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "REMUDA_LOG",
        default_value = "warn"
    )]
    pub(crate) log: String,
    /// Where traces are sent over OTLP gRPC
    #[arg(long, global = true, value_name = "URL", env = "REMUDA_OTLP_ENDPOINT")]
    pub(crate) otlp: Option<String>,
}
