//! A clock that can be set forward and back for one process, by libfaketime.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Where Debian's package puts it.
const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];

fn library() -> Option<&'static str> {
    LIBRARIES.into_iter().find(|path| Path::new(path).is_file())
}

/// Why there is none.
pub(crate) fn lacking() -> Option<String> {
    library()
        .is_none()
        .then(|| "no libfaketime: `apt-get install faketime`".to_owned())
}

/// The offset of one process's wall clock, in a file that it reads.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    file: PathBuf,
}

impl Clock {
    /// In a folder, under a name.
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        Self {
            file: folder.join(format!("{name}.clock")),
        }
    }

    /// What the process needs in its environment. Monotonic clocks stay true,
    /// as they do when somebody sets a machine's time.
    pub(crate) fn envs(&self) -> Vec<(String, String)> {
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        vec![
            set("LD_PRELOAD", library().unwrap_or_default()),
            set("FAKETIME_TIMESTAMP_FILE", &self.file.display().to_string()),
            set("FAKETIME_NO_CACHE", "1"),
            set("DONT_FAKE_MONOTONIC", "1"),
            set("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]
    }

    /// Seconds that it is ahead of the true time; less than zero for behind.
    pub(crate) fn set(&self, offset: i64) -> anyhow::Result<()> {
        std::fs::write(&self.file, format!("{offset:+}\n"))
            .with_context(|| format!("cannot write {}", self.file.display()))
    }
}
