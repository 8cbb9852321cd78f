//! The dispatcher's and the worker's configuration files.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Map, Value, json};

use super::child::{Invocation, OWN_PROGRAM};
use super::data::Data;
use super::servers::{ServerError, write_private};

/// Where the servers are.
#[derive(Debug, Clone)]
pub(super) struct Urls {
    pub(super) nats: String,
    pub(super) redis: String,
}

/// A daemon of ours: a subcommand of this program with a configuration file.
#[derive(Debug)]
pub(super) struct Daemon {
    /// The subcommand, which names the file and the log as well.
    pub(super) name: &'static str,
    /// What this daemon alone is told, the person's settings on top.
    pub(super) settings: Value,
    /// Where it serves its pages: another one after every start.
    pub(super) port: u16,
}

impl Daemon {
    pub(super) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub(super) fn metrics_url(&self) -> String {
        format!("http://{}/metrics", self.address())
    }

    pub(super) fn invocation(
        &self,
        data: &Data,
        prefix: &str,
        urls: &Urls,
    ) -> Result<Invocation, ServerError> {
        // JSON is YAML too, and daemons read YAML.
        let path = data.run().join(format!("{}.yaml", self.name));
        let config = self.config(prefix, urls);
        write_private(&path, &format!("{config:#}\n"))?;
        Ok(Invocation {
            program: OWN_PROGRAM.into(),
            args: vec![self.name.into(), "--config".into(), path.into()],
            hold: None,
        })
    }

    fn config(&self, prefix: &str, urls: &Urls) -> Value {
        let mut config = self.settings.clone();
        let ours = json!({
            "nats": { "url": urls.nats, "prefix": prefix },
            "redis": { "url": urls.redis, "prefix": prefix },
            "telemetry": { "http_listen": self.address().to_string() },
        });
        merge(&mut config, ours);
        config
    }
}

/// Lays `over` on `under`: maps field by field, anything else whole.
pub(super) fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (name, value) in over {
                merge(under.entry(name).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

/// A map with one field less when there is nothing to say in it.
pub(super) fn object(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(
        fields
            .map(|(name, value)| (name.to_owned(), value))
            .collect::<Map<_, _>>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_lies_over_what_the_person_set() {
        let daemon = Daemon {
            name: "worker",
            settings: json!({"slots": 4, "redis": {"ttl": "20s", "url": "redis://other"}}),
            port: 9000,
        };
        let urls = Urls {
            nats: "nats://n".into(),
            redis: "redis://r".into(),
        };
        assert_eq!(
            daemon.config("remuda", &urls),
            json!({
                "slots": 4,
                "nats": {"url": "nats://n", "prefix": "remuda"},
                "redis": {"ttl": "20s", "url": "redis://r", "prefix": "remuda"},
                "telemetry": {"http_listen": "127.0.0.1:9000"},
            })
        );
    }

    #[test]
    fn nothing_said_is_no_field() {
        assert_eq!(
            object([("a", json!(1)), ("b", Value::Null)]),
            json!({"a": 1})
        );
    }
}
