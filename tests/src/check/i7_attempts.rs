//! I7: attempts never exceed the limit. Each is counted when it is claimed, once.
//!
//! A Redis that was flushed has forgotten what it counted: the limit holds under each incarnation.

use std::collections::BTreeMap;

use broker_schema::Epoch;
use remuda_telemetry::history::Event;

use super::{Invariant, Violation};
use crate::history::{History, Line};

/// The claims of one task under one incarnation, by epoch: asking again with the same nonce gets
/// the same.
type Claims<'a> = BTreeMap<u64, (u32, &'a Line)>;

pub(super) fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut tasks: BTreeMap<(&str, &str, u32), (u32, Claims<'_>)> = BTreeMap::new();
    for line in history.iter() {
        let Event::Claimed {
            tenant,
            task,
            attempt,
            limit,
            epoch,
            ..
        } = &line.event
        else {
            continue;
        };
        let about = || format!("task {task}");
        if attempt > limit {
            let what = format!("attempt {attempt} was claimed, {limit} are allowed");
            found.push(Violation::new(Invariant::I7, about(), what).shown_by([line]));
        }
        let incarnation = Epoch(*epoch).incarnation();
        let (_, claims) = tasks
            .entry((tenant, task, incarnation))
            .or_insert_with(|| (*limit, Claims::new()));
        let twice = claims
            .iter()
            .find(|(other, (same, _))| same == attempt && *other != epoch);
        if let Some((other, (_, before))) = twice {
            let what = format!("attempt {attempt} was claimed under epochs {other} and {epoch}");
            found.push(Violation::new(Invariant::I7, about(), what).shown_by([before, line]));
        }
        claims.entry(*epoch).or_insert((*attempt, line));
    }
    for ((_, task, _), (limit, claims)) in tasks {
        if claims.len() > limit as usize {
            let what = format!("was claimed {} times, {limit} are allowed", claims.len());
            let lines = claims.values().map(|(_, line)| *line);
            let about = format!("task {task}");
            found.push(Violation::new(Invariant::I7, about, what).shown_by(lines));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{EPOCH, SANDBOX, Sample, claimed};

    #[test]
    fn more_attempts_than_allowed() {
        let mut sample = Sample::clean();
        for attempt in 2..=4 {
            sample.add("d/1", claimed(attempt, EPOCH + u64::from(attempt), SANDBOX));
        }
        assert!(sample.broken(Invariant::I7).is_empty());
        sample.add("d/1", claimed(5, EPOCH + 5, SANDBOX));
        let broken = sample.broken(Invariant::I7);
        assert_eq!(
            broken,
            [
                "attempt 5 was claimed, 4 are allowed",
                "was claimed 5 times, 4 are allowed"
            ]
        );
    }

    #[test]
    fn one_attempt_is_claimed_twice() {
        let mut sample = Sample::clean();
        sample.add("d/2", claimed(1, EPOCH + 1, SANDBOX));
        let broken = sample.broken(Invariant::I7);
        assert!(
            broken[0].starts_with("attempt 1 was claimed under"),
            "{broken:?}"
        );
        // The same claim, asked for again.
        let mut sample = Sample::clean();
        sample.add("d/2", claimed(1, EPOCH, SANDBOX));
        assert!(sample.broken(Invariant::I7).is_empty());
    }

    #[test]
    fn a_flushed_redis_counts_anew() {
        let mut sample = Sample::clean();
        sample.add("d/1", claimed(1, (2 << 32) | 1, SANDBOX));
        assert!(sample.broken(Invariant::I7).is_empty());
    }
}
