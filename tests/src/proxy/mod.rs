//! A TCP proxy that does to connections what bad networks do.
//!
//! It stands between a client and a server of a test. What it does can be
//! changed while connections run.

mod filter;
mod pump;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use remuda_telemetry::task;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use pump::{Direction, pump};

/// What the proxy does to everything that passes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is done or not")]
pub struct Rules {
    /// Every byte is this late, in both directions.
    pub latency: Duration,
    /// Bytes per second, in each direction of each connection; none for no bound.
    pub rate: Option<u32>,
    /// Nothing passes from the client, and nothing is lost: what TCP makes of
    /// packets that are dropped for a while.
    pub hold_up: bool,
    /// The same from the server.
    pub hold_down: bool,
    /// Acknowledgements of published messages do not reach their NATS client;
    /// everything else does.
    pub drop_pub_acks: bool,
    /// New connections are made to the server twice: it gets everything that
    /// the client sends two times over, and the client hears the first alone.
    pub double: bool,
    /// New connections are closed at once.
    pub refuse: bool,
}

/// What connections have in common with whoever steers them.
#[derive(Debug)]
pub(crate) struct Shared {
    rules: watch::Sender<Rules>,
    /// Connections that began before this was raised are reset.
    resets: watch::Sender<u64>,
    /// Reset in the middle of the next piece that passes, this often.
    torn: AtomicU64,
    counts: Counts,
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    connections: AtomicU64,
    resets: AtomicU64,
    dropped_acks: AtomicU64,
}

/// What it has done up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    pub connections: u64,
    /// Connections that were torn in the middle of something.
    pub torn: u64,
    pub dropped_acks: u64,
}

/// A running proxy. Dropping it closes its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of `host`, and passes on to `server`.
    pub async fn start(host: std::net::IpAddr, server: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((host, 0))
            .await
            .with_context(|| format!("cannot listen on {host}"))?;
        let address = listener.local_addr().context("a socket has no address")?;
        let shared = Arc::new(Shared {
            rules: watch::Sender::new(Rules::default()),
            resets: watch::Sender::new(0),
            torn: AtomicU64::new(0),
            counts: Counts::default(),
        });
        let accepting = task::spawn("proxy", accept(listener, server, shared.clone()));
        Ok(Self {
            address,
            shared,
            accepting,
        })
    }

    /// The same on this machine's loopback.
    pub async fn local(server: SocketAddr) -> anyhow::Result<Self> {
        Self::start(std::net::Ipv4Addr::LOCALHOST.into(), server).await
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on this is done.
    pub fn set(&self, rules: Rules) {
        self.shared.rules.send_replace(rules);
    }

    /// Everything passes again as it is.
    pub fn heal(&self) {
        self.shared.torn.store(0, Ordering::Relaxed);
        self.set(Rules::default());
    }

    /// Resets every connection that there is (RST, not FIN).
    pub fn reset(&self) {
        self.shared.resets.send_modify(|resets| *resets += 1);
    }

    /// The next `times` pieces that the server sends pass by half, then their
    /// connection is reset.
    pub fn tear(&self, times: u64) {
        self.shared.torn.store(times, Ordering::Relaxed);
    }

    pub fn done(&self) -> Done {
        let counts = &self.shared.counts;
        Done {
            connections: counts.connections.load(Ordering::Relaxed),
            torn: counts.resets.load(Ordering::Relaxed),
            dropped_acks: counts.dropped_acks.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, shared: Arc<Shared>) {
    // Aborted with this task: dropping the set ends its connections.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                if shared.rules.borrow().refuse {
                    continue;
                }
                shared.counts.connections.fetch_add(1, Ordering::Relaxed);
                connections.spawn(connection(client, server, shared.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection until either side ends it or it is reset.
async fn connection(client: TcpStream, server: SocketAddr, shared: Arc<Shared>) {
    let mut resets = shared.resets.subscribe();
    resets.mark_unchanged();
    let double = shared.rules.borrow().double;
    let Ok(upstream) = TcpStream::connect(server).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = upstream.set_nodelay(true);
    let second = if double {
        TcpStream::connect(server).await.ok()
    } else {
        None
    };
    let torn = {
        // A shadow's answers are read and forgotten, or it would stall.
        let shadow = async {
            match &second {
                Some(second) => drain(second).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            torn = pump(Direction::Up, &client, &upstream, second.as_ref(), &shared) => torn,
            torn = pump(Direction::Down, &upstream, &client, None, &shared) => torn,
            () = shadow => false,
            _ = resets.changed() => true,
        }
    };
    if torn {
        let _ = client.set_zero_linger();
        let _ = upstream.set_zero_linger();
    }
}

/// Reads until the end; pending for good afterwards, since the first goes on.
async fn drain(stream: &TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    while pump::read(stream, &mut buffer).await > 0 {}
    std::future::pending::<()>().await;
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
