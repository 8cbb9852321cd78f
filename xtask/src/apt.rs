//! Debian packages, without letting them start services.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, bail};

use crate::shell::which;

/// Updates the lists, then installs. Remuda starts its servers itself, on ports
/// of their own, so no service is to be started, now or at the next boot: while
/// packages are installed a `policy-rc.d` that forbids it stands in, unless the
/// machine has one, and a unit that was not there before is disabled.
const SCRIPT: &str = r#"set -eu
policy=/usr/sbin/policy-rc.d
unit=/lib/systemd/system/redis-server.service
had_unit=; [ ! -e "$unit" ] || had_unit=yes
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q -o Acquire::Retries=3 update
apt-get -q -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
    install --no-install-recommends "$@"
if [ -e "$unit" ] && [ -z "$had_unit" ] && command -v systemctl >/dev/null; then
    systemctl disable redis-server
fi
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
    eprintln!("$ apt-get install {}", packages.join(" "));
    let output = command
        .args(["-c", SCRIPT, "setup"])
        .args(packages)
        .output()
        .context("cannot start a shell")?;
    if !output.status.success() {
        bail!(
            "installing Debian packages failed ({}):\n{}{}\n{by_hand}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn is_root() -> anyhow::Result<bool> {
    let own = std::fs::metadata("/proc/self").context("cannot read /proc/self")?;
    Ok(own.uid() == 0)
}
