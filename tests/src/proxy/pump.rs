//! One direction of one connection.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::filter::PubAcks;
use super::{Rules, Shared};

const PIECE: usize = 64 * 1024;
/// Pieces that may be on their way at once.
const ON_THE_WAY: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Up,
    Down,
}

impl Direction {
    fn held(self, rules: &Rules) -> bool {
        match self {
            Self::Up => rules.hold_up,
            Self::Down => rules.hold_down,
        }
    }
}

/// Passes bytes on until the sender ends; true where the connection was torn in
/// the middle, and is to be reset.
pub(super) async fn pump(
    direction: Direction,
    from: &TcpStream,
    to: &TcpStream,
    second: Option<&TcpStream>,
    shared: &Shared,
) -> bool {
    let (sender, receiver) = mpsc::channel(ON_THE_WAY);
    // Its end is the sender's, which tells the writer.
    let reading = async move {
        let mut buffer = vec![0; PIECE];
        loop {
            let count = read(from, &mut buffer).await;
            if count == 0 {
                return;
            }
            let due = Instant::now() + shared.rules.borrow().latency;
            if sender.send((due, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writing = write_all(direction, receiver, to, second, shared);
    tokio::pin!(reading, writing);
    // The end of the sender is passed on once everything before it was.
    tokio::select! {
        torn = &mut writing => torn,
        () = &mut reading => writing.await,
    }
}

async fn write_all(
    direction: Direction,
    mut pieces: mpsc::Receiver<(Instant, Vec<u8>)>,
    to: &TcpStream,
    second: Option<&TcpStream>,
    shared: &Shared,
) -> bool {
    let mut rules = shared.rules.subscribe();
    let mut acks = PubAcks::default();
    while let Some((due, piece)) = pieces.recv().await {
        tokio::time::sleep_until(due).await;
        if rules
            .wait_for(|rules| !direction.held(rules))
            .await
            .is_err()
        {
            return false;
        }
        let filtered;
        let bytes = if direction == Direction::Down {
            let drop_acks = rules.borrow().drop_pub_acks;
            let (passed, dropped) = acks.pass(&piece, drop_acks);
            shared
                .counts
                .dropped_acks
                .fetch_add(dropped, Ordering::Relaxed);
            filtered = passed;
            &filtered[..]
        } else {
            &piece[..]
        };
        let torn = direction == Direction::Down && bytes.len() > 1 && take_one(shared);
        let bytes = if torn {
            &bytes[..bytes.len() / 2]
        } else {
            bytes
        };
        if let Some(second) = second {
            // The shadow may be gone; nobody waits for it.
            let _ = write(second, bytes).await;
        }
        if paced(to, bytes, &mut rules).await.is_err() {
            return false;
        }
        if torn {
            shared.counts.resets.fetch_add(1, Ordering::Relaxed);
            return true;
        }
    }
    false
}

fn take_one(shared: &Shared) -> bool {
    shared
        .torn
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        })
        .is_ok()
}

/// Writes at the rate of the rules, which may change meanwhile.
async fn paced(
    to: &TcpStream,
    mut bytes: &[u8],
    rules: &mut watch::Receiver<Rules>,
) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let rate = rules.borrow_and_update().rate;
        let Some(rate) = rate else {
            return write(to, bytes).await;
        };
        let slice = (rate as usize / 10).max(1).min(bytes.len());
        write(to, &bytes[..slice]).await?;
        bytes = &bytes[slice..];
        let pause = Duration::from_secs_f64(slice as f64 / f64::from(rate.max(1)));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = rules.changed() => {}
        }
    }
    Ok(())
}

/// 0 at the end, and where the connection broke.
pub(super) async fn read(from: &TcpStream, buffer: &mut [u8]) -> usize {
    loop {
        if from.readable().await.is_err() {
            return 0;
        }
        match from.try_read(buffer) {
            Ok(count) => return count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return 0,
        }
    }
}

async fn write(to: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
