//! The configuration's sources: a file, then the environment.

use std::path::Path;

use crate::options::DispatcherOptions;

/// Other variables of this prefix are not the dispatcher's.
const OVERRIDES: [&str; 7] = [
    "REMUDA_NATS__",
    "REMUDA_REDIS__",
    "REMUDA_TIMINGS__",
    "REMUDA_TELEMETRY__",
    "REMUDA_WINDOW",
    "REMUDA_IN_FLIGHT",
    "REMUDA_MAX_ATTEMPTS",
];

impl DispatcherOptions {
    /// Reads TOML or YAML; `REMUDA_NATS__URL` and the like win over it.
    pub fn load(file: Option<&Path>) -> Result<Self, config::ConfigError> {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self::merge(file, variables)
    }

    fn merge(
        file: Option<&Path>,
        mut variables: config::Map<String, String>,
    ) -> Result<Self, config::ConfigError> {
        let mut builder = config::Config::builder();
        if let Some(file) = file {
            builder = builder.add_source(config::File::from(file));
        }
        variables.retain(|name, _| OVERRIDES.iter().any(|option| name.starts_with(option)));
        let environment = config::Environment::with_prefix("REMUDA")
            .prefix_separator("_")
            .separator("__")
            .source(Some(variables));
        builder.add_source(environment).build()?.try_deserialize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_the_file_and_others_variables_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("d.toml");
        let text = "window = 7\n[nats]\nurl = \"nats://a:1\"\n[redis]\nttl = \"20s\"\n[[pools]]\nname = \"py\"\n";
        std::fs::write(&file, text).unwrap();
        let variables = [
            ("REMUDA_NATS__URL", "nats://b:2"),
            ("REMUDA_MAX_ATTEMPTS", "9"),
            ("REMUDA_TOOLS", "/tools"),
            ("HOME", "/"),
        ];
        let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let options = DispatcherOptions::merge(Some(&file), variables).unwrap();
        assert_eq!(options.nats.url, "nats://b:2");
        assert_eq!((options.window, options.max_attempts), (7, 9));
        assert_eq!(options.redis.ttl.as_secs(), 20);
        assert_eq!(options.validate(), Ok(()));

        std::fs::write(&file, "windw = 7\n").unwrap();
        let error = DispatcherOptions::merge(Some(&file), config::Map::new()).unwrap_err();
        assert!(error.to_string().contains("windw"), "{error}");
    }
}
