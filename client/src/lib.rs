//! Remuda for Rust: submit, stream, sessions, cancel, and the broker access that the daemons share.

mod batch;
pub mod broker;
mod cancel;
mod client;
mod consume;
mod credit;
mod error;
mod follow;
mod handed;
mod listen;
mod outbox;
mod output;
mod pace;
mod reader;
mod reassemble;
mod session;
mod submit;
mod track;

pub use cancel::{CancelReply, CancelState};
pub use client::{Client, ClientOptions};
pub use consume::{Delivered, ResultConsumer};
pub use credit::CreditStream;
pub use error::ClientError;
pub use output::OutputStream;
pub use pace::Pacer;
pub use reader::Until;
pub use reassemble::OutputEvent;
pub use session::Session;
pub use submit::Submitted;

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
