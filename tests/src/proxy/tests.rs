#![expect(
    clippy::disallowed_methods,
    reason = "a stranger at the other end, in no span of ours"
)]

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use super::{Proxy, Rules};

const PATIENCE: Duration = Duration::from_secs(20);

/// A server that sends back what it gets.
async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

async fn connected() -> (Proxy, TcpStream) {
    let proxy = Proxy::local(echo().await).await.unwrap();
    let client = TcpStream::connect(proxy.address()).await.unwrap();
    (proxy, client)
}

async fn round_trip(client: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Duration> {
    let since = Instant::now();
    client.write_all(bytes).await?;
    let mut back = vec![0; bytes.len()];
    tokio::time::timeout(PATIENCE, client.read_exact(&mut back)).await??;
    assert!(back == bytes, "other bytes came back");
    Ok(since.elapsed())
}

#[tokio::test]
async fn bytes_pass_late_and_whole() {
    let (proxy, mut client) = connected().await;
    let large: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut read, mut write) = client.split();
    let mut back = vec![0; large.len()];
    let (sent, got) = tokio::join!(write.write_all(&large), read.read_exact(&mut back));
    sent.unwrap();
    got.unwrap();
    assert!(back == large, "other bytes came back");
    let latency = Duration::from_millis(150);
    proxy.set(Rules {
        latency,
        ..Rules::default()
    });
    assert!(round_trip(&mut client, b"late").await.unwrap() >= 2 * latency);
    proxy.heal();
    round_trip(&mut client, b"again").await.unwrap();
}

#[tokio::test]
async fn a_slow_line_becomes_fast_again_at_once() {
    let (proxy, mut client) = connected().await;
    proxy.set(Rules {
        rate: Some(1),
        ..Rules::default()
    });
    client.write_all(&[7; 1000]).await.unwrap();
    let mut first = [0];
    client.read_exact(&mut first).await.unwrap();
    proxy.heal();
    let mut rest = [0; 999];
    tokio::time::timeout(PATIENCE, client.read_exact(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn what_is_held_comes_later() {
    for (hold_up, hold_down) in [(true, false), (false, true)] {
        let (proxy, mut client) = connected().await;
        round_trip(&mut client, b"before").await.unwrap();
        proxy.set(Rules {
            hold_up,
            hold_down,
            ..Rules::default()
        });
        client.write_all(b"held").await.unwrap();
        let mut back = [0; 4];
        let held = Duration::from_millis(200);
        let early = tokio::time::timeout(held, client.read_exact(&mut back)).await;
        assert!(early.is_err(), "it passed");
        proxy.heal();
        client.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"held");
    }
}

#[tokio::test]
async fn connections_are_reset_now_or_in_the_middle_of_something() {
    let (proxy, mut client) = connected().await;
    round_trip(&mut client, b"before").await.unwrap();
    proxy.reset();
    let error = client.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.tear(1);
    client.write_all(b"12345678").await.unwrap();
    let mut back = Vec::new();
    let error = client.read_to_end(&mut back).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(back.len() < 8, "{back:?}");
    assert_eq!(proxy.done().torn, 1);
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut client, b"after").await.unwrap();
}

#[tokio::test]
async fn connections_are_doubled_and_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::local(listener.local_addr().unwrap()).await.unwrap();
    proxy.set(Rules {
        double: true,
        ..Rules::default()
    });
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut first, _) = listener.accept().await.unwrap();
    let (mut second, _) = listener.accept().await.unwrap();
    client.write_all(b"twice").await.unwrap();
    for server in [&mut first, &mut second] {
        let mut got = [0; 5];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"twice");
    }
    proxy.set(Rules {
        refuse: true,
        ..Rules::default()
    });
    let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
    let mut nothing = [0];
    assert!(matches!(refused.read(&mut nothing).await, Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_proxy_that_is_dropped_takes_its_connections_with_it() {
    let (proxy, mut client) = connected().await;
    round_trip(&mut client, b"before").await.unwrap();
    drop(proxy);
    let end = tokio::time::timeout(PATIENCE, client.read_u8())
        .await
        .unwrap();
    assert!(end.is_err());
}
