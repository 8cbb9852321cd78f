//! `remuda doctor`: looks at this machine and at the running fleet, and says
//! how to mend what is not as it should be.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use remuda_client::broker::{Broker, BrokerOptions};
use remuda_lease::{LeaseOptions, LeaseStore};
use remuda_worker::backend::local::HostProbe;

use crate::failure::{Failure, exit};
use crate::fleet::{Fleet, default_data};
use crate::globals::Globals;
use crate::out;
use crate::programs::{self, Server};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder that `remuda up` keeps its data in
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
}

/// Streams, sandboxes and logs want more than this.
const DISK_WANTED: u64 = 4 << 30;
/// Less than this fills up within one run.
const DISK_NEEDED: u64 = 512 << 20;
const PIDS_WANTED: u64 = 32_768;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    name: String,
    detail: String,
    mend: Option<String>,
}

impl Finding {
    fn new(verdict: Verdict, name: &str, detail: impl Into<String>) -> Self {
        Self {
            verdict,
            name: name.to_owned(),
            detail: detail.into(),
            mend: None,
        }
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict}  {}: {}", self.name, self.detail)?;
        match &self.mend {
            Some(mend) if self.verdict != Verdict::Ok => write!(f, "\n      mend: {mend}"),
            _ => Ok(()),
        }
    }
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let fleet = Fleet::locate(globals).ok();
    let mut findings = host();
    findings.push(sidecar());
    findings.push(pids());
    findings.push(disk(
        &args
            .data
            .or_else(default_data)
            .unwrap_or_else(|| "/".into()),
    ));
    // A fleet on servers elsewhere needs no programs here.
    findings.push(program(programs::NATS, globals.nats.is_none()));
    findings.push(program(programs::REDIS, globals.redis.is_none()));
    match &fleet {
        Some(fleet) => findings.extend(servers(fleet).await),
        None => findings.push(Finding::new(
            Verdict::Ok,
            "fleet",
            "none is running here (`remuda up` starts one)",
        )),
    }
    for finding in &findings {
        out::line(finding)?;
    }
    let failed = count(&findings, Verdict::Fail);
    let warned = count(&findings, Verdict::Warn);
    out::line(format_args!(
        "{} checks: {} ok, {warned} to look at, {failed} failed",
        findings.len(),
        findings.len() - failed - warned
    ))?;
    Ok(if failed > 0 { exit::FAILED } else { 0 })
}

fn count(findings: &[Finding], verdict: Verdict) -> usize {
    findings
        .iter()
        .filter(|finding| finding.verdict == verdict)
        .count()
}

/// What the local launcher needs of the kernel, and the limits of this process.
fn host() -> Vec<Finding> {
    let probe = HostProbe::run();
    probe
        .checks
        .into_iter()
        .map(|check| Finding {
            verdict: match (check.ok, check.required) {
                (true, _) => Verdict::Ok,
                (false, true) => Verdict::Fail,
                (false, false) => Verdict::Warn,
            },
            name: check.name.to_owned(),
            detail: check.detail,
            mend: check.mend,
        })
        .collect()
}

fn sidecar() -> Finding {
    const PROGRAM: &str = "remuda-sidecar";
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(PROGRAM)));
    match beside {
        Some(path) if programs::is_executable(&path) => {
            let detail = path.display().to_string();
            match is_static(&path) {
                Some(true) => Finding::new(Verdict::Ok, "sidecar", detail),
                _ => Finding::new(Verdict::Warn, "sidecar", format!("{detail} is not static"))
                    .mend("build it with `cargo xtask build`: an image may have no libc"),
            }
        }
        _ => Finding::new(
            Verdict::Fail,
            "sidecar",
            "remuda-sidecar is not beside this program",
        )
        .mend("build it with `cargo xtask build`, or put it beside this program"),
    }
}

/// Whether a program needs no interpreter; none where it cannot be read.
fn is_static(path: &Path) -> Option<bool> {
    const INTERPRETER: u32 = 3;
    const HEADER: usize = 64;
    let mut head = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(4096).read_to_end(&mut head).ok()?;
    let short = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    if !head.starts_with(b"\x7fELF\x02\x01") || head.len() < HEADER {
        return None;
    }
    // Program headers: where, how large each, how many; the kind comes first.
    let (at, size, count) = (word(32)? as usize, short(54)? as usize, short(56)? as usize);
    for index in 0..count {
        if word(at.checked_add(index * size)?)? == INTERPRETER {
            return Some(false);
        }
    }
    Some(true)
}

fn pids() -> Finding {
    let most = std::fs::read_to_string("/proc/sys/kernel/pid_max")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match most {
        Some(most) if most >= PIDS_WANTED => {
            Finding::new(Verdict::Ok, "process ids", format!("pid_max is {most}"))
        }
        Some(most) => Finding::new(Verdict::Warn, "process ids", format!("pid_max is {most}"))
            .mend("sysctl -w kernel.pid_max=4194304"),
        None => {
            Finding::new(Verdict::Warn, "process ids", "pid_max cannot be read").mend("mount /proc")
        }
    }
}

