//! Reads the configuration: defaults, then a file, then the environment.

use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Environment, File};

use crate::options::{InvalidOptions, WorkerOptions};

/// `REMUDA_WORKER__NATS__URL` is `nats.url`.
const PREFIX: &str = "REMUDA_WORKER";

/// A configuration that cannot be read or used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the configuration cannot be read (file {path:?}, environment {PREFIX}__*)")]
    Read {
        path: Option<PathBuf>,
        #[source]
        source: ConfigError,
    },
    #[error(transparent)]
    Invalid(#[from] InvalidOptions),
}

impl WorkerOptions {
    /// Reads and checks the configuration.
    pub fn load(path: Option<&Path>) -> Result<Self, LoadError> {
        let environment = Environment::with_prefix(PREFIX)
            .prefix_separator("__")
            .separator("__")
            .list_separator(",")
            .with_list_parse_key("backends")
            .try_parsing(true);
        Self::load_from(path, environment)
    }

    fn load_from(path: Option<&Path>, environment: Environment) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Read {
            path: path.map(Path::to_owned),
            source,
        };
        let mut builder = Config::builder();
        if let Some(path) = path {
            builder = builder.add_source(File::from(path));
        }
        let read = builder.add_source(environment).build().map_err(failed)?;
        let options: Self = read.try_deserialize().map_err(failed)?;
        options.validate()?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::pool::BackendKind;
    use std::collections::HashMap;
    use std::time::Duration;

    fn environment(entries: &[(&str, &str)]) -> Environment {
        let entries: HashMap<String, String> = entries
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Environment::with_prefix(PREFIX)
            .prefix_separator("__")
            .separator("__")
            .list_separator(",")
            .with_list_parse_key("backends")
            .try_parsing(true)
            .source(Some(entries))
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        let file = "slots = 8\nname = \"filed\"\n[timings]\ndrain = \"3s\"\n";
        std::fs::write(&path, file).unwrap();
        let options = WorkerOptions::load_from(
            Some(&path),
            environment(&[
                ("REMUDA_WORKER__SLOTS", "9"),
                ("REMUDA_WORKER__NATS__URL", "nats://h:1"),
                ("REMUDA_WORKER__BACKENDS", "fake,local"),
            ]),
        )
        .unwrap();
        assert_eq!((options.slots, options.name.as_str()), (9, "filed"));
        assert_eq!(options.nats.url, "nats://h:1");
        assert_eq!(options.timings.drain, Duration::from_secs(3));
        assert_eq!(options.backends, [BackendKind::Fake, BackendKind::Local]);
    }

    #[test]
    fn a_misspelt_key_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, "slotts = 8\n").unwrap();
        let error = WorkerOptions::load_from(Some(&path), environment(&[])).unwrap_err();
        let text = remuda_telemetry::Chain(&error).to_string();
        assert!(text.contains("slotts"), "{text}");
    }
}
