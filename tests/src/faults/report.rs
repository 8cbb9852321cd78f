//! What runs came to, and the table of it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::catalogue::Fault;
use super::scene::Violation;

/// One run.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) fault: u8,
    pub(crate) seed: u64,
    pub(crate) took: Duration,
    /// Where histories and logs are, where they were kept.
    pub(crate) folder: PathBuf,
    pub(crate) verdict: Verdict,
}

#[derive(Debug, Clone)]
pub(crate) enum Verdict {
    Ran(Figures),
    /// It could not be done, and says nothing about the product.
    Broken(String),
}

/// What a run counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Tasks that were submitted, those of sessions included.
    pub(crate) tasks: usize,
    pub(crate) accepted: usize,
    /// Tasks that took more attempts than they would have.
    pub(crate) again: usize,
    pub(crate) cancelled: usize,
    /// Tasks of sessions whose sandbox was gone.
    pub(crate) lost: usize,
    /// Dead letters.
    pub(crate) dead: usize,
    /// From the last fault's end to the last terminal.
    pub(crate) recovery: Duration,
    pub(crate) notes: Vec<String>,
    pub(crate) violations: Vec<Violation>,
}

/// What is said of a fault that was not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The host lacks something.
    Skipped(String),
    /// The time was over.
    NoTime,
}

/// All runs of all chosen faults.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) faults: Vec<(Fault, Option<Missing>)>,
    pub(crate) reports: Vec<Report>,
    pub(crate) full: bool,
}

impl Report {
    pub(crate) fn good(&self) -> bool {
        matches!(&self.verdict, Verdict::Ran(figures) if figures.violations.is_empty())
    }

    /// One line when it has ended.
    pub(crate) fn line(&self, fault: &Fault) -> String {
        let head = format!(
            "{:>2} {} seed {} {:.0} s:",
            fault.number,
            fault.name,
            self.seed,
            self.took.as_secs_f64()
        );
        match &self.verdict {
            Verdict::Broken(why) => format!("{head} BROKEN: {}", short(why)),
            Verdict::Ran(figures) => {
                let notes = figures.notes.join("; ");
                let count = figures.violations.len();
                let verdict = if count == 0 {
                    "ok".to_owned()
                } else {
                    format!("{count} VIOLATIONS")
                };
                format!(
                    "{head} {verdict}, {} tasks, recovered in {:.1} s{}{notes}",
                    figures.tasks,
                    figures.recovery.as_secs_f64(),
                    if notes.is_empty() { "" } else { "; " },
                )
            }
        }
    }
}

/// The logs that an error carries are in the run's folder too.
fn short(why: &str) -> String {
    const MOST: usize = 1500;
    match why.char_indices().nth(MOST) {
        Some((at, _)) => format!("{} …", &why[..at]),
        None => why.to_owned(),
    }
}

const HEAD: &str = "| #  | fault                 | length                         | runs | tasks | again | lost | dead | violations | recovery (worst) |\n\
                    | -- | --------------------- | ------------------------------ | ---: | ----: | ----: | ---: | ---: | ---------: | ---------------: |\n";

impl Table {
    pub(crate) fn good(&self) -> bool {
        self.reports.iter().all(Report::good)
    }

    /// For a terminal and for a page.
    pub(crate) fn text(&self) -> String {
        let mut text = HEAD.to_owned();
        for (fault, missing) in &self.faults {
            let reports: Vec<&Report> = self
                .reports
                .iter()
                .filter(|report| report.fault == fault.number)
                .collect();
            self.row(&mut text, fault, &reports, missing.as_ref());
        }
        self.violations(&mut text);
        text
    }

