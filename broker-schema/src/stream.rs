//! Streams and consumers as data; the client crate makes them.

use std::time::Duration;

use crate::{PoolId, Subjects, TenantId, Term, WorkerId};

/// A stream that the fleet needs. Everything that a promise rests on is
/// written out, and compared with what the server says it made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamDef {
    pub name: String,
    pub subjects: Vec<String>,
    pub retention: Retention,
    pub discard: Discard,
    /// −1 for no limit.
    pub max_bytes: i64,
    pub max_message_bytes: i32,
    /// −1 for no limit.
    pub max_messages_per_subject: i64,
    pub max_age: Duration,
    pub duplicate_window: Duration,
    pub allow_direct: bool,
    /// Where the server copies what it stored, once it has stored it.
    pub republish: Option<Republish>,
    pub replicas: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Kept until acknowledged.
    WorkQueue,
    /// Kept until a limit is reached.
    Limits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// A full stream refuses.
    New,
    /// A full stream refuses, and so does a full subject.
    NewPerSubject,
    /// A full stream forgets its oldest.
    Old,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Republish {
    pub source: String,
    pub destination: String,
}

/// A durable pull consumer with explicit acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerDef {
    pub stream: String,
    pub durable: String,
    /// Empty for every subject of the stream.
    pub filter: String,
    pub ack_wait: Duration,
    pub max_ack_pending: i64,
    pub max_waiting: i64,
    /// Deliveries of one message before the server gives up on it and says so
    /// in an advisory. −1 for no limit.
    pub max_deliver: i64,
    /// The server forgets the consumer when nobody has pulled for this long.
    pub inactive_threshold: Duration,
}

/// What an operator may size; the rest are promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    pub requests_bytes: i64,
    pub results_bytes: i64,
    pub results_age: Duration,
    pub terminals_bytes: i64,
    pub terminals_age: Duration,
    pub replicas: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            requests_bytes: 2 << 30,
            results_bytes: 8 << 30,
            results_age: Duration::from_secs(24 * 3600),
            terminals_bytes: 8 << 30,
            terminals_age: Duration::from_secs(72 * 3600),
            replicas: 1,
        }
    }
}

/// Longest payload of a request, in bytes.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Longest payload of a frame or a terminal, in bytes.
pub const MAX_RESULT_BYTES: usize = 1 << 20;
/// What nats-server must accept: a placement is a request and a little more.
pub const MAX_PAYLOAD_BYTES: usize = 8 << 20;

/// How long a message id is remembered.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);

/// Names of the streams under one prefix: `REMUDA_REQ` and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamNames {
    pub requests: String,
    pub placements: String,
    pub results: String,
    pub terminals: String,
    pub dead_letters: String,
    pub advisories: String,
    pub incarnation: String,
}

impl StreamNames {
    pub fn new(subjects: &Subjects) -> Self {
        let name = |kind: &str| format!("{}_{kind}", subjects.prefix().to_ascii_uppercase());
        Self {
            requests: name("REQ"),
            placements: name("RUN"),
            results: name("RES"),
            terminals: name("TERM"),
            dead_letters: name("DLQ"),
            advisories: name("ADV"),
            incarnation: name("INC"),
        }
    }
}

/// All streams of a fleet.
pub fn streams(subjects: &Subjects, sizes: &Sizes) -> Vec<StreamDef> {
    let names = StreamNames::new(subjects);
    let base = |name: &str, subject: String| StreamDef {
        name: name.to_owned(),
        subjects: vec![subject],
        retention: Retention::Limits,
        discard: Discard::New,
        max_bytes: sizes.requests_bytes,
        max_message_bytes: MAX_RESULT_BYTES as i32,
        max_messages_per_subject: -1,
        max_age: Duration::ZERO,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        republish: None,
        replicas: sizes.replicas,
    };
    let republish = |source: String| {
        Some(Republish {
            destination: subjects.live(&source).replacen(
                "*.*.*",
                "{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}",
                1,
            ),
            source,
        })
    };
    vec![
        StreamDef {
            retention: Retention::WorkQueue,
            max_message_bytes: MAX_REQUEST_BYTES as i32,
            ..base(&names.requests, subjects.requests())
        },
        StreamDef {
            retention: Retention::WorkQueue,
            max_message_bytes: MAX_PAYLOAD_BYTES as i32,
            ..base(&names.placements, subjects.placements())
        },
        StreamDef {
            max_bytes: sizes.results_bytes,
            max_age: sizes.results_age,
            republish: republish(subjects.results()),
            ..base(&names.results, subjects.results())
        },
        StreamDef {
            discard: Discard::NewPerSubject,
            max_bytes: sizes.terminals_bytes,
            max_age: sizes.terminals_age,
            max_messages_per_subject: 1,
            republish: republish(subjects.terminals()),
            ..base(&names.terminals, subjects.terminals())
        },
        StreamDef {
            discard: Discard::Old,
            max_message_bytes: MAX_PAYLOAD_BYTES as i32,
            max_bytes: 1 << 30,
            ..base(&names.dead_letters, subjects.dead_letters())
        },
        StreamDef {
            discard: Discard::Old,
            max_bytes: 64 << 20,
            max_age: Duration::from_secs(7 * 24 * 3600),
            subjects: [&names.requests, &names.placements]
                .map(|stream| format!("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{stream}.>"))
                .into(),
            ..base(&names.advisories, String::new())
        },
        StreamDef {
            discard: Discard::Old,
            max_messages_per_subject: 1,
            max_bytes: 1 << 20,
            ..base(&names.incarnation, subjects.incarnation())
        },
    ]
}

