//! Remuda for Rust: submit, stream, sessions, cancel, and the broker access that the daemons share.

pub mod broker;
