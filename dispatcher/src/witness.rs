//! Looks at what is wrong around the fleet and nobody's fault in it: clocks, keys in Redis that are
//! not the fleet's, and what Redis had to refuse. Told in the log and counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use remuda_telemetry::Chain;
use remuda_telemetry::metrics::Label;

use crate::fleet::Fleet;

/// What Redis may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Heartbeat,
    Renewal,
    Release,
    Other,
}

impl Label for Refused {
    const KEY: &'static str = "what";

    fn value(&self) -> &'static str {
        match self {
            Self::Heartbeat => "heartbeat",
            Self::Renewal => "renewal",
            Self::Release => "release",
            Self::Other => "other",
        }
    }
}

impl Refused {
    fn named(name: &str) -> Self {
        [Self::Heartbeat, Self::Renewal, Self::Release]
            .into_iter()
            .find(|known| known.value() == name)
            .unwrap_or(Self::Other)
    }
}

pub(crate) async fn run(fleet: Arc<Fleet>) {
    let mut tick = tokio::time::interval(fleet.options.timings.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut foreign = 0;
    let mut refused = None;
    loop {
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            _ = tick.tick() => {}
        }
        let round = async {
            clocks(&fleet).await;
            let now = fleet.lease.foreign_keys();
            fleet.metrics.foreign_keys.add(now - foreign, ());
            foreign = now;
            if fleet.leadership.leads_fleet() {
                refusals(&fleet, &mut refused).await;
            } else {
                refused = None;
            }
        };
        tokio::select! {
            () = fleet.group.token().cancelled() => return,
            () = round => {}
        }
    }
}

async fn clocks(fleet: &Fleet) {
    let kept = match fleet.lease.clock_offset().await {
        Ok(redis) => fleet.broker.keep_time(redis).await,
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "the clock is not compared");
            return;
        }
    };
    if let Err(error) = kept {
        tracing::debug!(error = %Chain(&error), "the clock is not compared");
    }
}

async fn refusals(fleet: &Fleet, before: &mut Option<BTreeMap<String, u64>>) {
    let now = match fleet.lease.refusals().await {
        Ok(now) => now,
        Err(error) => {
            tracing::debug!(error = %Chain(&error), "what was refused is not known");
            return;
        }
    };
    if let Some(before) = before {
        for (what, more) in grown(before, &now) {
            tracing::warn!(
                what,
                more,
                "redis refused somebody who is not, or no longer, who they say"
            );
            fleet.metrics.refused.add(more, Refused::named(&what));
        }
    }
    *before = Some(now);
}

/// By how much counts have grown; a flushed Redis begins again.
fn grown(before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> Vec<(String, u64)> {
    now.iter()
        .map(|(what, count)| {
            let was = before.get(what).copied().unwrap_or_default();
            (what.clone(), count.checked_sub(was).unwrap_or(*count))
        })
        .filter(|(_, more)| *more > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told() {
        let counts = |renewals, heartbeats| {
            BTreeMap::from([
                ("renewal".to_owned(), renewals),
                ("heartbeat".to_owned(), heartbeats),
            ])
        };
        let more = |before: &_, now: &_| grown(before, now);
        assert_eq!(more(&counts(1, 2), &counts(1, 2)), []);
        assert_eq!(
            more(&counts(1, 2), &counts(4, 2)),
            [("renewal".to_owned(), 3)]
        );
        // Flushed in between.
        assert_eq!(
            more(&counts(5, 5), &counts(2, 0)),
            [("renewal".to_owned(), 2)]
        );
        assert_eq!(Refused::named("release"), Refused::Release);
        assert_eq!(Refused::named("x"), Refused::Other);
    }
}
