//! What a fault wants of the world that it strikes.

use std::time::Duration;

use serde_json::{Value, json};

use super::plan::Size;
use crate::servers::{Nats, Redis};

/// Whose connections something is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    Clients,
    Dispatcher(usize),
    Worker(usize),
}

/// How patient the fleet is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Leases of 6 s, which makes runs short.
    #[default]
    Brisk,
    /// What a fleet has that nobody configured.
    Default,
}

impl Pace {
    /// How long a lease holds.
    pub(crate) fn ttl(self) -> Duration {
        match self {
            Self::Brisk => Duration::from_secs(6),
            Self::Default => Duration::from_secs(15),
        }
    }
}

/// A world to be made.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) pace: Pace,
    pub(crate) load: Size,
    pub(crate) dispatchers: usize,
    pub(crate) workers: usize,
    pub(crate) nats: Nats,
    /// The NATS store is on a file system of this many bytes.
    pub(crate) nats_store: Option<u64>,
    pub(crate) redis: Redis,
    /// Whose connections pass a proxy.
    pub(crate) proxied: Vec<Who>,
    /// Workers in network namespaces of their own; their connections pass a
    /// proxy that stands outside.
    pub(crate) isolated: Vec<usize>,
    /// Put before a worker's command line, by its index.
    pub(crate) worker_wrap: Vec<(usize, Vec<String>)>,
    /// Added to the environment of a daemon.
    pub(crate) envs: Vec<(Who, String, String)>,
    /// The state of the first worker is on a file system of this many bytes.
    pub(crate) worker_state: Option<u64>,
    /// Laid over the dispatchers' configuration.
    pub(crate) dispatcher_config: Value,
    /// Laid over the workers' configuration.
    pub(crate) worker_config: Value,
    /// Daemons can be told to die at a point of their way.
    pub(crate) points: bool,
    /// A point that is set in every daemon that has it, for good.
    pub(crate) mutation: Option<String>,
    /// Daemons that end by themselves are started again.
    pub(crate) supervised: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            pace: Pace::default(),
            load: Size::default(),
            dispatchers: 2,
            workers: 2,
            nats: Nats::default(),
            nats_store: None,
            redis: Redis::default(),
            proxied: Vec::new(),
            isolated: Vec::new(),
            worker_wrap: Vec::new(),
            envs: Vec::new(),
            worker_state: None,
            dispatcher_config: json!({}),
            worker_config: json!({}),
            points: false,
            mutation: None,
            supervised: false,
        }
    }
}

/// How often the infrastructure may fail a task.
pub(crate) const MAX_ATTEMPTS: u32 = 4;

impl Shape {
    /// The configuration of the dispatchers, servers aside.
    pub(crate) fn dispatcher(&self) -> Value {
        let mut config = json!({
            "max_attempts": MAX_ATTEMPTS,
            "pools": [{"name": "default", "warm": 6, "max": 24, "limits": {
                "memory_bytes": 256 << 20, "pids": 64, "disk_bytes": 64 << 20, "inodes": 4096,
            }}],
            "streams": {
                "requests_bytes": 256 << 20, "results_bytes": 1 << 30, "terminals_bytes": 256 << 20,
            },
            "telemetry": {"log_format": "json"},
        });
        if self.pace == Pace::Brisk {
            let brisk = json!({
                "redis": {"ttl": "6s"},
                "timings": {"publish": "3s"},
            });
            merge(&mut config, brisk);
        }
        merge(&mut config, self.dispatcher_config.clone());
        config
    }

    /// The configuration of the workers, servers and folders aside.
    pub(crate) fn worker(&self) -> Value {
        let mut config = json!({
            "slots": 16,
            "telemetry": {"log_format": "json"},
            "timings": {"drain": "5s", "unreachable": "5s"},
        });
        if self.pace == Pace::Brisk {
            let brisk = json!({
                "redis": {"ttl": "6s"},
                "timings": {"renew": "1s", "heartbeat": "1s"},
            });
            merge(&mut config, brisk);
        }
        merge(&mut config, self.worker_config.clone());
        config
    }
}

/// Lays `over` on `under`: maps field by field, anything else whole.
pub(crate) fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (name, value) in over {
                merge(under.entry(name).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fault_wants_lies_over_the_rest() {
        let shape = Shape {
            worker_config: json!({"slots": 2, "timings": {"drain": "1s"}}),
            ..Shape::default()
        };
        let config = shape.worker();
        assert_eq!(config["slots"], 2);
        assert_eq!(config["timings"]["drain"], "1s");
        assert_eq!(config["timings"]["renew"], "1s");
        let patient = Shape {
            pace: Pace::Default,
            ..Shape::default()
        };
        assert_eq!(patient.dispatcher()["redis"], Value::Null);
    }
}
