//! How many messages are wanted, and how many the server was asked for. Pure.

/// The most that one pull request asks for.
const MAX_BATCH: usize = 512;

/// The account of one puller. `outstanding` is the number of messages that the
/// server may still send without being asked again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    wanted: usize,
    outstanding: usize,
    /// Pulls of an earlier generation count for nothing any more.
    generation: u64,
}

/// One pull request. Its reply subject carries generation and batch, so that
/// an answer tells by itself what it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pull {
    pub(crate) generation: u64,
    pub(crate) batch: usize,
}

impl Pull {
    /// Reads `<anything>.<generation>.<batch>`.
    pub(crate) fn parse(subject: &str) -> Option<Self> {
        let mut tokens = subject.rsplit('.');
        let batch = tokens.next()?.parse().ok()?;
        let generation = tokens.next()?.parse().ok()?;
        Some(Self { generation, batch })
    }
}

impl Ledger {
    pub(crate) fn want(&mut self, n: usize) {
        self.wanted = n;
    }

    pub(crate) fn wanted(&self) -> usize {
        self.wanted
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The pull that is to be sent now, if any: none while half of what is
    /// wanted may still come without being asked for, so that a message does
    /// not cost a request of its own.
    pub(crate) fn due(&self) -> Option<Pull> {
        if self.outstanding > self.wanted / 2 {
            return None;
        }
        let batch = self.wanted.saturating_sub(self.outstanding).min(MAX_BATCH);
        (batch > 0).then_some(Pull {
            generation: self.generation,
            batch,
        })
    }

    /// It was sent.
    pub(crate) fn sent(&mut self, pull: Pull) {
        if pull.generation == self.generation {
            self.outstanding += pull.batch;
        }
    }

    /// A message came and goes to the caller.
    pub(crate) fn delivered(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.wanted = self.wanted.saturating_sub(1);
    }

    /// The server ended a pull with `left` of its messages not sent; where it
    /// does not say, none was.
    pub(crate) fn ended(&mut self, pull: Pull, left: Option<usize>) {
        if pull.generation == self.generation {
            let left = left.unwrap_or(pull.batch).min(pull.batch);
            self.outstanding = self.outstanding.saturating_sub(left);
        }
    }

    /// The server forgot every pull, or we take it that it did.
    pub(crate) fn forget(&mut self) {
        self.outstanding = 0;
        self.generation += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_tell_what_they_are_about() {
        assert_eq!(
            Pull::parse("_INBOX.abc.7.256"),
            Some(Pull {
                generation: 7,
                batch: 256
            })
        );
        for subject in ["", "7", "_INBOX.abc.x.1", "remuda.req.a.b", "_INBOX.1.-1"] {
            assert_eq!(Pull::parse(subject), None, "{subject}");
        }
    }

    #[test]
    fn a_refused_pull_is_asked_for_again() {
        let mut ledger = Ledger::default();
        ledger.want(8);
        let pull = ledger.due().unwrap();
        ledger.sent(pull);
        assert_eq!(ledger.due(), None);
        ledger.ended(pull, None);
        assert_eq!(ledger.due(), Some(pull));
    }

    #[test]
    fn what_an_earlier_generation_says_counts_for_nothing() {
        let mut ledger = Ledger::default();
        ledger.want(4);
        let old = ledger.due().unwrap();
        ledger.sent(old);
        ledger.forget();
        let new = ledger.due().unwrap();
        ledger.sent(new);
        ledger.ended(old, None);
        assert_eq!((ledger.outstanding(), ledger.due()), (4, None));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Want(usize),
        Deliver(usize),
        Expire(usize),
        Refuse(usize),
        Forget,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            (0usize..40).prop_map(Event::Want),
            any::<usize>().prop_map(Event::Deliver),
            any::<usize>().prop_map(Event::Expire),
            any::<usize>().prop_map(Event::Refuse),
            Just(Event::Forget),
        ];
        prop::collection::vec(event, 1..200)
    }

    proptest! {
        /// Against a model of the server: what the ledger takes for outstanding
        /// is what the server may still send, and a pull never asks for more
        /// than is wanted.
        #[test]
        fn the_account_is_the_servers(events in events()) {
            let mut ledger = Ledger::default();
            // Pulls at the server, each with what is left of it.
            let mut server: Vec<(Pull, usize)> = Vec::new();
            for event in events {
                match event {
                    Event::Want(n) => ledger.want(n),
                    Event::Deliver(which) if !server.is_empty() && ledger.wanted() > 0 => {
                        let at = which % server.len();
                        server[at].1 -= 1;
                        if server[at].1 == 0 {
                            server.remove(at);
                        }
                        ledger.delivered();
                    }
                    Event::Expire(which) if !server.is_empty() => {
                        let (pull, left) = server.remove(which % server.len());
                        ledger.ended(pull, Some(left));
                    }
                    Event::Refuse(which) if !server.is_empty() => {
                        let at = which % server.len();
                        if server[at].0.batch == server[at].1 {
                            let (pull, _) = server.remove(at);
                            ledger.ended(pull, None);
                        }
                    }
                    Event::Forget => {
                        server.clear();
                        ledger.forget();
                    }
                    _ => {}
                }
                if let Some(pull) = ledger.due() {
                    server.push((pull, pull.batch));
                    ledger.sent(pull);
                    prop_assert!(ledger.outstanding() <= ledger.wanted());
                }
                let total: usize = server.iter().map(|(_, left)| left).sum();
                prop_assert_eq!(ledger.outstanding(), total);
                prop_assert!(ledger.due().is_none());
            }
        }
    }
}
