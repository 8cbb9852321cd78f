//! What processes hold in memory, as the kernel counts it.

use std::fs;

use anyhow::Context as _;

/// Warm sandboxes under this worker and the proportional set size of one, all
/// of its processes counted, in KiB. `None` where there is no worker to ask.
pub(super) fn warm_pss_kib(worker: Option<i32>) -> anyhow::Result<Option<(f64, f64)>> {
    let Some(worker) = worker else {
        return Ok(None);
    };
    let parents = parents()?;
    let under_worker = |mut pid: i32| {
        while let Some(&(_, parent, _)) = parents.iter().find(|(own, ..)| *own == pid) {
            if parent == worker {
                return true;
            }
            pid = parent;
        }
        false
    };
    let sidecars: Vec<i32> = parents
        .iter()
        .filter(|(pid, _, first)| *first && under_worker(*pid))
        .map(|(pid, ..)| *pid)
        .collect();
    if sidecars.is_empty() {
        return Ok(None);
    }
    let mut total = 0.0;
    for pid in &sidecars {
        total += pss_kib(*pid)?;
    }
    let count = sidecars.len() as f64;
    Ok(Some((count, (total / count * 10.0).round() / 10.0)))
}

/// The resident set of a process, in MiB.
pub(super) fn resident_mib(pid: i32) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone"))?;
    field_kib(&text, "VmRSS:").map(|kib| kib / 1024.0)
}

fn pss_kib(pid: i32) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .with_context(|| format!("process {pid} is gone"))?;
    field_kib(&text, "Pss:")
}

fn field_kib(text: &str, name: &str) -> anyhow::Result<f64> {
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("the kernel does not say {name}"))
}

/// Every process: its id, its parent's, and whether it is the first process of
/// a pid namespace other than ours.
fn parents() -> anyhow::Result<Vec<(i32, i32, bool)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        // One that ends meanwhile is no warm sandbox.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue;
        };
        let parent = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
            .unwrap_or(0);
        let first = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .is_some_and(|ids| {
                let ids: Vec<&str> = ids.split_whitespace().collect();
                ids.len() > 1 && ids.last() == Some(&"1")
            });
        found.push((pid, parent, first));
    }
    Ok(found)
}
