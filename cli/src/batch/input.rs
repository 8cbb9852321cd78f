//! Lines from a file or standard input, one at a time, each of a bounded length.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;

use super::line::{Defaults, Line, parse};
use crate::task_file::Problem;

/// A request has at most 4 MiB; text may be escaped.
const MOST_LINE_BYTES: u64 = 32 << 20;
/// Of this many bad lines a person is told before anything is submitted.
const MOST_TOLD: usize = 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("{file} cannot be read")]
    Read {
        file: String,
        #[source]
        source: io::Error,
    },
    #[error("{file}:{number}: {problem}")]
    Line {
        file: String,
        number: u64,
        problem: Problem,
    },
}

impl InputError {
    /// Whether the lines after it can still be read.
    pub(crate) fn is_one_line(&self) -> bool {
        matches!(self, Self::Line { .. })
    }
}

/// The lines of a batch that hold something, as tasks.
pub(crate) struct Lines {
    file: String,
    reader: Box<dyn BufRead + Send>,
    number: u64,
    ended: bool,
    defaults: Defaults,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines")
            .field("file", &self.file)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Lines {
    /// `-` is standard input.
    pub(crate) fn open(path: &Path, defaults: Defaults) -> Result<Self, InputError> {
        if path == Path::new("-") {
            let stdin = Box::new(BufReader::new(io::stdin()));
            return Ok(Self::over("standard input", stdin, defaults));
        }
        let file = path.display().to_string();
        match File::open(path) {
            Ok(opened) => Ok(Self::over(
                &file,
                Box::new(BufReader::new(opened)),
                defaults,
            )),
            Err(source) => Err(InputError::Read { file, source }),
        }
    }

    fn over(file: &str, reader: Box<dyn BufRead + Send>, defaults: Defaults) -> Self {
        Self {
            file: file.to_owned(),
            reader,
            number: 0,
            ended: false,
            defaults,
        }
    }

    fn read(&mut self) -> Result<Option<Line>, InputError> {
        let mut text = Vec::new();
        loop {
            text.clear();
            let mut bounded = (&mut self.reader).take(MOST_LINE_BYTES);
            let read = bounded.read_until(b'\n', &mut text);
            let len = read.map_err(|source| InputError::Read {
                file: self.file.clone(),
                source,
            })?;
            if len == 0 {
                return Ok(None);
            }
            self.number += 1;
            if len as u64 == MOST_LINE_BYTES && text.last() != Some(&b'\n') {
                self.ended = true;
                return Err(self.problem(Problem::at(
                    "",
                    format!("is longer than {MOST_LINE_BYTES} bytes"),
                )));
            }
            if !text.trim_ascii().is_empty() {
                return parse(&text, &self.defaults)
                    .map(Some)
                    .map_err(|problem| self.problem(problem));
            }
        }
    }

    fn problem(&self, problem: Problem) -> InputError {
        InputError::Line {
            file: self.file.clone(),
            number: self.number,
            problem,
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Line, InputError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.read().transpose();
        self.ended |= match &next {
            None => true,
            Some(Err(error)) => !error.is_one_line(),
            Some(Ok(_)) => false,
        };
        next
    }
}

/// What a whole file holds; nothing of it is kept.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) tasks: u64,
    pub(crate) bad: u64,
    /// The first of the bad lines.
    pub(crate) problems: Vec<InputError>,
}

/// Reads all lines before any is submitted.
pub(crate) fn check(lines: Lines) -> Result<Checked, InputError> {
    let mut checked = Checked::default();
    for line in lines {
        match line {
            Ok(_) => checked.tasks += 1,
            Err(error) if error.is_one_line() => {
                checked.bad += 1;
                if checked.problems.len() < MOST_TOLD {
                    checked.problems.push(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Lines {
        let defaults = Defaults {
            tenant: "t".parse().unwrap(),
            run: "r".parse().unwrap(),
            pool: "p".parse().unwrap(),
            timeout_ms: None,
        };
        let reader = Box::new(io::Cursor::new(text.as_bytes().to_vec()));
        Lines::over("tasks.jsonl", reader, defaults)
    }

    #[test]
    fn blank_lines_count_as_lines_and_are_no_tasks() {
        let text = "{\"command\": [\"a\"]}\n\n  \n{\"tag\": \"x\"}\n{\"command\": [\"b\"]}";
        let checked = check(lines(text)).unwrap();
        assert_eq!((checked.tasks, checked.bad), (2, 1));
        assert_eq!(
            checked.problems[0].to_string(),
            "tasks.jsonl:4: steps: is missing, give steps or command"
        );
        let tasks = lines(text).filter_map(Result::ok).count();
        assert_eq!(tasks, 2);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let text = "x".repeat(MOST_LINE_BYTES as usize + 10);
        let errors: Vec<_> = lines(&text).collect();
        assert_eq!(errors.len(), 1, "reading goes on after a line without end");
        let error = errors[0].as_ref().unwrap_err().to_string();
        assert!(error.contains(":1: is longer than"), "{error}");
    }
}
