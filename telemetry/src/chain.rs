//! Prints an error with everything that caused it, on one line.

use std::error::Error;
use std::fmt;

/// Displays `error: its source: its source's source`. Errors here keep their source out of their
/// own text, so that nothing is said twice.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Chain;

    #[derive(Debug, thiserror::Error)]
    #[error("file cannot be read")]
    struct Read(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("configuration is missing")]
    struct Configure(#[source] Read);

    #[test]
    fn prints_every_source_once() {
        let error = Configure(Read(std::io::Error::other("disk is gone")));
        assert_eq!(
            Chain(&error).to_string(),
            "configuration is missing: file cannot be read: disk is gone"
        );
    }

    #[test]
    fn prints_an_error_without_source_alone() {
        assert_eq!(Chain(&std::io::Error::other("alone")).to_string(), "alone");
    }
}
