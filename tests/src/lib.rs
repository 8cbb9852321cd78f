//! Whole-system tests: real servers, real binaries, real kernels.
//!
//! This library holds what they share. Everything started here dies with the
//! test that started it, even when that test is killed.

pub mod binaries;
pub mod check;
pub mod cluster;
pub mod docs;
pub mod faults;
pub mod fleet;
pub mod history;
pub mod leftovers;
pub mod metrics;
pub mod port;
pub mod process;
pub mod proxy;
pub mod servers;
mod spawner;
pub mod wait;
