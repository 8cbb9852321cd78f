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
    let mut stream = connect(url).await?;
    send(&mut stream, words).await?;
    Ok(answer(&mut stream).await?)
}

/// Runs many commands, all sent before the first answer is read; the first error.
pub async fn ask_all(url: &str, commands: &[Vec<String>]) -> anyhow::Result<()> {
    let mut stream = connect(url).await?;
    for part in commands.chunks(500) {
        for words in part {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            send(&mut stream, &words).await?;
        }
        for words in part {
            if let Err(error) = answer(&mut stream).await? {
                anyhow::bail!("redis answers {words:?} with: {error}");
            }
        }
    }
    Ok(())
}

/// A connection to a `redis://[[user]:password@]host:port`.
async fn connect(url: &str) -> anyhow::Result<BufReader<TcpStream>> {
    let rest = url.strip_prefix("redis://").unwrap_or(url);
    let (user, host) = rest.rsplit_once('@').unwrap_or(("", rest));
    let stream = TcpStream::connect(host.trim_end_matches('/')).await?;
    let mut stream = BufReader::new(stream);
    if let Some((_, password)) = user.split_once(':') {
        send(&mut stream, &["AUTH", password]).await?;
        let answer = answer(&mut stream).await?;
        answer.map_err(|error| anyhow::anyhow!("redis does not let us in: {error}"))?;
    }
    Ok(stream)
}

/// The answer, or the error that the server answers with.
async fn request(address: SocketAddr, words: &[&str]) -> io::Result<Result<String, String>> {
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    send(&mut stream, words).await?;
    answer(&mut stream).await
}

async fn send(stream: &mut BufReader<TcpStream>, words: &[&str]) -> io::Result<()> {
    let bulk = words
        .iter()
        .map(|word| format!("${}\r\n{word}\r\n", word.len()));
    let text: Vec<String> = std::iter::once(format!("*{}\r\n", words.len()))
        .chain(bulk)
        .collect();
    stream.write_all(text.concat().as_bytes()).await
}

async fn answer(stream: &mut BufReader<TcpStream>) -> io::Result<Result<String, String>> {
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
            let length: usize = rest.parse().map_err(|_| unexpected())?;
            let mut bytes = vec![0; length + 2];
            stream.read_exact(&mut bytes).await?;
            bytes.truncate(bytes.len().saturating_sub(2));
            Ok(Ok(String::from_utf8_lossy(&bytes).into_owned()))
        }
        _ => Err(unexpected()),
    }
}
