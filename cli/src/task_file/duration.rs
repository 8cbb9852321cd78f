//! Durations as people write them: `30s`, `1m30s`, `500ms`.

use std::time::Duration;

use super::Problem;

/// Milliseconds of a duration such as `30s`; zero is not one.
pub(crate) fn millis(field: &str, text: &str) -> Result<u64, Problem> {
    let wrong =
        |why: String| Problem::at(field, format!("{text:?} is no duration ({why}), try 30s"));
    let duration =
        humantime::parse_duration(text.trim()).map_err(|error| wrong(error.to_string()))?;
    if duration.is_zero() {
        return Err(Problem::at(field, "is zero, leave it out for the default"));
    }
    // Less than a millisecond is asked for, and one is the least there is.
    let millis = duration.max(Duration::from_millis(1)).as_millis();
    u64::try_from(millis).map_err(|_| wrong("too long".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::millis;

    #[test]
    fn durations_and_what_is_none() {
        assert_eq!(millis("t", "30s"), Ok(30_000));
        assert_eq!(millis("t", "1m30s"), Ok(90_000));
        assert_eq!(millis("t", "1us"), Ok(1));
        assert_eq!(
            millis("spec.timeout", "0s").unwrap_err().to_string(),
            "spec.timeout: is zero, leave it out for the default"
        );
        let error = millis("timeout", "soon").unwrap_err().to_string();
        assert!(
            error.starts_with("timeout: \"soon\" is no duration"),
            "{error}"
        );
    }
}
