//! What an operator may choose about a worker, and what is wrong with it.

use std::path::PathBuf;
use std::time::Duration;

use broker_schema::pool::BackendKind;
use broker_schema::{PoolId, Token, WorkerId};
use remuda_client::broker::{BrokerOptions, Credentials};
use remuda_lease::LeaseOptions;
use remuda_telemetry::TelemetryOptions;
use serde::{Deserialize, Serialize};

/// A worker's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerOptions {
    /// The worker's id is this and a suffix of its own: a restarted worker is another one.
    pub name: String,
    pub nats: NatsOptions,
    pub redis: LeaseOptions,
    /// Tasks that may be in hand at once, those that wait for their session included.
    pub slots: u32,
    pub backends: Vec<BackendKind>,
    /// The static sidecar; beside this program when absent.
    pub sidecar: Option<PathBuf>,
    /// A program that becomes the sandboxes' forker; this one when absent.
    pub forker: Option<PathBuf>,
    pub state_dir: PathBuf,
    /// Make sandboxes even where this host cannot enforce one of their limits.
    pub allow_unenforced: bool,
    /// Sandboxes that are made at once; twice the cores when absent.
    pub create_concurrency: Option<usize>,
    pub timings: Timings,
    pub telemetry: TelemetryOptions,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            name: "worker".to_owned(),
            nats: NatsOptions::default(),
            redis: LeaseOptions::default(),
            slots: 64,
            backends: vec![BackendKind::Local],
            sidecar: None,
            forker: None,
            state_dir: "/var/lib/remuda/worker".into(),
            allow_unenforced: false,
            create_concurrency: None,
            timings: Timings::default(),
            telemetry: TelemetryOptions::default(),
        }
    }
}

/// The `nats` part.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsOptions {
    pub url: String,
    pub prefix: String,
    /// A `.creds` file.
    pub credentials: Option<PathBuf>,
    pub user: Option<String>,
    pub password: Option<String>,
    pub token: Option<String>,
    pub tls_ca: Option<PathBuf>,
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
}

impl Default for NatsOptions {
    fn default() -> Self {
        let broker = BrokerOptions::default();
        Self {
            url: broker.url,
            prefix: broker.prefix,
            credentials: None,
            user: None,
            password: None,
            token: None,
            tls_ca: None,
            connect_timeout: broker.connect_timeout,
        }
    }
}

impl std::fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsOptions")
            .field("url", &self.broker("").display_url())
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl NatsOptions {
    pub(crate) fn broker(&self, name: &str) -> BrokerOptions {
        let credentials = match (&self.credentials, &self.token, &self.user) {
            (Some(file), _, _) => Credentials::File(file.clone()),
            (None, Some(token), _) => Credentials::Token(token.clone()),
            (None, None, Some(user)) => Credentials::UserPassword {
                user: user.clone(),
                password: self.password.clone().unwrap_or_default(),
            },
            (None, None, None) => Credentials::None,
        };
        BrokerOptions {
            url: self.url.clone(),
            prefix: self.prefix.clone(),
            name: name.to_owned(),
            credentials,
            tls_ca: self.tls_ca.clone(),
            connect_timeout: self.connect_timeout,
            ..BrokerOptions::default()
        }
    }
}

/// The `timings` part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timings {
    /// How often leases are renewed.
    #[serde(with = "humantime_serde")]
    pub renew: Duration,
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// What running tasks may take after the worker was told to stop.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// How long an open session may be without a task before it is ended, once the worker was
    /// told to stop; at most `drain`.
    #[serde(with = "humantime_serde")]
    pub session_grace: Duration,
    /// How long a worker that was told to stop goes on without NATS, and how much longer than
    /// `drain` it takes at most, whatever does not answer.
    #[serde(with = "humantime_serde")]
    pub unreachable: Duration,
    /// How long a result is tried to be published before its task is left to be delivered again.
    #[serde(with = "humantime_serde")]
    pub publish: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            renew: Duration::from_secs(5),
            heartbeat: Duration::from_secs(2),
            drain: Duration::from_secs(30),
            session_grace: Duration::from_secs(5),
            unreachable: Duration::from_secs(20),
            publish: Duration::from_secs(300),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used: {}", problems.join("; "))]
