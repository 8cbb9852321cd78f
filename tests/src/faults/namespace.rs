//! A network namespace with one cable to the outside, made and removed here.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, bail};

/// Named after the process that made them, so that what a killed one left can
/// be told.
const PREFIX: &str = "rmdf-";
const FOLDER: &str = "/run/netns";

/// Removed when dropped.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    outside: Ipv4Addr,
}

/// Why there can be none here.
pub(crate) fn lacking() -> Option<String> {
    for tool in ["ip", "nsenter", "iptables"] {
        if which(tool).is_none() {
            return Some(format!("no {tool} in PATH"));
        }
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    None
}

pub(crate) fn which(tool: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(tool))
        .find(|candidate| candidate.is_file())
}

/// Which packets are dropped, seen from inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
    Both,
}

impl Namespace {
    pub(crate) fn create() -> anyhow::Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let process = std::process::id();
        for _ in 0..64 {
            let slot = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{PREFIX}{process}-{slot}");
            // Out of the range for benchmarks of networks, which nobody routes.
            let at = (process as u16).wrapping_mul(31).wrapping_add(slot) & 0x7fff;
            let block = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + u32::from(at) * 4;
            let (outside, inside) = (Ipv4Addr::from(block + 1), Ipv4Addr::from(block + 2));
            let namespace = Self { name, outside };
            if namespace.cable(at, inside).is_ok() {
                return Ok(namespace);
            }
        }
        bail!("no network namespace can be made here")
    }

    fn cable(&self, at: u16, inside: Ipv4Addr) -> anyhow::Result<()> {
        let (near, far) = (format!("rmdf{at}o"), format!("rmdf{at}i"));
        let Self { name, outside } = self;
        run("ip", &["netns", "add", name])?;
        let link = ["link", "add", &near, "type", "veth", "peer", "name", &far];
        run("ip", &[&link[..], &["netns", name]].concat())?;
        run(
            "ip",
            &["addr", "add", &format!("{outside}/30"), "dev", &near],
        )?;
        run("ip", &["link", "set", &near, "up"])?;
        self.inside(&["ip", "addr", "add", &format!("{inside}/30"), "dev", &far])?;
        self.inside(&["ip", "link", "set", &far, "up"])?;
        self.inside(&["ip", "link", "set", "lo", "up"])
    }

    /// The address of the outside, as the inside sees it.
    pub(crate) fn host(&self) -> IpAddr {
        self.outside.into()
    }

    /// What starts a program inside, as the same process.
    pub(crate) fn wrap(&self) -> Vec<OsString> {
        // Not `ip netns exec`, which hides the control groups.
        vec![
            "nsenter".into(),
            format!("--net={FOLDER}/{}", self.name).into(),
        ]
    }

    /// Drops packets between the inside and a port of the outside.
    pub(crate) fn drop_packets(&self, port: u16, way: Way) -> anyhow::Result<()> {
        let port = port.to_string();
        if matches!(way, Way::Out | Way::Both) {
            let rule = ["-I", "OUTPUT", "-p", "tcp", "--dport", &port, "-j", "DROP"];
            self.iptables(&rule)?;
        }
        if matches!(way, Way::In | Way::Both) {
            let rule = ["-I", "INPUT", "-p", "tcp", "--sport", &port, "-j", "DROP"];
            self.iptables(&rule)?;
        }
        Ok(())
    }

    /// Everything passes again.
    pub(crate) fn heal(&self) -> anyhow::Result<()> {
        self.iptables(&["-F"])
    }

    fn iptables(&self, args: &[&str]) -> anyhow::Result<()> {
        // Waits for whoever else changes them.
        self.inside(&[&["iptables", "-w", "10"], args].concat())
    }

    fn inside(&self, words: &[&str]) -> anyhow::Result<()> {
        let net = format!("--net={FOLDER}/{}", self.name);
        run("nsenter", &[&[net.as_str()], words].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its end of the cable goes with it, and the other end with that.
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

/// Removes what a process left that was killed.
pub(crate) fn sweep() {
    let entries = std::fs::read_dir(FOLDER).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = run("ip", &["netns", "del", &name]);
        }
    }
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}`: {}", args.join(" "), said.trim());
    }
    Ok(())
}
