//! Debian packages, without letting them start services.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, bail};

use crate::shell::{run, which};

/// Updates the lists, then installs. While it runs, a `policy-rc.d` that
/// forbids starting services stands in, unless the machine has one of its own:
/// Remuda starts its servers itself, on ports of their own.
const SCRIPT: &str = r#"set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o Acquire::Retries=3 update
apt-get -qq -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 install --no-install-recommends "$@"
"#;

pub(crate) fn install(packages: &[&str]) -> anyhow::Result<()> {
    let inherited = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<_> = std::env::split_paths(&inherited).collect();
    let by_hand = format!("install these by hand: {}", packages.join(" "));
    if which("apt-get", &path).is_none() {
        bail!("no apt-get on this machine; {by_hand}");
    }
    let mut command = if is_root()? {
        Command::new("sh")
    } else if which("sudo", &path).is_some() {
        let mut sudo = Command::new("sudo");
        sudo.arg("sh");
        sudo
    } else {
        bail!(
            "not root, and no sudo; as root, run `apt-get install {}`",
            packages.join(" ")
        );
    };
    run(command.args(["-c", SCRIPT, "setup"]).args(packages)).context(by_hand)
}

fn is_root() -> anyhow::Result<bool> {
    let own = std::fs::metadata("/proc/self").context("cannot read /proc/self")?;
    Ok(own.uid() == 0)
}
