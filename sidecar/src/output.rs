//! The pipes of a command: what it writes, as bytes, with bounded memory; and
//! what it is given to read, without ever waiting for it to do so.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use bytes::{Buf, Bytes};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe2, read, write};
use remuda_proto::v1::{ExecuteEvent, execute_event::Event};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::history::Account;
use crate::sys::{pending_bytes, watch};

pub(crate) type Events = mpsc::Sender<Result<ExecuteEvent, Status>>;

const PIECE: usize = 64 * 1024;

thread_local! {
    /// Every pipe is read into the same buffer: there is one thread, and a
    /// read is copied out before anything else runs.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One output stream of a command.
#[derive(Debug)]
pub(crate) struct Outlet {
    /// Gone once its end was read.
    pipe: Option<AsyncFd<OwnedFd>>,
    event: fn(Bytes) -> Event,
    limit: u64,
    kept: u64,
    dropped: u64,
    account: Account,
}

enum Piece {
    Kept(Bytes),
    Dropped(usize),
    Empty,
    End,
}

/// The reader of the events is gone.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl Outlet {
    /// Makes a pipe; the writing end is the command's.
    pub(crate) fn new(event: fn(Bytes) -> Event, limit: u64) -> Result<(Self, OwnedFd), Errno> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let pipe = Some(watch(reader, Interest::READABLE).map_err(|error| errno(&error))?);
        Ok((
            Self {
                pipe,
                event,
                limit,
                kept: 0,
                dropped: 0,
                account: Account::default(),
            },
            writer,
        ))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// Passes on one piece, when there is one and room for it. May be dropped
    /// at any await without losing anything.
    pub(crate) async fn pass_one(&mut self, events: &Events) -> Result<(), ReaderGone> {
        loop {
            // The room first: what was read must have somewhere to go.
            let room = self.room(events).await?;
            let Some(pipe) = &self.pipe else {
                return Ok(());
            };
            let Ok(mut ready) = pipe.readable().await else {
                self.pipe = None;
                return Ok(());
            };
            match read_piece(pipe.get_ref(), self.limit - self.kept) {
                Piece::Empty => ready.clear_ready(),
                piece => {
                    drop(ready);
                    self.settle(piece, room);
                    return Ok(());
                }
            }
        }
    }

    /// Passes on what the pipe holds now that the command has ended, and what
    /// others who hold it write until `grace`, but no longer.
    pub(crate) async fn drain(
        &mut self,
        events: &Events,
        grace: Instant,
    ) -> Result<(), ReaderGone> {
        let mut owed = self.pipe.as_ref().map_or(0, pending_bytes);
        while self.is_open() && (owed > 0 || Instant::now() < grace) {
            let room = self.room(events).await?;
            let Some(pipe) = &self.pipe else {
                return Ok(());
            };
            match read_piece(pipe.get_ref(), self.limit - self.kept) {
                Piece::Empty => {
                    owed = 0;
                    drop(room);
                    match timeout_at(grace, pipe.readable()).await {
                        Ok(Ok(mut ready)) => {
                            // Readiness may be a memory of what was read since.
                            if pending_bytes(pipe) == 0 && !ready.ready().is_read_closed() {
                                ready.clear_ready();
                            }
                        }
                        Ok(Err(_)) => self.pipe = None,
                        Err(_) => return Ok(()),
                    }
                }
                piece => owed = owed.saturating_sub(self.settle(piece, room)),
            }
        }
        Ok(())
    }

    /// A place among the events, unless all that comes is dropped anyway.
    async fn room<'a>(&self, events: &'a Events) -> Result<Option<Room<'a>>, ReaderGone> {
        if self.kept == self.limit {
            return Ok(None);
        }
        events.reserve().await.map(Some).map_err(|_| ReaderGone)
    }

    fn settle(&mut self, piece: Piece, room: Option<Room<'_>>) -> usize {
        match piece {
            Piece::Kept(bytes) => {
                let length = bytes.len();
                self.kept += length as u64;
                self.account.add(&bytes);
                if let Some(room) = room {
                    room.send(Ok(ExecuteEvent {
                        event: Some((self.event)(bytes)),
                    }));
                }
                length
            }
            Piece::Dropped(length) => {
                self.dropped += length as u64;
                length
            }
            Piece::Empty => 0,
            Piece::End => {
                self.pipe = None;
                0
            }
        }
    }
}

type Room<'a> = mpsc::Permit<'a, Result<ExecuteEvent, Status>>;

/// Reads once. Never more than may be kept, so that a piece is kept or dropped
/// whole.
fn read_piece(pipe: &OwnedFd, keep: u64) -> Piece {
    let most = if keep == 0 {
        PIECE
    } else {
        keep.min(PIECE as u64) as usize
    };
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.is_empty() {
            scratch.resize(PIECE, 0);
        }
        let buffer = scratch.get_mut(..most).unwrap_or_default();
        loop {
            return match read(pipe, buffer) {
                Ok(0) => Piece::End,
                Ok(length) if keep == 0 => Piece::Dropped(length),
                Ok(length) => Piece::Kept(Bytes::copy_from_slice(
                    buffer.get(..length).unwrap_or_default(),
                )),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Piece::Empty,
                Err(_) => Piece::End,
            };
        }
    })
}

/// What is left to write to a command's stdin.
#[derive(Debug)]
pub(crate) struct Inlet {
    pipe: Option<AsyncFd<OwnedFd>>,
    rest: Bytes,
}

impl Inlet {
    pub(crate) fn closed() -> Self {
        Self {
            pipe: None,
            rest: Bytes::new(),
        }
    }

    /// Makes a pipe and fills it as far as it goes, which for most is all.
    pub(crate) fn new(content: Bytes) -> Result<(Self, OwnedFd), Errno> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut rest = content;
        while !rest.is_empty() {
            match write(&writer, &rest) {
                Ok(length) => rest.advance(length),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        if rest.is_empty() {
            return Ok((Self::closed(), reader));
        }
        let pipe = Some(watch(writer, Interest::WRITABLE).map_err(|error| errno(&error))?);
        Ok((Self { pipe, rest }, reader))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Writes once, when there is room. Closes after the last byte, or when
    /// nobody is left who could read.
    pub(crate) async fn feed(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let over = match pipe.writable().await {
            Err(_) => true,
            Ok(mut ready) => match write(pipe.get_ref(), &self.rest) {
                Ok(length) => {
                    self.rest.advance(length);
                    self.rest.is_empty()
                }
                Err(Errno::EINTR) => false,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    false
                }
                Err(_) => true,
            },
        };
        if over {
            *self = Self::closed();
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
