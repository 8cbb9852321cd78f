//! What time it is. A machine with the wrong clock would call tasks expired that are not, and
//! write times into terminals that nobody can use. Three clocks are about: the machine's,
//! nats-server's and Redis's; a daemon goes by the one in the middle, so that any one may be wrong.

use std::sync::OnceLock;
use std::time::SystemTime;

use broker_schema::Timestamp;
use remuda_telemetry::metrics::{Gauge, gauge};
use serde::Deserialize;

use super::error::Cause;
use super::{Broker, BrokerError};

/// Clocks that differ by less than this are the same, in microseconds.
const TOLERATED_US: i64 = 2_000_000;

/// JetStream says the time with every answer.
#[derive(Deserialize)]
struct Answered {
    ts: String,
}

impl Broker {
    /// How far nats-server's clock is ahead of this machine's, in microseconds.
    pub async fn clock_offset(&self) -> Result<i64, BrokerError> {
        let stream = &self.streams().incarnation;
        let failed = |source: Cause| BrokerError::Stream {
            operation: "ask for the time of",
            stream: stream.clone(),
            source,
        };
        let sent = Timestamp::of_this_machine();
        let answered: Answered = self
            .jetstream()
            .request(format!("STREAM.INFO.{stream}"), &())
            .await
            .map_err(|error| failed(error.into()))?;
        let received = Timestamp::of_this_machine();
        let there: SystemTime =
            humantime::parse_rfc3339_weak(&answered.ts).map_err(|error| failed(error.into()))?;
        Ok(between(sent, received, Timestamp::from(there)))
    }

    /// Goes by the clock in the middle of this machine's, nats-server's, and a third that is
    /// `third` microseconds ahead of this machine's. Tells when that changes.
    pub async fn keep_time(&self, third: i64) -> Result<(), BrokerError> {
        static SHOWN: OnceLock<Gauge> = OnceLock::new();
        let ours = self.clock_offset().await?;
        let correction = middle(ours, third);
        let now = Timestamp::now().0.cast_signed();
        let applied = now - Timestamp::of_this_machine().0.cast_signed();
        if (applied - correction).abs() >= TOLERATED_US {
            if correction == 0 {
                tracing::info!("this machine's clock is right again");
            } else {
                tracing::error!(
                    seconds = correction / 1_000_000,
                    "this machine's clock is behind nats-server's and Redis's by so much, theirs is gone by: set it"
                );
            }
        }
        Timestamp::correct(correction);
        let off = ours.abs().max(third.abs());
        if correction == 0 && off >= TOLERATED_US {
            tracing::debug!(nats = ours, redis = third, "a server's clock is wrong");
        }
        SHOWN
            .get_or_init(|| {
                gauge(
                    "remuda.clock.correction",
                    "Seconds that this machine's clock is behind the fleet's",
                )
            })
            .set(correction / 1_000_000, ());
        Ok(())
    }
}

/// The offset of a clock that was read somewhere between two moments of ours.
fn between(sent: Timestamp, received: Timestamp, there: Timestamp) -> i64 {
    let here = i128::from(sent.0) + i128::from(received.0);
    let offset = i128::from(there.0) - here / 2;
    i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX })
}

/// What to add to this machine's clock (0) to have the one in the middle; nothing where that is
/// its own, or nearly.
fn middle(nats: i64, redis: i64) -> i64 {
    let mut clocks = [0, nats, redis];
    clocks.sort_unstable();
    if clocks[1].abs() < TOLERATED_US {
        0
    } else {
        clocks[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600 * 1_000_000;

    #[test]
    fn any_one_clock_may_be_wrong() {
        for (nats, redis, expected) in [
            (0, 0, 0),
            (300, -500, 0),
            // This machine is a day behind, a day ahead.
            (DAY, DAY + 700, DAY),
            (-DAY, -DAY - 700, -DAY),
            // One of the servers is.
            (DAY, 20, 0),
            (-20, -DAY, 0),
            // All three differ: the one in the middle is the least wrong.
            (-DAY, DAY, 0),
            (DAY, 2 * DAY, DAY),
        ] {
            assert_eq!(middle(nats, redis), expected, "{nats} {redis}");
        }
    }

    #[test]
    fn an_offset_is_taken_from_the_middle_of_the_way() {
        let at = Timestamp;
        assert_eq!(between(at(1000), at(3000), at(2000)), 0);
        assert_eq!(between(at(1000), at(3000), at(12_000)), 10_000);
        assert_eq!(between(at(u64::MAX), at(u64::MAX), at(0)), i64::MIN);
    }
}
