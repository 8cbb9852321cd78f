//! What an operator may choose.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use broker_schema::pool::{ImageRef, PoolSpec};
use broker_schema::stream::Sizes;
use remuda_client::broker::{BrokerOptions, Credentials};
use remuda_lease::LeaseOptions;
use remuda_telemetry::TelemetryOptions;
use serde::{Deserialize, Serialize};

use crate::tenants::{self, TenantOptions};

/// The configuration of one dispatcher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DispatcherOptions {
    pub nats: NatsOptions,
    pub redis: LeaseOptions,
    pub pools: Vec<PoolSpec>,
    /// Weights and quotas of tenants.
    pub tenants: Vec<TenantOptions>,
    /// Sizes of the fleet's streams.
    pub streams: Streams,
    /// Most requests of one lane (tenant and pool) held here; the backlog stays in the stream.
    pub window: usize,
    /// Most placements that are under way at once.
    pub in_flight: usize,
    /// Attempts at a task before it is dead-lettered, beside the retries that it asks for.
    pub max_attempts: u32,
    pub timings: Timings,
    pub telemetry: TelemetryOptions,
}

impl Default for DispatcherOptions {
    fn default() -> Self {
        Self {
            nats: NatsOptions::default(),
            redis: LeaseOptions::default(),
            pools: Vec::new(),
            tenants: Vec::new(),
            streams: Streams::default(),
            window: 256,
            in_flight: 64,
            max_attempts: 4,
            timings: Timings::default(),
            telemetry: TelemetryOptions::default(),
        }
    }
}

/// How to reach nats-server.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsOptions {
    pub url: String,
    /// First token of every subject.
    pub prefix: String,
    pub token: Option<String>,
    pub user: Option<String>,
    pub password: Option<String>,
    /// A `.creds` file.
    pub credentials: Option<PathBuf>,
    /// An NKEY's seed.
    pub nkey: Option<String>,
    /// Certificates, PEM, to trust beside the system's.
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
            token: None,
            user: None,
            password: None,
            credentials: None,
            nkey: None,
            tls_ca: None,
            connect_timeout: broker.connect_timeout,
        }
    }
}

impl std::fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsOptions")
            .field("url", &self.broker().display_url())
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl NatsOptions {
    pub fn broker(&self) -> BrokerOptions {
        let credentials = if let Some(path) = &self.credentials {
            Credentials::File(path.clone())
        } else if let Some(seed) = &self.nkey {
            Credentials::Nkey(seed.clone())
        } else if let Some(token) = &self.token {
            Credentials::Token(token.clone())
        } else if let (Some(user), Some(password)) = (&self.user, &self.password) {
            Credentials::UserPassword {
                user: user.clone(),
                password: password.clone(),
            }
        } else {
            Credentials::None
        };
        BrokerOptions {
            url: self.url.clone(),
            prefix: self.prefix.clone(),
            name: "remuda-dispatcher".to_owned(),
            credentials,
            tls_ca: self.tls_ca.clone(),
            connect_timeout: self.connect_timeout,
            ..BrokerOptions::default()
        }
    }
}

/// The `streams` part: how much the fleet's streams may keep, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Streams {
    /// Requests that wait, and as much again for placements under way.
    pub requests_bytes: i64,
    /// Output.
    pub results_bytes: i64,
    #[serde(with = "humantime_serde")]
    pub results_age: Duration,
    pub terminals_bytes: i64,
    #[serde(with = "humantime_serde")]
    pub terminals_age: Duration,
    /// Servers that each stream is kept on: odd, and more than one only in a cluster.
    pub replicas: usize,
}

impl Default for Streams {
    fn default() -> Self {
        let sizes = Sizes::default();
        Self {
            requests_bytes: sizes.requests_bytes,
            results_bytes: sizes.results_bytes,
            results_age: sizes.results_age,
            terminals_bytes: sizes.terminals_bytes,
            terminals_age: sizes.terminals_age,
            replicas: sizes.replicas,
        }
    }
}

impl From<Streams> for Sizes {
    fn from(streams: Streams) -> Self {
        Self {
            requests_bytes: streams.requests_bytes,
            results_bytes: streams.results_bytes,
            results_age: streams.results_age,
            terminals_bytes: streams.terminals_bytes,
            terminals_age: streams.terminals_age,
            replicas: streams.replicas,
        }
    }
}

