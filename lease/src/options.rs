//! Where Redis is and how patient to be with it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The `redis` part of a daemon's configuration.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseOptions {
    pub url: String,
    /// What all keys begin with; fleets with different prefixes do not meet.
    pub prefix: String,
    /// How long a lease and a heartbeat hold.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
    /// Most that one operation may take, connecting included.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Most connections.
    pub pool_size: usize,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            prefix: "remuda".to_owned(),
            ttl: Duration::from_secs(15),
            timeout: Duration::from_secs(3),
            pool_size: 16,
        }
    }
}

impl std::fmt::Debug for LeaseOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeaseOptions")
            .field("url", &self.shown_url())
            .field("prefix", &self.prefix)
            .field("ttl", &self.ttl)
            .field("timeout", &self.timeout)
            .field("pool_size", &self.pool_size)
            .finish()
    }
}

impl LeaseOptions {
    /// Everything that is wrong with them.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if broker_schema::Token::new(&self.prefix).is_err() {
            problems.push(format!(
                "redis.prefix: {:?} is not [A-Za-z0-9_-]{{1,64}}",
                self.prefix
            ));
        }
        if self.ttl < Duration::from_secs(1) || self.ttl > Duration::from_secs(3600) {
            problems.push(format!(
                "redis.ttl: is {:?}, expected 1s to 1h (default 15s)",
                self.ttl
            ));
        }
        if self.timeout.is_zero() || self.timeout > self.ttl {
            problems.push(format!(
                "redis.timeout: is {:?}, expected more than zero and at most redis.ttl",
                self.timeout
            ));
        }
        if self.pool_size == 0 {
            problems.push("redis.pool_size: is 0, give at least 1".to_owned());
        }
        problems
    }

    /// The URL without what stands before the host: it may hold a password.
    pub(crate) fn shown_url(&self) -> String {
        match (self.url.split_once("://"), self.url.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
            _ => self.url.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_have_no_problem() {
        assert_eq!(LeaseOptions::default().problems(), Vec::<String>::new());
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let options = LeaseOptions {
            prefix: "a b".into(),
            ttl: Duration::ZERO,
            timeout: Duration::ZERO,
            pool_size: 0,
            ..LeaseOptions::default()
        };
        assert_eq!(options.problems().len(), 4);
    }

    #[test]
    fn a_password_is_never_shown() {
        let options = LeaseOptions {
            url: "redis://user:p@ss@host:6379/0".into(),
            ..LeaseOptions::default()
        };
        assert_eq!(options.shown_url(), "redis://host:6379/0");
        assert!(!format!("{options:?}").contains("p@ss"));
    }
}
