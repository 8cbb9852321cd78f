//! The second gate: which epoch may act. A pure state machine; what "kill
//! everything" means is the caller's business.

/// The highest epoch that was seen. Only ever grows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EpochGate {
    highest: u64,
    /// The previous holder's processes may still be there: a takeover was
    /// begun and has not succeeded.
    taking_over: bool,
}

/// What a call under an epoch may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Go on: this holder acted before.
    Current,
    /// A new holder: end everything of the previous one, then go on.
    Adopt,
    /// A superseded holder: refuse.
    Stale { highest: u64 },
}

impl EpochGate {
    /// Judges a call and remembers its epoch, so that from here on an older
    /// holder is refused even while the new one's takeover is still going on.
    pub(crate) fn judge(&mut self, epoch: u64) -> Decision {
        match epoch.cmp(&self.highest) {
            std::cmp::Ordering::Less => Decision::Stale {
                highest: self.highest,
            },
            std::cmp::Ordering::Equal if self.taking_over => Decision::Adopt,
            std::cmp::Ordering::Equal => Decision::Current,
            std::cmp::Ordering::Greater => {
                self.highest = epoch;
                self.taking_over = true;
                Decision::Adopt
            }
        }
    }

    /// Everything of the previous holder is gone.
    pub(crate) fn taken_over(&mut self) {
        self.taking_over = false;
    }

    pub(crate) fn highest(self) -> u64 {
        self.highest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_grows() {
        let mut gate = EpochGate::default();
        for (epoch, expected, highest) in [
            (0, Decision::Current, 0),
            (1, Decision::Adopt, 1),
            (1, Decision::Current, 1),
            (0, Decision::Stale { highest: 1 }, 1),
            (1 << 32, Decision::Adopt, 1 << 32),
            (2, Decision::Stale { highest: 1 << 32 }, 1 << 32),
            ((1 << 32) | 1, Decision::Adopt, (1 << 32) | 1),
            (u64::MAX, Decision::Adopt, u64::MAX),
            (u64::MAX, Decision::Current, u64::MAX),
            (
                u64::MAX - 1,
                Decision::Stale { highest: u64::MAX },
                u64::MAX,
            ),
        ] {
            assert_eq!(gate.judge(epoch), expected, "{epoch}");
            gate.taken_over();
            assert_eq!(gate.highest(), highest);
        }
    }

    #[test]
    fn a_takeover_that_failed_is_tried_again() {
        let mut gate = EpochGate::default();
        assert_eq!(gate.judge(5), Decision::Adopt);
        assert_eq!(gate.judge(5), Decision::Adopt);
        assert_eq!(gate.judge(4), Decision::Stale { highest: 5 });
        gate.taken_over();
        assert_eq!(gate.judge(5), Decision::Current);
    }
}
