//! Whole-system tests: real servers, real binaries, real kernels.
