//! What only some faults of the harness need. Nothing else does, so that what
//! cannot be had is told and left.

use std::path::Path;

use crate::python;
use crate::workspace::Workspace;
use crate::{apt, shell};

/// A Debian package and a file that tells that it is there.
const PACKAGES: [(&str, &str); 2] = [
    ("iproute2", "/usr/sbin/ip"),
    ("iptables", "/usr/sbin/iptables"),
];

/// Older servers, which the harness replaces by newer ones.
pub(crate) const OLD_NATS: [&str; 2] = ["2.11.11", "2.12.8"];

/// Installs what is missing, as far as that works.
pub(crate) fn install(workspace: &Workspace) {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, file)| !Path::new(file).exists())
        .map(|(package, _)| *package)
        .collect();
    if !missing.is_empty()
        && let Err(error) = apt::install(&missing)
    {
        eprintln!("left out, some faults will be skipped: {error:#}");
    }
    for version in OLD_NATS {
        if shell::is_executable(&workspace.old_nats(version)) {
            continue;
        }
        if let Err(error) = python::install_old_nats(workspace, version) {
            eprintln!("left out, some faults will be skipped: {error:#}");
        }
    }
}
