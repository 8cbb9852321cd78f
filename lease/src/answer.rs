//! Answers of scripts, taken apart. Redis may hold anything: nothing read from it is believed
//! before it is checked.

use std::str::FromStr;
use std::time::Duration;

use broker_schema::{Epoch, SandboxRef};

use crate::error::Fault;

/// A list of texts, read from the front.
#[derive(Debug)]
pub(crate) struct Answer(std::vec::IntoIter<String>);

impl Answer {
    pub(crate) fn new(texts: Vec<String>) -> Self {
        Self(texts.into_iter())
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.len() == 0
    }

    pub(crate) fn text(&mut self, what: &'static str) -> Result<String, Fault> {
        self.0.next().ok_or(Fault::Garbled {
            what,
            found: "nothing".to_owned(),
        })
    }

    pub(crate) fn value<T: FromStr>(&mut self, what: &'static str) -> Result<T, Fault> {
        let text = self.text(what)?;
        text.parse().map_err(|_| garbled(what, &text))
    }

    /// A value that may be absent, as the empty text.
    pub(crate) fn optional<T: FromStr>(&mut self, what: &'static str) -> Result<Option<T>, Fault> {
        let text = self.text(what)?;
        if text.is_empty() {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| garbled(what, &text))
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, Fault> {
        Ok(self.text(what)? == "1")
    }

    pub(crate) fn millis(&mut self, what: &'static str) -> Result<Duration, Fault> {
        self.value(what).map(Duration::from_millis)
    }

    pub(crate) fn epoch(&mut self) -> Result<Epoch, Fault> {
        Ok(Epoch::new(
            self.value("incarnation")?,
            self.value("epoch counter")?,
        ))
    }

    /// Sandbox, worker, incarnation, counter.
    pub(crate) fn sandbox(&mut self) -> Result<SandboxRef, Fault> {
        Ok(SandboxRef {
            sandbox: self.value("sandbox id")?,
            worker: self.value("worker id")?,
            epoch: self.epoch()?,
        })
    }

    /// The word that says which answer this is.
    pub(crate) fn tag(&mut self) -> Result<String, Fault> {
        self.text("answer")
    }
}

/// An error that shows a bounded piece of what was found.
pub(crate) fn garbled(what: &'static str, found: &str) -> Fault {
    Fault::Garbled {
        what,
        found: found.chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::SandboxId;

    fn answer(texts: &[&str]) -> Answer {
        Answer::new(texts.iter().map(|&t| t.to_owned()).collect())
    }

    #[test]
    fn a_sandbox_is_read_whole_or_not_at_all() {
        let id = SandboxId::new();
        let text = id.to_string();
        let read = answer(&[&text, "w1", "3", "9"]).sandbox().unwrap();
        assert_eq!(read.sandbox, id);
        assert_eq!(read.epoch, Epoch::new(3, 9));
        for bad in [
            &["", "w1", "3", "9"][..],
            &[&text, "w 1", "3", "9"],
            &[&text, "w1", "-3", "9"],
            &[&text, "w1", "3", "4294967296"],
            &[&text, "w1", "3"],
            &[],
        ] {
            assert!(
                matches!(answer(bad).sandbox(), Err(Fault::Garbled { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn what_is_shown_of_garbage_is_bounded() {
        let Err(Fault::Garbled { found, .. }) = answer(&[&"x".repeat(9999)]).value::<u32>("n")
        else {
            panic!("not garbled")
        };
        assert_eq!(found.len(), 80);
    }
}