/// What is free where the data folder is, or will be.
fn disk(data: &Path) -> Finding {
    let there = data
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or_else(|| Path::new("/"));
    match statvfs(there) {
        Ok(found) => disk_finding(found.blocks_available() * found.fragment_size(), data),
        Err(error) => Finding::new(
            Verdict::Warn,
            "disk",
            format!("{}: {error}", there.display()),
        )
        .mend("give another --data"),
    }
}

fn disk_finding(free: u64, data: &Path) -> Finding {
    let detail = format!(
        "{:.1} GiB free for {}",
        free as f64 / (1_u64 << 30) as f64,
        data.display()
    );
    let verdict = match free {
        DISK_WANTED.. => Verdict::Ok,
        DISK_NEEDED..DISK_WANTED => Verdict::Warn,
        _ => Verdict::Fail,
    };
    Finding::new(verdict, "disk", detail).mend("free some, or keep the data elsewhere with --data")
}

fn program(server: Server, needed: bool) -> Finding {
    match server.find() {
        Ok(found) => Finding::new(
            Verdict::Ok,
            server.program,
            format!("{} ({})", found.version, found.path.display()),
        ),
        Err(error) => {
            let verdict = if needed { Verdict::Fail } else { Verdict::Warn };
            Finding::new(verdict, server.program, error.to_string()).mend(server.mend)
        }
    }
}

/// The servers of the fleet that runs, as its clients find them.
async fn servers(fleet: &Fleet) -> Vec<Finding> {
    let mut findings = vec![nats(fleet).await];
    if let Some(url) = &fleet.redis {
        findings.extend(redis(fleet, url).await);
    }
    findings
}

async fn nats(fleet: &Fleet) -> Finding {
    const NAME: &str = "running nats-server";
    let options = BrokerOptions {
        url: fleet.nats.clone(),
        prefix: fleet.prefix.clone(),
        name: "remuda-doctor".to_owned(),
        connect_timeout: PATIENCE,
        ..BrokerOptions::default()
    };
    let shown = options.display_url();
    match tokio::time::timeout(PATIENCE * 2, Broker::connect(&options)).await {
        Ok(Ok(broker)) => {
            let version = broker.nats().server_info().version;
            Finding::new(
                Verdict::Ok,
                NAME,
                format!("{version} at {shown}, with JetStream"),
            )
        }
        Ok(Err(error)) => Finding::new(
            Verdict::Fail,
            NAME,
            format!("{} [{}]", remuda_telemetry::Chain(&error), error.code()),
        ),
        Err(_) => Finding::new(Verdict::Fail, NAME, format!("no answer at {shown}"))
            .mend("is it running, and is the address right?"),
    }
}

async fn redis(fleet: &Fleet, url: &str) -> Vec<Finding> {
    const NAME: &str = "running Redis";
    let options = LeaseOptions {
        url: url.to_owned(),
        prefix: fleet.prefix.clone(),
        ..LeaseOptions::default()
    };
    let store = match LeaseStore::connect(&options).await {
        Ok(store) => store,
        Err(error) => {
            let detail = remuda_telemetry::Chain(&error).to_string();
            return vec![
                Finding::new(Verdict::Fail, NAME, detail)
                    .mend("is it running, and are address and password right?"),
            ];
        }
    };
    match store.suitability().await {
        Ok(warnings) if warnings.is_empty() => {
            vec![Finding::new(
                Verdict::Ok,
                NAME,
                "answers, keeps everything it is told",
            )]
        }
        Ok(warnings) => warnings
            .into_iter()
            .map(|warning| {
                Finding::new(Verdict::Warn, NAME, warning)
                    .mend("set it in redis.conf, or a restart of Redis forgets leases")
            })
            .collect(),
        Err(error) => {
            let detail = remuda_telemetry::Chain(&error).to_string();
            vec![Finding::new(Verdict::Warn, NAME, detail).mend("look at the server's log")]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_disk_warns_and_none_fails() {
        let data = Path::new("/data");
        assert_eq!(disk_finding(8 << 30, data).verdict, Verdict::Ok);
        assert_eq!(disk_finding(1 << 30, data).verdict, Verdict::Warn);
        assert_eq!(disk_finding(0, data).verdict, Verdict::Fail);
        assert_eq!(
            disk_finding(1 << 30, data).to_string(),
            "warn  disk: 1.0 GiB free for /data\n      \
             mend: free some, or keep the data elsewhere with --data"
        );
    }

    #[test]
    fn a_program_that_needs_an_interpreter_is_not_static() {
        assert_eq!(is_static(Path::new("/bin/sh")), Some(false));
        assert_eq!(is_static(Path::new("/etc/passwd")), None);
    }

    #[test]
    fn what_is_well_needs_no_mending() {
        let text = Finding::new(Verdict::Ok, "x", "fine")
            .mend("nothing")
            .to_string();
        assert_eq!(text, "ok    x: fine");
    }
}