impl Streams {
    /// Less than this cannot hold what one task may send.
    const LEAST_BYTES: i64 = 16 << 20;
    /// Less than this, and message ids are remembered for longer than what they stand for.
    const LEAST_AGE: Duration = Duration::from_secs(600);

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, bytes) in [
            ("requests_bytes", self.requests_bytes),
            ("results_bytes", self.results_bytes),
            ("terminals_bytes", self.terminals_bytes),
        ] {
            if bytes < Self::LEAST_BYTES {
                let least = Self::LEAST_BYTES;
                problems.push(format!(
                    "streams.{name}: is {bytes}, expected at least {least}"
                ));
            }
        }
        for (name, age) in [
            ("results_age", self.results_age),
            ("terminals_age", self.terminals_age),
        ] {
            if age < Self::LEAST_AGE {
                let least = Self::LEAST_AGE;
                problems.push(format!(
                    "streams.{name}: is {age:?}, expected at least {least:?}"
                ));
            }
        }
        if !matches!(self.replicas, 1 | 3 | 5) {
            problems.push(format!(
                "streams.replicas: is {}, expected 1, 3 or 5",
                self.replicas
            ));
        }
        problems
    }
}

/// How often and how long. The defaults suit a fleet; tests shorten them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timings {
    /// Lanes, workers, dead workers and deadlines are looked at this often.
    #[serde(with = "humantime_serde")]
    pub tick: Duration,
    /// What is held is marked as in progress this often.
    #[serde(with = "humantime_serde")]
    pub progress: Duration,
    /// How long publishing a placement may take: less than a lease holds.
    #[serde(with = "humantime_serde")]
    pub publish: Duration,
    /// How long tasks of a group wait for the others of it.
    #[serde(with = "humantime_serde")]
    pub group_hold: Duration,
    /// How long placements under way may take when shutting down.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// How long a dispatcher that was told to stop goes on without NATS, and how much longer
    /// than `drain` it takes at most, whatever does not answer.
    #[serde(with = "humantime_serde")]
    pub unreachable: Duration,
    /// How long this dispatcher leads a pool without renewing it, which it does three times as
    /// often: what others wait for where it is killed.
    #[serde(with = "humantime_serde")]
    pub term: Duration,
    /// Messages that no consumer will deliver any more are looked for this often.
    #[serde(with = "humantime_serde")]
    pub sweep: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            tick: Duration::from_secs(1),
            progress: Duration::from_secs(10),
            publish: Duration::from_secs(8),
            group_hold: Duration::from_secs(2),
            drain: Duration::from_secs(15),
            unreachable: Duration::from_secs(20),
            term: Duration::from_secs(3),
            sweep: Duration::from_secs(30),
        }
    }
}