/// How long a request stays with a dispatcher that says nothing.
pub const REQUEST_ACK_WAIT: Duration = Duration::from_secs(30);
/// How long a placement stays with a worker that says nothing: a lease's life.
pub const PLACEMENT_ACK_WAIT: Duration = Duration::from_secs(15);

/// How often a request is delivered to one leader: far more than any fault that
/// passes asks for. Attempts are counted at the claim, not here.
pub const REQUEST_MAX_DELIVER: i64 = 1000;
/// The same for a placement.
pub const PLACEMENT_MAX_DELIVER: i64 = 100;

/// The consumer of one lane, the requests of one tenant for one pool, in one
/// term of the pool's leader. Lanes are apart so that no backlog stands before
/// another tenant's; terms are, so that a new leader gets at once what an old
/// one had not settled, and an old one's acknowledgements go nowhere.
pub fn lane_consumer(
    subjects: &Subjects,
    tenant: &TenantId,
    pool: &PoolId,
    term: Term,
    window: usize,
) -> ConsumerDef {
    ConsumerDef {
        stream: StreamNames::new(subjects).requests,
        // `=` is in no token: no two lanes share a name.
        durable: format!("lane-{tenant}={pool}={term}"),
        filter: subjects.request(tenant, pool),
        ack_wait: REQUEST_ACK_WAIT,
        max_ack_pending: window as i64,
        max_waiting: 512,
        max_deliver: REQUEST_MAX_DELIVER,
        inactive_threshold: Duration::from_secs(24 * 3600),
    }
}

/// The term that a lane's consumer is of; `None` for any other name.
pub fn lane_term(durable: &str) -> Option<Term> {
    let (_, term) = durable.strip_prefix("lane-")?.rsplit_once('=')?;
    term.parse().ok()
}

/// Placements that a worker is done with and has yet to acknowledge, at most: it does that a few
/// at a time.
const SETTLING: i64 = 64;

/// One worker's consumer of its placements.
pub fn worker_consumer(subjects: &Subjects, worker: &WorkerId, slots: usize) -> ConsumerDef {
    ConsumerDef {
        stream: StreamNames::new(subjects).placements,
        durable: format!("worker-{worker}"),
        filter: subjects.placements_of(worker),
        ack_wait: PLACEMENT_ACK_WAIT,
        max_ack_pending: slots.max(1) as i64 * 2 + SETTLING,
        max_waiting: 4096,
        max_deliver: PLACEMENT_MAX_DELIVER,
        inactive_threshold: Duration::from_secs(3600),
    }
}

/// The dispatchers' consumer of the advisories on messages that the server has
/// given up on.
pub fn advisory_consumer(subjects: &Subjects) -> ConsumerDef {
    ConsumerDef {
        stream: StreamNames::new(subjects).advisories,
        durable: "dispatcher".to_owned(),
        filter: String::new(),
        ack_wait: Duration::from_secs(30),
        max_ack_pending: 64,
        max_waiting: 64,
        max_deliver: -1,
        inactive_threshold: Duration::from_secs(7 * 24 * 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_stream_is_a_gate() {
        let subjects = Subjects::default();
        let all = streams(&subjects, &Sizes::default());
        let term = all.iter().find(|s| s.name == "REMUDA_TERM").unwrap();
        assert_eq!(term.max_messages_per_subject, 1);
        assert_eq!(term.discard, Discard::NewPerSubject);
        let live = term.republish.as_ref().unwrap();
        assert_eq!(live.source, "remuda.term.*.*.*");
        assert_eq!(
            live.destination,
            "remuda.live.term.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"
        );
    }

    #[test]
    fn no_two_streams_share_a_subject() {
        let all = streams(&Subjects::default(), &Sizes::default());
        let mut subjects: Vec<_> = all.iter().flat_map(|s| &s.subjects).collect();
        let count = subjects.len();
        subjects.sort();
        subjects.dedup();
        assert_eq!(subjects.len(), count);
    }

    #[test]
    fn lanes_and_terms_have_names_of_their_own() {
        let subjects = Subjects::default();
        let name = |tenant: &str, pool: &str, term| {
            let (tenant, pool) = (tenant.parse().unwrap(), pool.parse().unwrap());
            lane_consumer(&subjects, &tenant, &pool, Term(term), 1).durable
        };
        let names = [
            name("a-b", "c", 1),
            name("a", "b-c", 1),
            name("a", "b-c", 2),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(lane_term(&names[2]), Some(Term(2)));
        for other in [
            "lane-a-b",
            "lane-a=b=",
            "lane-a=b=x",
            "worker-w",
            "a=b=1",
            "",
        ] {
            assert_eq!(lane_term(other), None, "{other}");
        }
    }
}
