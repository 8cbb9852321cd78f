//! `remuda pool ls`: pools, and how many of their sandboxes are warm.

use super::ps::{Format, connect, pool_json, pool_states, pool_table};
use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the pools with their warm and leased sandboxes
    Ls {
        /// How to print it
        #[arg(short, long, value_name = "FORMAT", default_value = "table")]
        output: Format,
    },
}

pub(crate) async fn run(command: &Command, globals: &Globals) -> Result<u8, Failure> {
    let Command::Ls { output } = command;
    let store = connect(globals).await?;
    let pools = pool_states(&store).await?;
    match output {
        Format::Table => out::line(pool_table(&pools))?,
        Format::Json => {
            for pool in &pools {
                out::json(&pool_json(pool))?;
            }
        }
    }
    Ok(0)
}
