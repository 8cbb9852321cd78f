//! What the command line chooses.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use super::shape::Pace;

/// Hurts a real fleet under load, and checks that every promise is kept.
#[derive(Debug, Clone, Parser)]
#[command(name = "cargo xtask faults")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
pub struct Options {
    /// How many seeds of every fault
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    pub first_seed: u64,
    /// Only this fault, by number or name; may be repeated, or have commas
    #[arg(long, value_delimiter = ',', value_name = "FAULT")]
    pub only: Vec<String>,
    /// No run begins after this; without `--seeds`, seeds follow each other until then
    #[arg(long, value_name = "M")]
    pub minutes: Option<u64>,
    /// Say what there is, and what this host lacks for it
    #[arg(long)]
    pub list: bool,
    /// The bounded selection that must hold before a change lands: 8 minutes at most
    #[arg(long)]
    pub ci: bool,
    /// Faults in their full lengths, which takes minutes and hours
    #[arg(long)]
    pub full: bool,
    /// Leases and heartbeats as a fleet has them that nobody configured (15 s)
    #[arg(long)]
    pub default_timings: bool,
    /// Runs at the same time
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub jobs: usize,
    /// Set this point of `docs/faults.md` in every daemon that has it: shows that the harness
    /// finds what is broken on purpose
    #[arg(long, value_name = "POINT")]
    pub mutate: Option<String>,
    /// Keep the histories and logs of good runs too
    #[arg(long)]
    pub keep: bool,
    /// Where runs have their folders; default `.remuda/faults`
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// Runs of the bounded selection begin no later than this, and end within 8
/// minutes.
const CI: Duration = Duration::from_secs(6 * 60 + 30);

impl Options {
    pub(crate) fn pace(&self) -> Pace {
        if self.default_timings {
            Pace::Default
        } else {
            Pace::Brisk
        }
    }

    /// After this no run begins.
    pub(crate) fn time(&self) -> Option<Duration> {
        let minutes = self
            .minutes
            .map(|minutes| Duration::from_secs(60 * minutes));
        match minutes {
            None if self.ci => Some(CI),
            minutes => minutes,
        }
    }

    /// The seeds in their order, which may have no end.
    pub(crate) fn seeds(&self) -> Box<dyn Iterator<Item = u64> + Send> {
        let first = self.first_seed;
        // A number of minutes alone means: as many as there is time for.
        if self.minutes.is_some() && self.seeds == 1 {
            Box::new(first..)
        } else {
            Box::new(first..first.saturating_add(self.seeds))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Options {
        Options::parse_from([&["faults"], words].concat())
    }

    #[test]
    fn seeds_follow_from_what_is_asked_for() {
        let seeds = |words: &[&str]| options(words).seeds().take(4).collect::<Vec<u64>>();
        assert_eq!(seeds(&[]), [1]);
        assert_eq!(seeds(&["--seeds", "3", "--first-seed", "7"]), [7, 8, 9]);
        assert_eq!(seeds(&["--minutes", "5"]), [1, 2, 3, 4]);
        assert_eq!(seeds(&["--minutes", "5", "--seeds", "2"]), [1, 2]);
    }

    #[test]
    fn the_bounded_selection_is_bounded() {
        assert_eq!(options(&["--ci"]).time(), Some(CI));
        assert_eq!(options(&[]).time(), None);
        let only = options(&["--only", "1,nats-wipe", "--only", "9"]).only;
        assert_eq!(only, ["1", "nats-wipe", "9"]);
    }
}
