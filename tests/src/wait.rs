//! Waiting on conditions instead of sleeping.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Asks again and again until the condition answers `Ok`, and returns that.
///
/// An `Err` says what is the case instead; the last one is in the failure. A
/// condition that hangs is cut off at the time-out too.
pub async fn eventually<T, S, F, Fut>(
    what: &str,
    timeout: Duration,
    mut condition: F,
) -> anyhow::Result<T>
where
    S: Display,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, S>>,
{
    let last: Mutex<Option<String>> = Mutex::new(None);
    let asking = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match condition().await {
                Ok(value) => return value,
                Err(status) => {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(status.to_string());
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    };
    if let Ok(value) = tokio::time::timeout(timeout, asking).await {
        return Ok(value);
    }
    match last.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(status) => bail!("no {what} within {timeout:?}; last status: {status}"),
        None => bail!("no {what} within {timeout:?}; the condition never answered"),
    }
}
