//! Where the programs under test and the servers they need are.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// The folder of this profile's programs: `target/debug` or `target/release`.
pub fn profile_dir() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this test program is")?;
    let folder = own.parent().context("this test program is in no folder")?;
    // Tests are in `deps`, programs beside it.
    let folder = match folder.parent() {
        Some(parent) if folder.ends_with("deps") => parent,
        _ => folder,
    };
    Ok(folder.to_path_buf())
}

/// One of our programs, of the same profile as this test.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = profile_dir()?.join(name);
    if !is_executable(&path) {
        bail!("{} is not built: run `cargo xtask build`", path.display());
    }
    Ok(path)
}

/// The static sidecar. The one beside the programs may be a dynamic build that
/// `cargo test` left there, which no sandbox without a libc can start.
pub fn sidecar() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("REMUDA_SIDECAR").map(PathBuf::from) {
        if !is_executable(&path) {
            bail!("REMUDA_SIDECAR is {}, which is no program", path.display());
        }
        return Ok(path);
    }
    static_build("sidecar")
}

/// The static sidecar that records a history and can be told to break rules.
pub fn faulty_sidecar() -> anyhow::Result<PathBuf> {
    static_build("sidecar-faults")
}

fn static_build(profile: &str) -> anyhow::Result<PathBuf> {
    let programs = profile_dir()?;
    let target = programs
        .parent()
        .context("the profile's folder has no parent")?;
    let built = target.join("static");
    let triples = std::fs::read_dir(&built).into_iter().flatten().flatten();
    triples
        .map(|triple| triple.path().join(profile).join("remuda-sidecar"))
        .find(|path| is_executable(path))
        .with_context(|| {
            format!(
                "no {profile}/remuda-sidecar under {}: run `cargo xtask build`",
                built.display()
            )
        })
}

/// A server's program: from `REMUDA_TOOLS`, what setup installed, or `PATH`.
pub fn tool(name: &str) -> anyhow::Result<PathBuf> {
    let given = std::env::var_os("REMUDA_TOOLS").map(PathBuf::from);
    let installed = workspace().join(".remuda/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    given
        .into_iter()
        .chain([installed])
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate))
        .with_context(|| {
            format!("no {name} in REMUDA_TOOLS, .remuda/tools/bin or PATH: run `cargo xtask setup`")
        })
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
