//! What came of the demo, counted from its results.

use anyhow::Context;
use serde_json::Value;

use super::tasks::Batch;

/// Counts and the four probes' ends.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Results by (expected to pass, did pass).
    counts: [[usize; 2]; 2],
    endless: String,
    hungry: String,
    missing: String,
    loud: String,
    /// First publish to last result, in microseconds since 1970.
    first: u64,
    last: u64,
}

impl Verdict {
    /// From the lines that `remuda batch` wrote.
    pub(crate) fn read(results: &str) -> anyhow::Result<Self> {
        let mut verdict = Self {
            first: u64::MAX,
            ..Self::default()
        };
        for (index, line) in results.lines().enumerate() {
            let result: Value = serde_json::from_str(line)
                .with_context(|| format!("result {} is no JSON", index + 1))?;
            verdict
                .add(&result)
                .with_context(|| format!("result {}: {line}", index + 1))?;
        }
        Ok(verdict)
    }

    fn add(&mut self, result: &Value) -> anyhow::Result<()> {
        let outcome = result["outcome"].as_str().context("no outcome")?;
        let exit = result["exit"]["code"].as_i64();
        match result["tag"].as_str() {
            Some("pass") => self.counts[1][usize::from(outcome == "succeeded")] += 1,
            // Python's own exit code for an exception: anything else would be
            // some other failure than the one that was asked for.
            Some("fail") => {
                let raised = outcome == "failed" && exit == Some(1);
                self.counts[0][usize::from(!raised)] += 1;
            }
            Some("endless") => outcome.clone_into(&mut self.endless),
            Some("hungry") => outcome.clone_into(&mut self.hungry),
            Some("missing") => {
                self.missing =
                    exit.map_or_else(|| outcome.to_owned(), |code| format!("exit {code}"));
            }
            Some("loud") => self.loud = loud(outcome, result),
            other => anyhow::bail!("unknown tag {other:?}"),
        }
        let time = |name: &str| {
            result["times"][name]
                .as_u64()
                .with_context(|| format!("no times.{name}"))
        };
        self.first = self.first.min(time("queued")?);
        self.last = self.last.max(time("finished")?);
        Ok(())
    }

    fn graded(&self) -> usize {
        self.counts.iter().flatten().sum()
    }

    /// The demo's last line.
    pub(crate) fn line(&self) -> String {
        let [[failed, wrongly_passed], [wrongly_failed, passed]] = self.counts;
        let seconds = self.last.saturating_sub(self.first) as f64 / 1e6;
        format!(
            "demo: {} graded, {} passed, {} failed; probes: {}, {}, {}, {}; {seconds:.1} s, {:.0} tasks/s",
            self.graded(),
            passed + wrongly_passed,
            failed + wrongly_failed,
            self.endless,
            self.hungry,
            self.missing,
            self.loud,
            (self.graded() + 4) as f64 / seconds.max(1e-9),
        )
    }

    /// What is not as it must be, for people; empty when all is well.
    pub(crate) fn problems(&self, batch: &Batch) -> Vec<String> {
        let [[failed, wrongly_passed], [wrongly_failed, passed]] = self.counts;
        let mut found = Vec::new();
        let mut expect = |what: &str, seen: String, expected: String| {
            if seen != expected {
                found.push(format!("{what}: {seen}, expected {expected}"));
            }
        };
        let count = |n: usize| n.to_string();
        expect(
            "canonical solutions that passed",
            count(passed),
            count(batch.passing),
        );
        expect(
            "canonical solutions that failed",
            count(wrongly_failed),
            count(0),
        );
        expect(
            "raising bodies that failed",
            count(failed),
            count(batch.failing),
        );
        expect(
            "raising bodies that did not",
            count(wrongly_passed),
            count(0),
        );
        expect(
            "the program that never ends",
            self.endless.clone(),
            "timed_out".into(),
        );
        expect(
            "the program that allocates",
            self.hungry.clone(),
            "oom_killed".into(),
        );
        expect(
            "the missing interpreter",
            self.missing.clone(),
            "exit 127".into(),
        );
        let cut = self.loud.starts_with("output cut at ");
        expect(
            "the program that prints 50 MB was cut",
            cut.to_string(),
            "true".into(),
        );
        found
    }
}

/// `output cut at N` where N bytes were kept of the 50,000,000 that it wrote.
fn loud(outcome: &str, result: &Value) -> String {
    let bytes = result["stdout_bytes"].as_u64();
    let dropped = result["stdout_dropped"].as_u64();
    match (outcome, bytes, dropped) {
        ("succeeded", Some(bytes @ 50_000_000), Some(dropped @ 1..)) => {
            format!("output cut at {}", bytes - dropped)
        }
        _ => format!("{outcome} with {bytes:?} bytes of output, {dropped:?} dropped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: &str = r#""times":{"queued":1000000,"finished":3000000}"#;

    fn lines(pass: &str) -> String {
        [
            format!(r#"{{"tag":"pass","outcome":"{pass}","exit":{{"code":0}},{TIMES}}}"#),
            format!(r#"{{"tag":"fail","outcome":"failed","exit":{{"code":1}},{TIMES}}}"#),
            format!(r#"{{"tag":"endless","outcome":"timed_out","exit":{{"code":137}},{TIMES}}}"#),
            format!(r#"{{"tag":"hungry","outcome":"oom_killed",{TIMES}}}"#),
            format!(r#"{{"tag":"missing","outcome":"failed","exit":{{"code":127}},{TIMES}}}"#),
            format!(
                r#"{{"tag":"loud","outcome":"succeeded","stdout_bytes":50000000,"stdout_dropped":41611392,{TIMES}}}"#
            ),
        ]
        .join("\n")
    }

    fn batch() -> Batch {
        super::super::tasks::Batch::counting(1, 1)
    }

    #[test]
    fn a_good_run_has_no_problems() {
        let verdict = Verdict::read(&lines("succeeded")).unwrap();
        assert_eq!(verdict.problems(&batch()), Vec::<String>::new());
        assert_eq!(
            verdict.line(),
            "demo: 2 graded, 1 passed, 1 failed; probes: timed_out, oom_killed, exit 127, \
             output cut at 8388608; 2.0 s, 3 tasks/s"
        );
    }

    #[test]
    fn every_wrong_count_is_named() {
        let verdict = Verdict::read(&lines("timed_out")).unwrap();
        assert_eq!(
            verdict.problems(&batch()),
            [
                "canonical solutions that passed: 0, expected 1",
                "canonical solutions that failed: 1, expected 0",
            ]
        );
        assert_eq!(Verdict::default().problems(&batch()).len(), 6);
    }
}
