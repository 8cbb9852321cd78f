//! The histories of a fleet: where every part writes its own, and all of them read back as one.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use remuda_tests::check::{self, Promises};
//! use remuda_tests::fleet::{self, Fleet};
//! use remuda_tests::history::{Ends, Log, now};
//!
//! let home = fleet::home()?;
//! let log = Log::in_folder(&home.path().join("history"))?;
//! let mut config = fleet::default_config();
//! log.configure(&mut config)?;
//! let fleet = Fleet::start_in(home, config).await?;
//! let client = fleet.recorded_client("a-run", &log).await?;
//! // … load and faults …
//! let promises = Promises { faults_ended: now(), ..Promises::default() };
//! // … wait until every accepted task has its terminal, or too long …
//! let ends = Ends::read(client.broker()).await?;
//! let violations = check::check(&log.read()?, &ends, &promises);
//! # Ok(())
//! # }
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use remuda_telemetry::history::{Event, Record};
use serde_json::{Value, json};

use crate::binaries;

mod ends;

pub use ends::{Ends, StoredFrame, StoredTerminal};
pub use remuda_telemetry::history::{History as Recorder, now};

/// One record and where it stands, so that a violation can name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// `worker.jsonl:12`
    pub place: String,
    pub at: u64,
    pub who: String,
    pub event: Event,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let event = serde_json::to_string(&self.event).unwrap_or_default();
        write!(f, "{} {} {} {event}", self.place, self.at, self.who)
    }
}

/// Everything that was recorded, in the order of its time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    pub lines: Vec<Line>,
}

impl History {
    /// Reads every `*.jsonl` of a folder.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot read the histories in {}", folder.display());
        let mut lines = Vec::new();
        for entry in std::fs::read_dir(folder).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jsonl")
            {
                let text = std::fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                parse(&name, &text, &mut lines)?;
            }
        }
        Ok(Self::of(lines))
    }

    /// Puts lines into their order. Those of one time stay as they are.
    pub fn of(mut lines: Vec<Line>) -> Self {
        lines.sort_by_key(|line| line.at);
        Self { lines }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter()
    }
}

/// A history with a hole would be judged as if it were whole: what cannot be read is an error.
fn parse(file: &str, text: &str, lines: &mut Vec<Line>) -> anyhow::Result<()> {
    for (number, line) in (1..).zip(text.lines()) {
        let place = format!("{file}:{number}");
        let record: Record =
            serde_json::from_str(line).with_context(|| format!("{place} is no record: {line}"))?;
        lines.push(Line {
            place,
            at: record.at,
            who: record.who,
            event: record.event,
        });
    }
    Ok(())
}

/// A folder that the parts of one fleet record into.
#[derive(Debug, Clone)]
pub struct Log {
    folder: PathBuf,
    client: Recorder,
}

impl Log {
    pub fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let client = Recorder::to_file(&folder.join("client.jsonl"), "client")
            .context("cannot record what clients do")?;
        Ok(Self {
            folder: folder.to_path_buf(),
            client,
        })
    }

    /// For `ClientOptions::history`.
    pub fn client(&self) -> Recorder {
        self.client.clone()
    }

    /// The `telemetry.history` of a daemon. Several of a kind may share a file.
    pub fn file(&self, part: &str) -> PathBuf {
        self.folder.join(format!("{part}.jsonl"))
    }

    /// Makes the dispatcher and the worker of `remuda up` record, and gives the worker the
    /// sidecar that can.
    pub fn configure(&self, config: &mut Value) -> anyhow::Result<()> {
        for part in ["dispatcher", "worker"] {
            config[part]["telemetry"]["history"] = json!(self.file(part));
        }
        config["worker"]["sidecar"] = json!(binaries::faulty_sidecar()?);
        Ok(())
    }

    pub fn read(&self) -> anyhow::Result<History> {
        let history = History::read(&self.folder)?;
        if history.lines.is_empty() {
            bail!("nothing was recorded in {}", self.folder.display());
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_merged_by_time_and_holes_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
        };
        let offered = |at: u64, sandbox: &str| {
            format!(r#"{{"at":{at},"who":"w/1","event":"offered","sandbox":"{sandbox}"}}"#) + "\n"
        };
        write("a.jsonl", &(offered(3, "x") + &offered(1, "y")));
        write("b.jsonl", &offered(2, "z"));
        write("other.txt", "not a history");
        let history = History::read(folder.path()).unwrap();
        let places: Vec<&str> = history.iter().map(|line| line.place.as_str()).collect();
        assert_eq!(places, ["a.jsonl:2", "b.jsonl:1", "a.jsonl:1"]);
        write("c.jsonl", "{\"at\":4,\"who\":\"w");
        let error = History::read(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("c.jsonl:1 is no record"), "{error}");
    }

    #[test]
    fn a_sidecar_s_lines_are_records() {
        // As the sidecar prints them, which has no serializer.
        let mut lines = Vec::new();
        let text = concat!(
            r#"{"at":1,"who":"sidecar/s","event":"entered","sandbox":"s","epoch":4294967297,"#,
            r#""highest":0,"call":"execute","accepted":true,"killed":0}"#,
            "\n",
            r#"{"at":2,"who":"sidecar/s","event":"wrote","sandbox":"s","epoch":4294967297,"#,
            r#""pid":2,"began":7,"stdout_bytes":1,"stdout_sha256":"ab","stderr_bytes":0,"#,
            r#""stderr_sha256":"","whole":true}"#,
            "\n"
        );
        parse("worker.jsonl", text, &mut lines).unwrap();
        assert!(matches!(
            lines[0].event,
            Event::Entered { accepted: true, .. }
        ));
        assert!(matches!(lines[1].event, Event::Wrote { whole: true, .. }));
    }
}
