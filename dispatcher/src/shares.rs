//! Members who take turns in proportion to their weights. Pure.
//!
//! Weighted fair queueing (WF2Q+): a turn of a member costs it the inverse of its weight, and of
//! those whose turn has begun by the clock, the one goes next whose turn is over first. The clock
//! advances with every turn by what a turn costs all of them together. Who comes begins at the
//! clock, so that nobody saves anything up while it has nothing to send; who leaves ahead of the
//! clock begins there when it comes back, so that nobody gains by leaving. Each that waits gets
//! its share, within one turn.

use std::collections::{BTreeMap, BTreeSet};

/// What a turn costs a member of weight 1. Divisible by small weights without a rest.
const UNIT: u128 = 720_720 << 20;

/// How many that left are remembered before those are forgotten that the clock has passed.
const REMEMBERED: usize = 64;

#[derive(Debug)]
pub(crate) struct Shares<K, V> {
    members: BTreeMap<K, Member<V>>,
    /// By when a turn would be over.
    order: BTreeSet<(u128, K)>,
    /// Where those would begin who left ahead of the clock.
    left: BTreeMap<K, u128>,
    clock: u128,
    weights: u128,
}

#[derive(Debug)]
struct Member<V> {
    /// Where its next turn begins.
    start: u128,
    weight: u32,
    value: V,
}

impl<V> Member<V> {
    fn cost(&self) -> u128 {
        UNIT / u128::from(self.weight.max(1))
    }

    fn end(&self) -> u128 {
        self.start + self.cost()
    }
}

impl<K, V> Default for Shares<K, V> {
    fn default() -> Self {
        Self {
            members: BTreeMap::new(),
            order: BTreeSet::new(),
            left: BTreeMap::new(),
            clock: 0,
            weights: 0,
        }
    }
}

impl<K: Ord + Clone, V> Shares<K, V> {
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<&mut V> {
        self.members.get_mut(key).map(|member| &mut member.value)
    }

    /// The member of this name, with this weight from now on.
    pub(crate) fn member(&mut self, key: &K, weight: u32) -> &mut V
    where
        V: Default,
    {
        let same = self
            .members
            .get(key)
            .is_some_and(|member| member.weight == weight);
        if !same {
            let before = self.detach(key);
            let start = before.as_ref().map_or_else(
                || self.left.remove(key).unwrap_or_default().max(self.clock),
                |member| member.start,
            );
            let member = Member {
                start,
                weight,
                value: before.map(|member| member.value).unwrap_or_default(),
            };
            self.attach(key.clone(), member);
        }
        &mut self
            .members
            .entry(key.clone())
            .or_insert_with(|| Member {
                start: 0,
                weight,
                value: V::default(),
            })
            .value
    }

    pub(crate) fn remove(&mut self, key: &K) {
        if let Some(member) = self.detach(key)
            && member.start > self.clock
        {
            self.left.insert(key.clone(), member.start);
            if self.left.len() > REMEMBERED.max(self.members.len()) {
                let clock = self.clock;
                self.left.retain(|_, start| *start > clock);
            }
        }
    }

    pub(crate) fn any(&self, ready: impl Fn(&K, &V) -> bool) -> bool {
        let mut members = self.members.iter();
        members.any(|(key, member)| ready(key, &member.value))
    }

    /// Whose turn it is, among those who are ready.
    pub(crate) fn next(&self, ready: impl Fn(&K, &V) -> bool) -> Option<&K> {
        let is_ready = |(key, member): &(&K, &Member<V>)| ready(key, &member.value);
        let starts = self.members.iter().filter(is_ready);
        let first = starts.map(|(_, member)| member.start).min()?;
        // Those who are not ready do not keep the clock from where the others are.
        let clock = self.clock.max(first);
        self.order.iter().map(|(_, key)| key).find(|key| {
            self.members
                .get(*key)
                .is_some_and(|member| member.start <= clock && ready(key, &member.value))
        })
    }

    /// The member has had a turn.
    pub(crate) fn charge(&mut self, key: &K) {
        let together = UNIT / self.weights.max(1);
        let Some(mut member) = self.detach(key) else {
            return;
        };
        // Who was not ready for long is owed two turns and no more; who waits all along is never
        // that far behind.
        let owed_most = self.clock.saturating_sub(2 * member.cost());
        let start = member.start.max(owed_most);
        self.clock = (self.clock + together).max(start);
        member.start = start + member.cost();
        self.attach(key.clone(), member);
    }

    /// The member's last turn came to nothing: as if there had been none.
    pub(crate) fn refund(&mut self, key: &K) {
        let together = UNIT / self.weights.max(1);
        self.clock = self.clock.saturating_sub(together);
        if let Some(mut member) = self.detach(key) {
            member.start = member.start.saturating_sub(member.cost());
            self.attach(key.clone(), member);
        }
    }

    fn detach(&mut self, key: &K) -> Option<Member<V>> {
        let member = self.members.remove(key)?;
        self.order.remove(&(member.end(), key.clone()));
        self.weights -= u128::from(member.weight.max(1));
        Some(member)
    }

