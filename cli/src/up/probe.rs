//! Does a part answer? Plain sockets: a question before any client is there.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// One question may take no longer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest answer that is read.
const MOST_BYTES: u64 = 64 * 1024;

#[derive(Deserialize)]
struct NatsInfo {
    #[serde(default)]
    server_name: String,
    #[serde(default)]
    jetstream: bool,
}

/// A loopback port that is free at this moment.
pub(super) async fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    Ok(listener.local_addr()?.port())
}

/// Ok when the nats-server called `name` is there, with JetStream.
pub(super) async fn nats(address: SocketAddr, name: &str) -> Result<(), String> {
    let line = bounded(async {
        let stream = TcpStream::connect(address).await?;
        let mut line = String::new();
        BufReader::new(stream.take(MOST_BYTES))
            .read_line(&mut line)
            .await?;
        Ok(line)
    })
    .await?;
    let json = line.strip_prefix("INFO ").unwrap_or_default();
    let info: NatsInfo = serde_json::from_str(json).map_err(|error| error.to_string())?;
    match info {
        NatsInfo { server_name, .. } if server_name != name => {
            Err(format!("another server answers at {address}"))
        }
        NatsInfo {
            jetstream: false, ..
        } => Err("JetStream is not enabled yet".to_owned()),
        NatsInfo { .. } => Ok(()),
    }
}

/// Ok when the Redis server knows the password and has loaded its data.
pub(super) async fn redis(address: SocketAddr, password: &str) -> Result<(), String> {
    let answers = bounded(async {
        let mut stream = TcpStream::connect(address).await?;
        let question = format!("AUTH {password}\r\nPING\r\nQUIT\r\n");
        stream.write_all(question.as_bytes()).await?;
        let mut text = String::new();
        stream.take(MOST_BYTES).read_to_string(&mut text).await?;
        Ok(text)
    })
    .await?;
    match answers.lines().find(|line| *line != "+OK") {
        Some("+PONG") => Ok(()),
        Some(other) => Err(other.trim_start_matches('-').to_owned()),
        None => Err("no answer".to_owned()),
    }
}

/// Ok when a daemon's `/readyz` says so; otherwise what it lacks.
pub(super) async fn ready(address: SocketAddr) -> Result<(), String> {
    let text = bounded(async {
        let mut stream = TcpStream::connect(address).await?;
        let question =
            format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(question.as_bytes()).await?;
        let mut text = String::new();
        stream.take(MOST_BYTES).read_to_string(&mut text).await?;
        Ok(text)
    })
    .await?;
    let status = text.split(' ').nth(1).unwrap_or_default();
    if status == "200" {
        return Ok(());
    }
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Err(format!("{status} {}", body.trim()))
}

async fn bounded<T>(question: impl Future<Output = io::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, question).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err("no answer in time".to_owned()),
    }
}
