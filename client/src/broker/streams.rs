//! Streams: made, compared with what the fleet's promises rest on, resized.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::stream::{
    Config, DiscardPolicy, Republish, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{self, response::Response, stream};
use broker_schema::stream::{Discard, Retention, Sizes, StreamDef, streams};
use futures::TryStreamExt as _;
use remuda_telemetry::failpoint;
use tokio::time::Instant;

use super::error::Cause;
use super::publish::Pauses;
use super::{Broker, BrokerError};

/// The name is taken by a stream with other settings.
const NAME_IN_USE: u64 = 10058;
const STREAM_NOT_FOUND: u64 = 10059;
/// There is no room for it.
const NO_STORAGE: u64 = 10047;
/// How long whoever makes the same stream at the same time may take.
const RACE: Duration = Duration::from_secs(3);

impl Broker {
    /// Makes the fleet's streams, or compares those that exist. Sizes and ages
    /// that differ are set; anything that a promise rests on is an error.
    pub async fn ensure_streams(&self, sizes: &Sizes) -> Result<(), BrokerError> {
        for def in streams(self.subjects(), sizes) {
            self.ensure_stream(&def).await?;
        }
        Ok(())
    }

    /// Makes one stream, or compares it.
    pub async fn ensure_stream(&self, def: &StreamDef) -> Result<(), BrokerError> {
        let wanted = config(def);
        let found = match self.stream_config("STREAM.INFO", &def.name, None).await {
            Ok(found) => found,
            Err(Failure::Api(error)) if error.error_code().0 == STREAM_NOT_FOUND => {
                let first_sequence =
                    (def.name == self.streams().incarnation).then(first_incarnation);
                self.create_stream(&Config {
                    first_sequence,
                    ..wanted.clone()
                })
                .await?
            }
            Err(failure) => return Err(failure.into_error("look up", &def.name)),
        };
        compare(def, &found)?;
        if resized(&wanted, &found) {
            let mut update = found.clone();
            update.max_bytes = wanted.max_bytes;
            update.max_age = wanted.max_age;
            update.max_message_size = wanted.max_message_size;
            update.num_replicas = wanted.num_replicas;
            let updated = self
                .stream_config("STREAM.UPDATE", &def.name, Some(&update))
                .await
                .map_err(|failure| failure.into_error("resize", &def.name))?;
            tracing::info!(stream = %def.name, "stream was resized");
            compare(def, &updated)?;
            if resized(&wanted, &updated) {
                return Err(mismatch(
                    def,
                    "sizes",
                    &sizes_text(&wanted),
                    &sizes_text(&updated),
                ));
            }
        }
        Ok(())
    }

    async fn create_stream(&self, wanted: &Config) -> Result<Config, BrokerError> {
        let mut pauses = Pauses::new(Instant::now() + RACE);
        loop {
            let failure = match self
                .stream_config("STREAM.CREATE", &wanted.name, Some(wanted))
                .await
            {
                Ok(made) => {
                    tracing::info!(stream = %wanted.name, "stream was made");
                    return Ok(made);
                }
                Err(failure) => failure,
            };
            // Somebody else makes it at the same time, and until that is done the server counts
            // its size twice. What they made is compared like any other.
            let raced = matches!(&failure, Failure::Api(error)
                if [NAME_IN_USE, NO_STORAGE].contains(&error.error_code().0));
            if raced && let Ok(found) = self.stream_config("STREAM.INFO", &wanted.name, None).await
            {
                return Ok(found);
            }
            if !raced || !pauses.pause().await {
                return Err(failure.into_error("make", &wanted.name));
            }
        }
    }

    async fn stream_config(
        &self,
        api: &str,
        name: &str,
        config: Option<&Config>,
    ) -> Result<Config, Failure> {
        let subject = format!("{api}.{name}");
        let response: Response<stream::Info> = match config {
            Some(config) => self.jetstream().request(subject, config).await,
            None => self.jetstream().request(subject, &()).await,
        }
        .map_err(|error| Failure::Request(error.into()))?;
        match response {
            Response::Ok(info) => Ok(info.config),
            Response::Err { error } => Err(Failure::Api(error)),
        }
    }

    /// How many messages each subject of a stream holds, of those that match
    /// `filter`.
    pub async fn subject_counts(
        &self,
        stream: &str,
        filter: &str,
    ) -> Result<BTreeMap<String, usize>, BrokerError> {
        let failed = |source: Cause| BrokerError::Stream {
            operation: "count the messages of",
            stream: stream.to_owned(),
            source,
        };
        self.jetstream()
            .get_stream_no_info(stream)
            .await
            .map_err(|error| failed(error.into()))?
            .info_with_subjects(filter)
            .await
            .map_err(|error| failed(error.into()))?
            .try_collect()
            .await
            .map_err(|error| failed(error.into()))
    }
}

/// Where the numbers of a new incarnation stream begin: beyond all that a stream had given out
/// that was lost, as long as it was not more than one a second. Seconds since 2024.
fn first_incarnation() -> u64 {
    const YEAR_2024: u64 = 1_704_067_200;
    let seconds = broker_schema::Timestamp::now().0 / 1_000_000;
    seconds.saturating_sub(YEAR_2024).max(1)
}

enum Failure {
    Api(jetstream::Error),
    Request(Cause),
}

impl Failure {
    fn into_error(self, operation: &'static str, stream: &str) -> BrokerError {
        let source: Cause = match self {
            Self::Api(error) => error.into(),
            Self::Request(source) => source,
        };
        BrokerError::Stream {
            operation,
            stream: stream.to_owned(),
            source,
        }
    }
}