    fn attach(&mut self, key: K, member: Member<V>) {
        self.order.insert((member.end(), key.clone()));
        self.weights += u128::from(member.weight.max(1));
        self.members.insert(key, member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a member waits with: how many turns it still wants.
    type Line = Shares<usize, u32>;

    fn turn(line: &mut Line, ready: impl Fn(usize) -> bool) -> Option<usize> {
        let key = *line.next(|key, _| ready(*key))?;
        line.charge(&key);
        Some(key)
    }

    fn turns(line: &mut Line, count: usize) -> Vec<usize> {
        (0..count).filter_map(|_| turn(line, |_| true)).collect()
    }

    fn line(weights: &[u32]) -> Line {
        let mut line = Line::default();
        for (key, weight) in weights.iter().enumerate() {
            line.member(&key, *weight);
        }
        line
    }

    #[test]
    fn equals_alternate_and_a_heavier_one_goes_more_often() {
        assert_eq!(turns(&mut line(&[1, 1]), 6), [0, 1, 0, 1, 0, 1]);
        let counted = turns(&mut line(&[3, 1]), 8);
        assert_eq!(counted.iter().filter(|key| **key == 0).count(), 6);
        assert_eq!(turns(&mut line(&[]), 3), Vec::<usize>::new());
    }

    #[test]
    fn nothing_is_saved_up_by_staying_away_and_nothing_gained_by_leaving() {
        let mut line = line(&[1, 1]);
        line.remove(&1);
        turns(&mut line, 50);
        line.member(&1, 1);
        // It begins now, and does not catch up on fifty turns.
        let next = turns(&mut line, 10);
        assert_eq!(next.iter().filter(|key| **key == 1).count(), 5, "{next:?}");
        // One of weight 1 beside one of 9 that leaves after each of its turns.
        let mut line = self::line(&[9, 1]);
        let mut its = 0;
        for _ in 0..1000 {
            if turn(&mut line, |_| true) == Some(1) {
                its += 1;
                line.remove(&1);
                line.member(&1, 1);
            }
        }
        assert!((98..=102).contains(&its), "{its} of 1000");
    }

    #[test]
    fn who_was_not_ready_gets_two_turns_ahead_and_no_more() {
        let mut line = line(&[1, 1]);
        for _ in 0..50 {
            assert_eq!(turn(&mut line, |key| key == 0), Some(0));
        }
        let next = turns(&mut line, 10);
        let its = next.iter().filter(|key| **key == 1).count();
        assert!((5..=7).contains(&its), "{next:?}");
    }

    #[test]
    fn a_heavy_one_takes_nothing_from_light_ones_in_the_long_run() {
        let mut line = line(&[29, 1, 1, 1, 1]);
        let served = turns(&mut line, 33 * 1000);
        for key in 1..5 {
            assert_eq!(served.iter().filter(|turn| **turn == key).count(), 1000);
        }
    }

    #[test]
    fn a_turn_that_came_to_nothing_is_had_again() {
        let mut line = line(&[2, 1]);
        let mut served = [0_u32, 0];
        for round in 0..600 {
            let key = turn(&mut line, |_| true).unwrap();
            // Every second turn finds nothing: the same one goes again.
            if round % 2 == 0 {
                line.refund(&key);
            } else {
                served[key] += 1;
            }
        }
        assert_eq!(served[0] + served[1], 300);
        assert!(served[0].abs_diff(200) <= 2, "{served:?}");
    }

    #[test]
    fn newcomers_without_end_starve_nobody() {
        let mut line = line(&[1]);
        let mut its = 0;
        for newcomer in 1..=1000 {
            line.member(&newcomer, 1);
            let key = turn(&mut line, |_| true).unwrap();
            if key == 0 {
                its += 1;
            } else {
                line.remove(&key);
            }
        }
        assert!(its >= 10, "{its} turns of 1000");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Over any time in which the same ones wait each gets its share, within one turn of
        /// what it is owed, and what others gain is what those turns add up to.
        #[test]
        fn each_gets_its_share(
            weights in prop::collection::vec(1..50_u32, 1..12),
            rounds in 1..2000_usize,
        ) {
            let mut line = line(&weights);
            let mut served = vec![0_f64; weights.len()];
            for key in turns(&mut line, rounds) {
                served[key] += 1.0;
            }
            let total: u32 = weights.iter().sum();
            for (served, weight) in served.iter().zip(&weights) {
                let owed = rounds as f64 * f64::from(*weight) / f64::from(total);
                prop_assert!(*served >= owed - 1.001, "{served} of {owed}");
                prop_assert!(*served <= owed + 1.001, "{served} for {owed}");
            }
        }

        /// Whoever comes, goes, is held up or gets its turn back: nobody who is ready all along
        /// waits longer than the others' weights allow.
        #[test]
        fn nobody_starves(
            weights in prop::collection::vec(1..20_u32, 2..8),
            events in prop::collection::vec((0..4_u8, any::<prop::sample::Index>()), 1..400),
        ) {
            let mut line = line(&weights);
            let mut held = std::collections::BTreeSet::new();
            let mut waited = 0_u32;
            // Member 0 waits all along.
            for (event, index) in events {
                let key = 1 + index.index(weights.len() - 1);
                match event {
                    0 => { line.remove(&key); }
                    1 => { line.member(&key, weights[key]); }
                    2 if !held.remove(&key) => { held.insert(key); }
                    _ => {}
                }
                let chosen = turn(&mut line, |key| !held.contains(&key)).unwrap();
                waited = if chosen == 0 { 0 } else { waited + 1 };
                let others: u32 = weights[1..].iter().sum();
                // A round of all of them, and one in which they come back with what they are owed.
                let bound = 2 * (others / weights[0]) + 3 * (weights.len() as u32 + 1);
                prop_assert!(waited <= bound, "{waited} turns, bound {bound}");
            }
        }
    }
}
