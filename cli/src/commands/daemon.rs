//! `remuda dispatcher` and `remuda worker`: the daemons inside this program,
//! as `remuda up` starts them.

use std::path::PathBuf;

use serde::de::DeserializeOwned;

use crate::failure::Failure;
use crate::task_file;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    fn options<T: DeserializeOwned + Default>(&self) -> Result<T, Failure> {
        let file = self.config.display().to_string();
        let text = std::fs::read_to_string(&self.config)
            .map_err(|error| Failure::because(format_args!("{file} cannot be read"), &error))?;
        task_file::single(&file, &text).map_err(|error| Failure::chain(&error))
    }
}