fn config(def: &StreamDef) -> Config {
    let mut config = as_defined(def);
    if def.discard == Discard::NewPerSubject && failpoint::is_on(failpoint::dispatcher::NO_GATE) {
        // As if the stream had been made without thinking of the gate.
        config.discard_new_per_subject = false;
        config.max_messages_per_subject = -1;
    }
    config
}

fn as_defined(def: &StreamDef) -> Config {
    Config {
        name: def.name.clone(),
        subjects: def.subjects.clone(),
        retention: match def.retention {
            Retention::WorkQueue => RetentionPolicy::WorkQueue,
            Retention::Limits => RetentionPolicy::Limits,
        },
        discard: match def.discard {
            Discard::New | Discard::NewPerSubject => DiscardPolicy::New,
            Discard::Old => DiscardPolicy::Old,
        },
        discard_new_per_subject: def.discard == Discard::NewPerSubject,
        max_bytes: def.max_bytes,
        max_messages: -1,
        max_messages_per_subject: def.max_messages_per_subject,
        max_consumers: -1,
        max_age: def.max_age,
        max_message_size: def.max_message_bytes,
        duplicate_window: def.duplicate_window,
        storage: StorageType::File,
        num_replicas: def.replicas,
        allow_direct: def.allow_direct,
        republish: def.republish.as_ref().map(|republish| Republish {
            source: republish.source.clone(),
            destination: republish.destination.clone(),
            headers_only: false,
        }),
        ..Config::default()
    }
}

type Show = fn(&Config) -> String;

/// Every setting that a promise rests on, as the server has it.
fn compare(def: &StreamDef, found: &Config) -> Result<(), BrokerError> {
    let wanted = config(def);
    let sorted = |config: &Config| {
        let mut subjects = config.subjects.clone();
        subjects.sort();
        format!("{subjects:?}")
    };
    let settings: [(&'static str, Show); 12] = [
        ("retention", |c| format!("{:?}", c.retention)),
        ("discard", |c| format!("{:?}", c.discard)),
        ("discard_new_per_subject", |c| {
            c.discard_new_per_subject.to_string()
        }),
        ("max_msgs", |c| c.max_messages.max(-1).to_string()),
        ("max_msgs_per_subject", |c| {
            c.max_messages_per_subject.to_string()
        }),
        ("duplicate_window", |c| format!("{:?}", c.duplicate_window)),
        ("storage", |c| format!("{:?}", c.storage)),
        ("allow_direct", |c| c.allow_direct.to_string()),
        ("no_ack", |c| c.no_ack.to_string()),
        ("sealed", |c| c.sealed.to_string()),
        ("republish", |c| {
            c.republish.as_ref().map_or_else(
                || "none".to_owned(),
                |r| {
                    format!(
                        "{} to {} (headers only: {})",
                        r.source, r.destination, r.headers_only
                    )
                },
            )
        }),
        ("mirror or sources", |c| {
            (c.mirror.is_some() || c.sources.as_ref().is_some_and(|s| !s.is_empty())).to_string()
        }),
    ];
    if sorted(&wanted) != sorted(found) {
        return Err(mismatch(def, "subjects", &sorted(&wanted), &sorted(found)));
    }
    for (setting, show) in settings {
        let (expected, is) = (show(&wanted), show(found));
        if expected != is {
            return Err(mismatch(def, setting, &expected, &is));
        }
    }
    Ok(())
}

fn resized(wanted: &Config, found: &Config) -> bool {
    sizes_text(wanted) != sizes_text(found)
}

fn sizes_text(config: &Config) -> String {
    format!(
        "max_bytes {}, max_age {:?}, max_msg_size {}, num_replicas {}",
        config.max_bytes, config.max_age, config.max_message_size, config.num_replicas
    )
}

fn mismatch(def: &StreamDef, setting: &'static str, expected: &str, found: &str) -> BrokerError {
    BrokerError::StreamMismatch {
        stream: def.name.clone(),
        setting,
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_schema::Subjects;

    type Break = fn(&mut Config);

    #[test]
    fn each_promise_is_compared_alone() {
        let all = streams(&Subjects::default(), &Sizes::default());
        let def = all.iter().find(|def| def.name.ends_with("_TERM")).unwrap();
        assert!(compare(def, &config(def)).is_ok());
        let breaks: [(&str, Break); 9] = [
            ("subjects", |c| c.subjects.push("x".into())),
            ("retention", |c| c.retention = RetentionPolicy::Interest),
            ("discard", |c| c.discard = DiscardPolicy::Old),
            ("discard_new_per_subject", |c| {
                c.discard_new_per_subject = false;
            }),
            ("max_msgs_per_subject", |c| c.max_messages_per_subject = 2),
            ("storage", |c| c.storage = StorageType::Memory),
            ("allow_direct", |c| c.allow_direct = false),
            ("republish", |c| c.republish = None),
            ("no_ack", |c| c.no_ack = true),
        ];
        for (name, break_it) in breaks {
            let mut broken = config(def);
            break_it(&mut broken);
            match compare(def, &broken) {
                Err(BrokerError::StreamMismatch { setting, .. }) => assert_eq!(setting, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn sizes_are_no_promise() {
        let def = &streams(&Subjects::default(), &Sizes::default())[0];
        let mut smaller = config(def);
        smaller.max_bytes = 1;
        assert!(compare(def, &smaller).is_ok());
        assert!(resized(&config(def), &smaller));
    }
}