    fn row(
        &self,
        text: &mut String,
        fault: &Fault,
        reports: &[&Report],
        missing: Option<&Missing>,
    ) {
        let head = format!(
            "| {:>2} | {:<21} | {:<30} |",
            fault.number,
            fault.name,
            fault.lengths.told(self.full)
        );
        let ran: Vec<&Figures> = reports
            .iter()
            .filter_map(|report| match &report.verdict {
                Verdict::Ran(figures) => Some(figures),
                Verdict::Broken(_) => None,
            })
            .collect();
        let broken = reports.len() - ran.len();
        if ran.is_empty() {
            let why = match missing {
                Some(Missing::Skipped(why)) => format!("skipped: {why}"),
                Some(Missing::NoTime) => "not run: the time was over".to_owned(),
                None => format!("{broken} runs broken"),
            };
            let _ = writeln!(text, "{head} {why} |");
            return;
        }
        let sum = |of: fn(&Figures) -> usize| ran.iter().map(|figures| of(figures)).sum::<usize>();
        let mut recoveries: Vec<Duration> = ran.iter().map(|figures| figures.recovery).collect();
        recoveries.sort_unstable();
        let middle = recoveries
            .get(recoveries.len() / 2)
            .copied()
            .unwrap_or_default();
        let worst = recoveries.last().copied().unwrap_or_default();
        let runs = if broken == 0 {
            ran.len().to_string()
        } else {
            format!("{}+{broken}!", ran.len())
        };
        let _ = writeln!(
            text,
            "{head} {runs:>4} | {:>5} | {:>5} | {:>4} | {:>4} | {:>10} | {:>16} |",
            sum(|figures| figures.tasks),
            sum(|figures| figures.again),
            sum(|figures| figures.lost),
            sum(|figures| figures.dead),
            sum(|figures| figures.violations.len()),
            format!(
                "{:.1} s ({:.1} s)",
                middle.as_secs_f64(),
                worst.as_secs_f64()
            ),
        );
    }

    fn violations(&self, text: &mut String) {
        /// Of one run; the rest are in its report.
        const SHOWN: usize = 8;
        for report in self.reports.iter().filter(|report| !report.good()) {
            let (what, count) = match &report.verdict {
                Verdict::Broken(why) => (vec![short(why)], 0),
                Verdict::Ran(figures) => (
                    figures
                        .violations
                        .iter()
                        .take(SHOWN)
                        .map(|found| format!("{}: {}", found.invariant, found.detail))
                        .collect(),
                    figures.violations.len(),
                ),
            };
            let _ = writeln!(
                text,
                "\nfault {} seed {}, kept in {}:",
                report.fault,
                report.seed,
                report.folder.display()
            );
            for line in &what {
                let _ = writeln!(text, "  {}", line.replace('\n', "\n  "));
            }
            if count > what.len() {
                let _ = writeln!(text, "  and {} more", count - what.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue;
    use super::*;

    fn report(fault: u8, seed: u64, verdict: Verdict) -> Report {
        Report {
            fault,
            seed,
            took: Duration::from_secs(9),
            folder: "/kept".into(),
            verdict,
        }
    }

    fn table(reports: Vec<Report>) -> Table {
        let faults = catalogue::select(&["1".into(), "3".into(), "19".into()], false).unwrap();
        let missing = [
            None,
            Some(Missing::NoTime),
            Some(Missing::Skipped("no iptables".into())),
        ];
        Table {
            faults: faults.into_iter().zip(missing).collect(),
            reports,
            full: false,
        }
    }

    #[test]
    fn rows_add_up_and_nothing_is_left_out_silently() {
        let figures = |seconds| Figures {
            tasks: 10,
            lost: 1,
            recovery: Duration::from_secs(seconds),
            ..Figures::default()
        };
        let table = table(vec![
            report(1, 1, Verdict::Ran(figures(2))),
            report(1, 2, Verdict::Ran(figures(4))),
        ]);
        assert!(table.good());
        let text = table.text();
        let row = text
            .lines()
            .find(|line| line.contains("nats-kill"))
            .unwrap();
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(
            cells[4..11],
            ["2", "20", "0", "2", "0", "0", "4.0 s (4.0 s)"]
        );
        assert!(text.contains("10 s") && text.contains("the time was over"));
        assert!(text.contains("skipped: no iptables"));
        let widths: Vec<usize> = text
            .lines()
            .take(3)
            .map(|line| line.chars().count())
            .collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
    }

    #[test]
    fn what_is_wrong_is_told_with_seed_and_folder() {
        let bad = Figures {
            violations: vec![Violation::new("I1", "no terminal"); 9],
            ..Figures::default()
        };
        let table = table(vec![
            report(1, 7, Verdict::Ran(bad)),
            report(1, 8, Verdict::Broken("no server".into())),
        ]);
        assert!(!table.good());
        let text = table.text();
        for told in [
            "1+1!",
            "fault 1 seed 7, kept in /kept",
            "I1: no terminal",
            "and 1 more",
            "no server",
        ] {
            assert!(text.contains(told), "{told}: {text}");
        }
    }
}
