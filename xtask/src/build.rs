//! `build`: the static sidecar, then the programs that carry it. And `clean`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::shell::{self, answer, cargo};
use crate::workspace::Workspace;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

impl Profile {
    pub(crate) fn from_release(release: bool) -> Self {
        if release { Self::Release } else { Self::Dev }
    }

    /// The folder's name under the target directory.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// Always built together: in other company, cargo would choose other features
/// for what they share, and build it again.
const PACKAGES: [&str; 3] = ["remuda", "remuda-dispatcher", "remuda-worker"];

const SIDECAR: &str = "remuda-sidecar";

/// The one program that is all of them: what the demo and the benchmarks need.
const WHOLE: [&str; 1] = ["remuda"];

/// `cargo xtask build`.
pub(crate) fn run(workspace: &Workspace, profile: Profile) -> anyhow::Result<()> {
    packages(workspace, profile, &PACKAGES)
}

/// Builds only `remuda`, for release: the two daemons that it contains are not
/// linked a second time.
pub(crate) fn whole(workspace: &Workspace) -> anyhow::Result<()> {
    packages(workspace, Profile::Release, &WHOLE)
}

/// What debug builds have and release builds refuse: points at which tests end a process or break
/// a rule.
pub(crate) const TEST_FEATURES: [&str; 3] = [
    "remuda/failpoints",
    "remuda-dispatcher/failpoints",
    "remuda-worker/failpoints",
];

fn packages(workspace: &Workspace, profile: Profile, packages: &[&str]) -> anyhow::Result<()> {
    let sidecar = static_sidecar(workspace)?;
    if profile == Profile::Dev {
        faulty_sidecar(workspace)?;
    }
    let mut command = cargo(workspace)?;
    command.args(["build", "--locked", "--bins"]);
    for package in packages {
        command.args(["--package", package]);
    }
    match profile {
        Profile::Dev => command.args(["--features", &TEST_FEATURES.join(",")]),
        Profile::Release => command.arg("--release"),
    };
    shell::run(&mut command)?;
    place_sidecar(workspace, &sidecar, profile)
}

/// One of the built programs, to be run in the workspace.
pub(crate) fn program(
    workspace: &Workspace,
    profile: Profile,
    name: &str,
) -> anyhow::Result<Command> {
    let program = workspace.target().join(profile.folder()).join(name);
    ensure!(
        shell::is_executable(&program),
        "the build left no program {}",
        program.display()
    );
    shell::in_workspace(workspace, program)
}

/// Builds the sidecar that goes into sandboxes, which may hold no libc: linked
/// statically, in a target directory of its own, since its flags differ from
/// those of everything else.
pub(crate) fn static_sidecar(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    static_build(workspace, "sidecar", &[])
}

/// The sidecar of tests of faults, beside the other. Nothing puts it into a release.
pub(crate) fn faulty_sidecar(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    static_build(workspace, "sidecar-faults", &["--features", "failpoints"])
}

fn static_build(workspace: &Workspace, profile: &str, more: &[&str]) -> anyhow::Result<PathBuf> {
    let triple = host_triple()?;
    let target = workspace.target().join("static");
    shell::run(
        cargo(workspace)?
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .args(["build", "--locked", "--package", SIDECAR])
            .args(more)
            .args(["--profile", profile, "--target", &triple, "--target-dir"])
            .arg(&target),
    )?;
    Ok(target.join(triple).join(profile).join(SIDECAR))
}

/// Puts the static sidecar beside the programs, where the worker looks for it.
pub(crate) fn place_sidecar(
    workspace: &Workspace,
    sidecar: &Path,
    profile: Profile,
) -> anyhow::Result<()> {
    let to = workspace.target().join(profile.folder()).join(SIDECAR);
    let wanted = read(sidecar)?;
    if fs::read(&to).is_ok_and(|there| there == wanted) {
        return Ok(());
    }
    // By way of a rename: one that runs is never written over.
    let partial = to.with_extension("partial");
    fs::copy(sidecar, &partial)
        .and_then(|_| fs::rename(&partial, &to))
        .with_context(|| format!("cannot copy {} to {}", sidecar.display(), to.display()))
}

/// `cargo xtask clean`.
pub(crate) fn clean(workspace: &Workspace) -> anyhow::Result<()> {
    for folder in [
        workspace.private().join("tools"),
        workspace.venv(),
        workspace.data(),
    ] {
        if folder.exists() {
            eprintln!("removing {}", folder.display());
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
    }
    shell::run(cargo(workspace)?.arg("clean"))
}

fn host_triple() -> anyhow::Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let text = answer(Command::new(&rustc).arg("-vV"))
        .with_context(|| format!("`{} -vV` does not answer", rustc.display()))?;
    match text.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(triple) => Ok(triple.to_owned()),
        None => bail!("`{} -vV` names no host", rustc.display()),
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
