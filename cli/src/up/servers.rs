//! nats-server and redis-server: their configuration, and how they are started.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use broker_schema::stream::MAX_PAYLOAD_BYTES;
use serde::Deserialize;

use super::child::Invocation;
use super::data::Data;
use crate::fleet::private_file;
use crate::programs::Found;

/// What the streams may be given together. Not what the disk has: the server
/// would refuse streams on a small disk that they will never fill.
const JETSTREAM_BYTES: u64 = 64 << 30;

#[derive(Debug, thiserror::Error)]
pub(super) enum ServerError {
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the data folder {path} has a name that is not text, give another --data")]
    NotText { path: PathBuf },
}

/// One nats-server of ours.
#[derive(Debug)]
pub(super) struct Nats {
    pub(super) found: Found,
    /// Tells ours from another that took the port.
    pub(super) name: String,
    /// Known once it has said so; kept from then on.
    pub(super) port: Option<u16>,
}

impl Nats {
    pub(super) fn invocation(&self, data: &Data) -> Result<Invocation, ServerError> {
        let run = data.run();
        let config = nats_config(&self.name, self.port, &data.root.join("nats"), &run)?;
        let path = run.join("nats.conf");
        write_private(&path, &config)?;
        Ok(Invocation {
            program: self.found.path.clone(),
            args: vec!["--config".into(), path.into()],
            hold: Some(data.servers_lock()),
        })
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.port.map(|port| (Ipv4Addr::LOCALHOST, port).into())
    }

    /// Reads the port from the file that the server writes.
    pub(super) fn find_port(&mut self, run: &Path, pid: i32) {
        if self.port.is_none() {
            let program = self.found.path.file_name().unwrap_or_default();
            let file = run.join(format!("{}_{pid}.ports", program.display()));
            self.port = fs::read(file).ok().and_then(|text| port_of(&text));
        }
    }
}

fn nats_config(
    name: &str,
    port: Option<u16>,
    store: &Path,
    run: &Path,
) -> Result<String, ServerError> {
    let port = port.map_or(-1, i32::from);
    let mut text = String::new();
    let store = quoted(store)?;
    let run = quoted(run)?;
    // Written to a String: cannot fail.
    let _ = write!(
        text,
        "server_name: {name}\n\
         host: \"127.0.0.1\"\n\
         port: {port}\n\
         ports_file_dir: {run}\n\
         max_payload: {MAX_PAYLOAD_BYTES}\n\
         jetstream {{\n  store_dir: {store}\n  max_file_store: {JETSTREAM_BYTES}\n}}\n"
    );
    Ok(text)
}

#[derive(Deserialize)]
struct PortsFile {
    nats: Vec<String>,
}

fn port_of(ports_file: &[u8]) -> Option<u16> {
    let ports: PortsFile = serde_json::from_slice(ports_file).ok()?;
    ports.nats.first()?.rsplit_once(':')?.1.parse().ok()
}

/// One redis-server of ours.
#[derive(Debug)]
pub(super) struct Redis {
    pub(super) found: Found,
    pub(super) password: String,
    pub(super) port: u16,
    /// Once it has answered there, it stays there.
    pub(super) settled: bool,
}

impl Redis {
    pub(super) fn invocation(&self, data: &Data) -> Result<Invocation, ServerError> {
        let path = data.run().join("redis.conf");
        let config = redis_config(self.port, &self.password, &data.root.join("redis"))?;
        write_private(&path, &config)?;
        Ok(Invocation {
            program: self.found.path.clone(),
            args: vec![path.into()],
            hold: Some(data.servers_lock()),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub(super) fn url(&self) -> String {
        format!("redis://:{}@{}", self.password, self.address())
    }
}

fn redis_config(port: u16, password: &str, folder: &Path) -> Result<String, ServerError> {
    let folder = quoted(folder)?;
    Ok(format!(
        "bind 127.0.0.1\n\
         port {port}\n\
         requirepass {password}\n\
         dir {folder}\n\
         appendonly yes\n\
         appendfsync everysec\n\
         save \"\"\n\
         maxmemory-policy noeviction\n\
         daemonize no\n"
    ))
}

/// A password that nobody guesses.
pub(super) fn password() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// In quotes that both configuration languages understand.
fn quoted(path: &Path) -> Result<String, ServerError> {
    let text = path.to_str().ok_or_else(|| ServerError::NotText {
        path: path.to_owned(),
    })?;
    Ok(format!(
        "\"{}\"",
        text.replace('\\', "\\\\").replace('"', "\\\"")
    ))
}

pub(super) fn write_private(path: &Path, text: &str) -> Result<(), ServerError> {
    private_file(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| ServerError::Write {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nats_takes_any_port_first_and_keeps_it() {
        let config =
            |port| nats_config("n1", port, Path::new("/d/na\"ts"), Path::new("/d/run")).unwrap();
        let first = config(None);
        assert!(first.contains("port: -1\n"), "{first}");
        assert!(first.contains(r#"store_dir: "/d/na\"ts""#), "{first}");
        assert!(first.contains("max_payload: 8388608\n"), "{first}");
        assert!(config(Some(4321)).contains("port: 4321\n"));
    }

    #[test]
    fn the_ports_file_tells_the_port() {
        let text = br#"{"nats": ["nats://127.0.0.1:40123"], "monitoring": []}"#;
        assert_eq!(port_of(text), Some(40123));
        assert_eq!(port_of(b"{"), None);
        assert_eq!(port_of(br#"{"nats": []}"#), None);
    }

    #[test]
    fn redis_keeps_everything_and_wants_a_password() {
        let config = redis_config(7001, "s3cret", Path::new("/d/redis")).unwrap();
        for line in [
            "bind 127.0.0.1",
            "requirepass s3cret",
            "appendonly yes",
            "appendfsync everysec",
            "maxmemory-policy noeviction",
            "save \"\"",
        ] {
            assert!(
                config.lines().any(|found| found == line),
                "{line} in {config}"
            );
        }
        assert_ne!(password(), password());
    }
}