pub struct InvalidOptions {
    pub problems: Vec<String>,
}

/// Characters of a worker's id that are not its name.
const SUFFIX: usize = 9;
/// A lease must survive one renewal that fails.
const MARGIN: Duration = Duration::from_secs(2);

impl WorkerOptions {
    /// Everything that is wrong, at once.
    pub fn validate(&self) -> Result<(), InvalidOptions> {
        let mut problems = self.redis.problems();
        if Token::new(&self.name).is_err() || self.name.len() > Token::MAX_LEN - SUFFIX {
            problems.push(format!(
                "name: {:?} is not [A-Za-z0-9_-]{{1,{}}}",
                self.name,
                Token::MAX_LEN - SUFFIX
            ));
        }
        if PoolId::new(&self.nats.prefix).is_err() {
            problems.push(format!(
                "nats.prefix: {:?} is not [A-Za-z0-9_-]{{1,64}}",
                self.nats.prefix
            ));
        }
        if self.nats.password.is_some() && self.nats.user.is_none() {
            problems.push("nats.password: needs nats.user beside it".to_owned());
        }
        if !(1..=4096).contains(&self.slots) {
            problems.push(format!("slots: is {}, expected 1 to 4096", self.slots));
        }
        if self.backends.is_empty() {
            problems.push("backends: is empty, give local or fake".to_owned());
        }
        if self.create_concurrency == Some(0) {
            problems.push("create_concurrency: is 0, leave it out for the default".to_owned());
        }
        let life = self.redis.ttl.saturating_sub(MARGIN);
        for (name, interval) in [
            ("timings.renew", self.timings.renew),
            ("timings.heartbeat", self.timings.heartbeat),
        ] {
            if interval.is_zero() || interval * 2 > life.max(interval) {
                problems.push(format!(
                    "{name}: is {interval:?}, expected more than zero and at most half of \
                     redis.ttl less {MARGIN:?}, which is {:?}",
                    life / 2
                ));
            }
        }
        if self.timings.publish.is_zero() {
            problems.push("timings.publish: is zero, a result needs time".to_owned());
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(InvalidOptions { problems })
        }
    }

    /// The id of a worker that starts now.
    pub(crate) fn new_worker_id(&self) -> Result<WorkerId, InvalidOptions> {
        let suffix: u32 = rand::random();
        WorkerId::new(&format!("{}-{suffix:08x}", self.name)).map_err(|error| InvalidOptions {
            problems: vec![format!("name: {error}")],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_a_round_trip() {
        let options = WorkerOptions::default();
        assert_eq!(options.validate(), Ok(()));
        let json = serde_json::to_string(&options).unwrap();
        assert_eq!(
            serde_json::from_str::<WorkerOptions>(&json).unwrap(),
            options
        );
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let options = WorkerOptions {
            name: "a.b".to_owned(),
            slots: 0,
            backends: vec![],
            create_concurrency: Some(0),
            nats: NatsOptions {
                prefix: "a b".to_owned(),
                password: Some("x".to_owned()),
                ..NatsOptions::default()
            },
            timings: Timings {
                renew: Duration::from_secs(10),
                heartbeat: Duration::ZERO,
                publish: Duration::ZERO,
                ..Timings::default()
            },
            ..WorkerOptions::default()
        };
        let problems = options.validate().unwrap_err().problems;
        let fields: Vec<&str> = problems
            .iter()
            .filter_map(|problem| problem.split(':').next())
            .collect();
        assert_eq!(
            fields,
            [
                "name",
                "nats.prefix",
                "nats.password",
                "slots",
                "backends",
                "create_concurrency",
                "timings.renew",
                "timings.heartbeat",
                "timings.publish"
            ]
        );
    }

    #[test]
    fn a_misspelt_option_is_named() {
        let error = serde_json::from_str::<WorkerOptions>(r#"{"slot": 3}"#).unwrap_err();
        assert!(error.to_string().contains("`slot`"), "{error}");
    }

    #[test]
    fn two_starts_are_two_workers() {
        let options = WorkerOptions::default();
        let first = options.new_worker_id().unwrap();
        assert_ne!(first, options.new_worker_id().unwrap());
        assert!(first.as_str().starts_with("worker-"));
    }
}