impl DispatcherOptions {
    /// Everything that is wrong with them.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut problems = self.redis.problems();
        problems.extend(self.streams.problems());
        problems.extend(tenants::problems(&self.tenants));
        let mut need = |good: bool, problem: String| {
            if !good {
                problems.push(problem);
            }
        };
        need(
            broker_schema::Token::new(&self.nats.prefix).is_ok(),
            format!(
                "nats.prefix: {:?} is not [A-Za-z0-9_-]{{1,64}}",
                self.nats.prefix
            ),
        );
        let given = [
            self.nats.token.is_some(),
            self.nats.user.is_some(),
            self.nats.credentials.is_some(),
            self.nats.nkey.is_some(),
        ];
        need(
            given.iter().filter(|given| **given).count() <= 1,
            "nats: give one of token, user, credentials and nkey".to_owned(),
        );
        need(
            self.nats.user.is_some() == self.nats.password.is_some(),
            "nats: user and password belong together".to_owned(),
        );
        for (name, value, most) in [
            ("window", self.window, 10_000),
            ("in_flight", self.in_flight, 4096),
            ("max_attempts", self.max_attempts as usize, 1000),
        ] {
            need(
                (1..=most).contains(&value),
                format!("{name}: is {value}, expected 1 to {most}"),
            );
        }
        for (name, value) in [
            ("tick", self.timings.tick),
            ("progress", self.timings.progress),
            ("publish", self.timings.publish),
            ("sweep", self.timings.sweep),
        ] {
            need(!value.is_zero(), format!("timings.{name}: is zero"));
        }
        need(
            self.timings.progress < broker_schema::stream::REQUEST_ACK_WAIT,
            format!(
                "timings.progress: is {:?}, requests come again after {:?}",
                self.timings.progress,
                broker_schema::stream::REQUEST_ACK_WAIT
            ),
        );
        let terms = Duration::from_secs(1)..=Duration::from_secs(60);
        need(
            terms.contains(&self.timings.term),
            format!(
                "timings.term: is {:?}, expected 1s to 1m",
                self.timings.term
            ),
        );
        need(
            self.timings.publish < self.redis.ttl,
            format!(
                "timings.publish: is {:?}, expected less than redis.ttl ({:?})",
                self.timings.publish, self.redis.ttl
            ),
        );
        need(
            !self.pools.is_empty(),
            "pools: there is none, add [[pools]] with a name".to_owned(),
        );
        let mut names = BTreeSet::new();
        for pool in &self.pools {
            let name = &pool.name;
            need(names.insert(name), format!("pools.{name}: is there twice"));
            need(
                name.as_str() != crate::leader::FLEET,
                format!("pools.{name}: this name is taken by the fleet's own duties"),
            );
            need(pool.max > 0, format!("pools.{name}.max: is 0"));
            need(
                pool.warm <= pool.max,
                format!(
                    "pools.{name}.warm: {} is more than max, {}",
                    pool.warm, pool.max
                ),
            );
            need(
                pool.limits
                    .cpus
                    .is_none_or(|cpus| cpus.is_finite() && cpus > 0.0),
                format!("pools.{name}.limits.cpus: expected a number above 0"),
            );
            need(
                pool.limits.memory_bytes > 0 && pool.limits.pids > 0 && pool.limits.open_files > 0,
                format!("pools.{name}.limits: memory_bytes, pids and open_files must be above 0"),
            );
            if let ImageRef::Rootfs(path) = &pool.image {
                need(
                    path.is_absolute(),
                    format!("pools.{name}.image: {} is not absolute", path.display()),
                );
            }
            let bad_env = pool.env.iter().any(|(key, value)| {
                key.is_empty() || key.contains(['=', '\0']) || value.contains('\0')
            });
            need(
                !bad_env,
                format!("pools.{name}.env: a name is empty or holds '=', or a NUL byte is there"),
            );
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_told_at_once() {
        let mut options = DispatcherOptions {
            window: 0,
            max_attempts: 0,
            ..DispatcherOptions::default()
        };
        options.nats.prefix = "a.b".into();
        options.nats.user = Some("u".into());
        options.nats.token = Some("t".into());
        options.timings.publish = Duration::from_secs(60);
        let mut pool = PoolSpec::named("py".parse().unwrap());
        pool.warm = 99;
        options.pools = vec![pool.clone(), pool];
        let problems = options.validate().unwrap_err();
        assert_eq!(problems.len(), 9, "{problems:#?}");
        options = DispatcherOptions::default();
        assert_eq!(options.validate().unwrap_err().len(), 1, "no pools");
        options.pools = vec![PoolSpec::named("py".parse().unwrap())];
        assert_eq!(options.validate(), Ok(()));
    }

    #[test]
    fn streams_can_be_sized_and_not_too_small() {
        let text = r#"{"streams": {"results_bytes": 1073741824, "terminals_age": "7days"}}"#;
        let options: DispatcherOptions = serde_json::from_str(text).unwrap();
        let sizes = Sizes::from(options.streams);
        assert_eq!(sizes.results_bytes, 1 << 30);
        assert_eq!(sizes.terminals_age, Duration::from_secs(7 * 24 * 3600));
        assert_eq!(sizes.requests_bytes, Sizes::default().requests_bytes);
        let bad = Streams {
            requests_bytes: 0,
            results_bytes: -1,
            results_age: Duration::ZERO,
            replicas: 2,
            ..Streams::default()
        };
        assert_eq!(bad.problems().len(), 4, "{:#?}", bad.problems());
    }

    #[test]
    fn misspelt_options_are_refused_and_secrets_hidden() {
        let error = serde_json::from_str::<DispatcherOptions>(r#"{"windw": 3}"#).unwrap_err();
        assert!(error.to_string().contains("windw"));
        let nats = NatsOptions {
            url: "nats://joe:s3cret@h:1".into(),
            token: Some("s3cret".into()),
            ..NatsOptions::default()
        };
        assert!(!format!("{nats:?}").contains("s3cret"));
    }
}
