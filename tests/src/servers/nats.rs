//! nats-server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;

use super::{Kind, Server};
use crate::binaries::tool;

/// How a nats-server is started.
#[derive(Debug, Default, Clone)]
pub struct Nats {
    /// Appended to the command line.
    pub args: Vec<String>,
    /// Another program than the one that is found.
    pub program: Option<PathBuf>,
}

impl Kind for Nats {
    fn command(&self, address: SocketAddr, data: &Path, name: &str) -> anyhow::Result<Command> {
        let program = match &self.program {
            Some(program) => program.clone(),
            None => tool("nats-server")?,
        };
        // By itself it allows the streams three quarters of what is free on the disk, which may be
        // less than they reserve. They are sparse: nothing of this is used up.
        let config = data.join("nats-server.conf");
        std::fs::write(&config, "jetstream { max_file_store: 68719476736 }\n")
            .with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new(program);
        command
            .arg("--config")
            .arg(&config)
            .args(["--addr", &address.ip().to_string()])
            .args(["--port", &address.port().to_string()])
            .args(["--name", name, "--jetstream", "--store_dir"])
            .arg(data)
            .args(&self.args);
        Ok(command)
    }

    async fn answers(&self, address: SocketAddr, name: &str, _pid: i32) -> Result<(), String> {
        let info = read_info(address)
            .await
            .map_err(|error| error.to_string())?;
        let server = info["server_name"].as_str().unwrap_or_default();
        if server != name {
            return Err(format!("another server answers there: {server:?}"));
        }
        match info["jetstream"].as_bool() {
            Some(true) => Ok(()),
            _ => Err("JetStream is not enabled yet".to_owned()),
        }
    }
}

impl Server<Nats> {
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// A plain client.
    pub async fn client(&self) -> anyhow::Result<async_nats::Client> {
        let url = self.url();
        async_nats::connect(&url)
            .await
            .with_context(|| format!("cannot connect to {url}"))
    }
}

/// The line that a server greets with.
async fn read_info(address: SocketAddr) -> std::io::Result<serde_json::Value> {
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let json = line.strip_prefix("INFO ").unwrap_or_default();
    Ok(serde_json::from_str(json)?)
}
