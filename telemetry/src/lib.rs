//! Logs, traces, metrics, health and named tasks, the same in every daemon.
