//! Leases, warm inventory, heartbeats and claims in Redis: Lua scripts and their typed API.
