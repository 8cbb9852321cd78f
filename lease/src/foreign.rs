//! Keys that stand under the fleet's names and are not the fleet's: another program's, or an
//! operator's mistake. They are renamed, never removed, and what they stood in the way of goes on.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::RedisError;

use crate::error::Fault;
use crate::store::LeaseStore;

/// Nobody looks more often than this: it reads the names of all keys.
const SPACING: Duration = Duration::from_secs(5);
/// Keys in one answer.
const BATCH: usize = 1000;
/// Where they go, under the root.
const ASIDE: &str = "foreign";

/// What is known about foreign keys.
#[derive(Debug, Default)]
pub(crate) struct Foreign {
    looked: Mutex<Option<Instant>>,
    found: AtomicU64,
}

impl LeaseStore {
    /// How many keys were set aside from here since the start.
    pub fn foreign_keys(&self) -> u64 {
        self.foreign().found.load(Ordering::Relaxed)
    }

    /// Sets aside whatever has one of the fleet's names and not its type. Returns the names.
    pub async fn set_foreign_aside(&self) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        for kind in ["string", "list", "set", "zset", "hash", "stream"] {
            for name in self.names_of(kind).await? {
                if expected(&name).is_some_and(|expected| expected != kind) {
                    names.push(name);
                }
            }
        }
        for name in NUMBERS {
            let mut get = redis::cmd("GET");
            get.arg(self.key(name));
            if names.iter().any(|other| other == name) {
                continue;
            }
            let value: Option<String> = self.command(&get).await?;
            if value.is_some_and(|value| value.parse::<u64>().is_err()) {
                names.push(name.to_owned());
            }
        }
        for name in &names {
            let aside = self.key(&format!("{ASIDE}:{name}"));
            let mut rename = redis::cmd("RENAME");
            rename.arg(self.key(name)).arg(&aside);
            match self.command::<String>(&rename).await {
                Ok(_) => tracing::error!(
                    key = self.key(name),
                    renamed = aside,
                    "a key that is not the fleet's stood under its name, set aside: do other \
                     programs use this prefix?"
                ),
                // Somebody else was faster.
                Err(Fault::Redis(error)) => tracing::debug!(%error, name, "not renamed"),
                Err(fault) => return Err(fault),
            }
        }
        let count = u64::try_from(names.len()).unwrap_or(u64::MAX);
        self.foreign().found.fetch_add(count, Ordering::Relaxed);
        Ok(names)
    }

    /// Whether a script that failed like this may work now.
    pub(crate) async fn mended(&self, fault: &Fault) -> bool {
        let Fault::Redis(error) = fault else {
            return false;
        };
        if !tells_of_foreign(error) || !self.foreign().due(Instant::now()) {
            return false;
        }
        match Box::pin(self.set_foreign_aside()).await {
            Ok(names) => !names.is_empty(),
            Err(error) => {
                tracing::warn!(%error, "foreign keys cannot be set aside");
                false
            }
        }
    }

    /// The names, without the root, of all keys of one type that begin with it.
    async fn names_of(&self, kind: &str) -> Result<Vec<String>, Fault> {
        let root = self.key("");
        let mut names = Vec::new();
        let mut cursor = 0_u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(format!("{root}*"));
            scan.arg("COUNT").arg(BATCH).arg("TYPE").arg(kind);
            let (next, keys): (u64, Vec<String>) = self.command(&scan).await?;
            let found = keys.iter().filter_map(|key| key.strip_prefix(&root));
            names.extend(found.map(str::to_owned));
            if next == 0 {
                return Ok(names);
            }
            cursor = next;
        }
    }
}

impl Foreign {
    fn due(&self, now: Instant) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let due = looked.is_none_or(|at| now.duration_since(at) >= SPACING);
        if due {
            *looked = Some(now);
        }
        due
    }
}

/// What Redis says of a key that is something else than a script takes it for.
fn tells_of_foreign(error: &RedisError) -> bool {
    let text = error.to_string();
    ["WRONGTYPE", "Operation against a key", "not an integer"]
        .iter()
        .any(|sign| text.contains(sign))
}

/// Strings that are numbers.
const NUMBERS: [&str; 3] = ["incarnation", "counter", "terms"];

/// The type that a key of the fleet has, by its name without the root; `keys.rs` is where they
/// stand. `None` for what is none.
fn expected(name: &str) -> Option<&'static str> {
    Some(match name.split_once(':') {
        None => match name {
            "incarnation" | "server" | "counter" | "terms" | "schema" => "string",
            "workers" | "dead" | "dispatchers" | "removals" => "zset",
            "pools" | "credit" | "refused" => "hash",
            _ => return None,
        },
        Some(("worker" | "targets" | "sandbox" | "task" | "leader", _)) => "hash",
        Some(("held" | "valid", _)) => "set",
        Some(("warm" | "leased" | "use", _)) => "zset",
        Some(("stop", _)) => "string",
        Some(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_layout_has_a_type_and_no_other_has() {
        // The table of keys.rs is what this must agree with.
        let types = [
            ("string", "string"),
            ("sorted set", "zset"),
            ("hash", "hash"),
            ("set", "set"),
        ];
        let mut keys = 0;
        for line in include_str!("keys.rs").lines() {
            let Some(row) = line.strip_prefix("//! | `") else {
                continue;
            };
            let mut cells = row.split(" | ");
            let (name, kind) = (cells.next().unwrap(), cells.next().unwrap());
            let name = name.split('`').next().unwrap();
            let kind = types.iter().find(|(said, _)| *said == kind).unwrap().1;
            assert_eq!(expected(name), Some(kind), "{name}");
            keys += 1;
        }
        assert!(keys > 10, "{keys}");
        for other in ["", "foreign:pools", "something", "a:b"] {
            assert_eq!(expected(other), None, "{other}");
        }
    }

    #[test]
    fn nobody_looks_all_the_time() {
        let foreign = Foreign::default();
        let now = Instant::now();
        assert!(foreign.due(now));
        assert!(!foreign.due(now + SPACING / 2));
        assert!(foreign.due(now + SPACING));
    }
}
