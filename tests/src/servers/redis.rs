//! redis-server.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{Kind, Server};
use crate::binaries::tool;

/// How a redis-server is started.
#[derive(Debug, Default, Clone)]
pub struct Redis {
    /// Appended to the command line.
    pub args: Vec<String>,
    /// Added to its environment.
    pub envs: Vec<(String, String)>,
}

impl Kind for Redis {
    fn command(&self, address: SocketAddr, data: &Path, _name: &str) -> anyhow::Result<Command> {
        let mut command = Command::new(tool("redis-server")?);
        command
            .args(["--bind", &address.ip().to_string()])
            .args(["--port", &address.port().to_string()])
            .arg("--dir")
            .arg(data)
            .args(["--appendonly", "yes", "--appendfsync", "everysec"])
            .args(["--save", "", "--maxmemory-policy", "noeviction"])
            .args(["--daemonize", "no"])
            .args(&self.args)
            .envs(self.envs.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    async fn answers(&self, address: SocketAddr, _name: &str, pid: i32) -> Result<(), String> {
        let ask = |words: &'static [&'static str]| async move {
            let reply = request(address, words).await;
            reply.map_err(|error| error.to_string())?
        };
        ask(&["PING"]).await?;
        let info = ask(&["INFO", "server"]).await?;
        if info.lines().any(|line| line == format!("process_id:{pid}")) {
            Ok(())
        } else {
            Err(format!("another server than process {pid} answers there"))
        }
    }
}

impl Server<Redis> {
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Runs one command on a connection of its own. An answer that is an error
    /// is a failure; numbers come as text.
    pub async fn command(&self, words: &[&str]) -> anyhow::Result<String> {
        let reply = request(self.address(), words).await?;
        reply.map_err(|error| anyhow::anyhow!("redis answers `{}` with: {error}", words.join(" ")))
    }
}

/// Runs one command on any Redis, on a connection of its own. `Err` is the server's own word, and
/// "nothing" where there is nothing.
pub async fn ask(url: &str, words: &[&str]) -> anyhow::Result<Result<String, String>> {
    let host = url.strip_prefix("redis://").unwrap_or(url);
    let host = host.rsplit('@').next().unwrap_or(host);
    let address = host.trim_end_matches('/').parse()?;
    Ok(request(address, words).await?)
}

/// The answer, or the error that the server answers with.
async fn request(address: SocketAddr, words: &[&str]) -> io::Result<Result<String, String>> {
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    let bulk = words
        .iter()
        .map(|word| format!("${}\r\n{word}\r\n", word.len()));
    let text: Vec<String> = std::iter::once(format!("*{}\r\n", words.len()))
        .chain(bulk)
        .collect();
    stream.write_all(text.concat().as_bytes()).await?;

    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let line = line.trim_end();
    let unexpected = || io::Error::other(format!("not an answer of Redis: {line:?}"));
    let (kind, rest) = line.split_at_checked(1).ok_or_else(unexpected)?;
    match kind {
        "+" | ":" => Ok(Ok(rest.to_owned())),
        "-" => Ok(Err(rest.to_owned())),
        "$" if rest == "-1" => Ok(Err("nothing".to_owned())),
        "$" => {
            let mut bytes = vec![0; rest.parse().map_err(|_| unexpected())?];
            stream.read_exact(&mut bytes).await?;
            Ok(Ok(String::from_utf8_lossy(&bytes).into_owned()))
        }
        _ => Err(unexpected()),
    }
}
