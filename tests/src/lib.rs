//! Whole-system tests: real servers, real binaries, real kernels.
//!
//! This library holds what they share. Everything started here dies with the
//! test that started it, even when that test is killed.

pub mod binaries;
pub mod docs;
pub mod fleet;
pub mod leftovers;
pub mod port;
pub mod process;
pub mod servers;
mod spawner;
pub mod wait;
