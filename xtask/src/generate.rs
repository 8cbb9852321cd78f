//! `generate`: files that are made from the code, checked in for people.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::workspace::Workspace;

/// Holds generated files only: a file that the code no longer makes is removed.
const SCHEMA_FOLDER: &str = "docs/schema";

/// Files by their path in the repository, with what must stand in them.
type Files = BTreeMap<PathBuf, String>;

/// Writes every generated file; to check, compares and names those that differ.
pub(crate) fn run(workspace: &Workspace, check: bool) -> anyhow::Result<()> {
    let wanted = wanted()?;
    let drift = drift(&wanted, &present(workspace)?);
    if check {
        ensure!(
            drift.is_empty(),
            "not as the code generates them: {}; run `cargo xtask generate` and commit the change",
            drift.join(", ")
        );
        eprintln!("{} generated files are up to date", wanted.len());
        return Ok(());
    }
    for path in &drift {
        let full = workspace.root().join(path);
        if let Some(text) = wanted.get(Path::new(path)) {
            write(&full, text)?;
            eprintln!("wrote {path}");
        } else {
            fs::remove_file(&full).with_context(|| format!("cannot remove {}", full.display()))?;
            eprintln!("removed {path}");
        }
    }
    Ok(())
}

/// What the code generates.
fn wanted() -> anyhow::Result<Files> {
    let mut files = Files::new();
    for (name, schema) in broker_schema::json_schemas() {
        let mut text = serde_json::to_string_pretty(&schema)
            .with_context(|| format!("the schema of {name} is not JSON"))?;
        text.push('\n');
        files.insert(Path::new(SCHEMA_FOLDER).join(format!("{name}.json")), text);
    }
    Ok(files)
}

/// What stands in the folders of generated files.
fn present(workspace: &Workspace) -> anyhow::Result<Files> {
    let folder = workspace.root().join(SCHEMA_FOLDER);
    let mut files = Files::new();
    if !folder.exists() {
        return Ok(files);
    }
    let listing =
        fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in listing {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        let bytes = fs::read(entry.path())
            .with_context(|| format!("cannot read {}", entry.path().display()))?;
        let path = Path::new(SCHEMA_FOLDER).join(entry.file_name());
        files.insert(path, String::from_utf8_lossy(&bytes).into_owned());
    }
    Ok(files)
}

/// The paths that differ, are missing, or are left over.
fn drift(wanted: &Files, present: &Files) -> Vec<String> {
    let differing = wanted
        .iter()
        .filter(|(path, text)| present.get(*path) != Some(*text));
    let left_over = present
        .iter()
        .filter(|(path, _)| !wanted.contains_key(*path));
    differing
        .chain(left_over)
        .map(|(path, _)| path.display().to_string())
        .collect()
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(pairs: &[(&str, &str)]) -> Files {
        let owned = |(path, text): &(&str, &str)| (PathBuf::from(path), (*text).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn drift_names_what_differs_is_missing_or_left_over() {
        let wanted = files(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let present = files(&[("a", "1"), ("b", "other"), ("z", "old")]);
        assert_eq!(drift(&wanted, &present), ["b", "c", "z"]);
        assert_eq!(drift(&wanted, &wanted), Vec::<String>::new());
    }
}
