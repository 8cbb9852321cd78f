//! The problem set as lines for `remuda batch`.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

/// What is graded, and what must come of it.
pub(crate) struct Batch {
    lines: String,
    pub(crate) passing: usize,
    pub(crate) failing: usize,
}

impl Batch {
    pub(crate) fn lines(&self) -> &str {
        &self.lines
    }

    #[cfg(test)]
    pub(crate) fn counting(passing: usize, failing: usize) -> Self {
        Self {
            lines: String::new(),
            passing,
            failing,
        }
    }
}

/// Reads at most `limit` problems and makes `samples` tasks of each: one half
/// with the canonical solution, the other with a body that raises.
pub(crate) fn read(path: &Path, limit: usize, samples: usize) -> anyhow::Result<Batch> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut batch = Batch {
        lines: probes().map(|probe| probe.to_string() + "\n").concat(),
        passing: 0,
        failing: 0,
    };
    for (index, line) in text.lines().enumerate().take(limit) {
        let problem: Value = serde_json::from_str(line)
            .with_context(|| format!("{}:{}: no JSON", path.display(), index + 1))?;
        for sample in 0..samples {
            let right = sample % 2 == 0;
            let task = grade(&problem, right)
                .with_context(|| format!("{}:{}", path.display(), index + 1))?;
            batch.lines.push_str(&task.to_string());
            batch.lines.push('\n');
            *(if right {
                &mut batch.passing
            } else {
                &mut batch.failing
            }) += 1;
        }
    }
    ensure!(batch.passing > 0, "{} has no problems", path.display());
    Ok(batch)
}

/// One sample: the program is written into the sandbox and run.
fn grade(problem: &Value, right: bool) -> anyhow::Result<Value> {
    let field = |name: &str| {
        problem[name]
            .as_str()
            .with_context(|| format!("the problem has no {name}"))
    };
    let body = if right {
        field("canonical_solution")?
    } else {
        "    raise NotImplementedError\n"
    };
    let program = format!(
        "{}{body}\n{}\ncheck({})\n",
        field("prompt")?,
        field("test")?,
        field("entry_point")?,
    );
    Ok(json!({
        "tag": if right { "pass" } else { "fail" },
        "steps": [
            {"type": "FilePatch", "name": "write", "path": "sample.py", "content": program},
            {"type": "Command", "name": "grade", "command": ["python3", "sample.py"]},
        ],
        "timeout": "60s",
    }))
}

/// Programs that a fleet meets sooner or later.
fn probes() -> [Value; 4] {
    let python = |code: &str| json!(["python3", "-c", code]);
    [
        json!({"tag": "endless", "command": python("while True: pass"), "timeout": "2s"}),
        json!({
            "tag": "hungry",
            "command": python("kept = []\nwhile True: kept.append(bytearray(1 << 24))"),
            "timeout": "60s",
        }),
        json!({"tag": "missing", "command": ["no-such-interpreter", "x.py"]}),
        json!({
            "tag": "loud",
            "command": python("import sys\nfor _ in range(50): sys.stdout.write('x' * 1000000)"),
            "timeout": "60s",
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_samples_raise() {
        let problem = json!({
            "prompt": "def one():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "one",
        });
        let code = |right| {
            grade(&problem, right).unwrap()["steps"][0]["content"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        assert!(code(true).contains("return 1") && code(true).ends_with("check(one)\n"));
        assert!(code(false).contains("raise NotImplementedError"));
    }
}
