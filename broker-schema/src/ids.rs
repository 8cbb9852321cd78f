//! Ids as newtypes: tokens that people choose, UUIDs that we make, epochs.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// A name that may stand in a subject: `[A-Za-z0-9_-]{1,64}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(Box<str>);

/// Why a text is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("is empty, expected 1 to {max} of [A-Za-z0-9_-]", max = Token::MAX_LEN)]
    Empty,
    #[error("has {len} characters, expected at most {max}", max = Token::MAX_LEN)]
    TooLong { len: usize },
    #[error("has the character {found:?} at {at}, expected only [A-Za-z0-9_-]")]
    BadCharacter { found: char, at: usize },
    #[error("is not a UUID: {text:?}")]
    NotUuid { text: String },
}

impl Token {
    /// Longest token, in bytes.
    pub const MAX_LEN: usize = 64;

    pub fn new(text: &str) -> Result<Self, InvalidId> {
        if text.is_empty() {
            return Err(InvalidId::Empty);
        }
        if let Some((at, found)) = text
            .char_indices()
            .find(|(_, c)| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-')))
        {
            return Err(InvalidId::BadCharacter { found, at });
        }
        if text.len() > Self::MAX_LEN {
            return Err(InvalidId::TooLong { len: text.len() });
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The shape that both kinds of id share: text in, text out, serde, schema.
macro_rules! text_id {
    ($name:ident, $pattern:expr) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern })
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

macro_rules! token_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Token);

        impl $name {
            pub fn new(text: &str) -> Result<Self, InvalidId> {
                Token::new(text).map(Self)
            }

            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        text_id!($name, "^[A-Za-z0-9_-]{1,64}$");
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            /// A new UUIDv7: ids made later sort later.
            #[allow(clippy::new_without_default, reason = "a default id would be a surprise")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn as_uuid(&self) -> &Uuid {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.as_hyphenated(), f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                // Only the hyphenated form: an id has one spelling, or the same
                // task could be asked for under two subjects.
                Uuid::try_parse(text)
                    .ok()
                    .filter(|uuid| uuid.as_hyphenated().to_string() == text)
                    .map(Self)
                    .ok_or_else(|| InvalidId::NotUuid {
                        text: text.chars().take(80).collect(),
                    })
            }
        }

        text_id!($name, "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$");
    };
}

token_id!(
    /// An isolation domain: its own subjects, quotas, sandboxes.
    TenantId
);
token_id!(
    /// A trainer's name for one training or evaluation run.
    RunId
);
token_id!(
    /// The samples of one prompt, scheduled and cancelled together.
    GroupId
);
token_id!(
    /// A template for sandboxes and how many of them stay warm.
    PoolId
);
token_id!(
    /// One worker process. A restarted worker is another worker.
    WorkerId
);
token_id!(
    /// One dispatcher process. A restarted dispatcher is another dispatcher.
    DispatcherId
);
uuid_id!(
    /// An ordered list of steps with one terminal result.
    TaskId
);
uuid_id!(
    /// One isolated place that runs steps.
    SandboxId
);

impl TaskId {
    /// An id that follows from what it is made of: the same for the same.
    pub fn derived(from: &[u8]) -> Self {
        let digest = <sha2::Sha256 as sha2::Digest>::digest(from);
        let mut bytes = [0; 16];
        for (byte, of) in bytes.iter_mut().zip(digest.iter()) {
            *byte = *of;
        }
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

/// A lease's fencing token: `incarnation << 32 | counter`. Only ever grows for
/// a sandbox.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    pub const fn new(incarnation: u32, counter: u32) -> Self {
        Self(((incarnation as u64) << 32) | counter as u64)
    }

    pub const fn incarnation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub const fn counter(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation(), self.counter())
    }
}

/// Which leadership of a pool it is: `incarnation << 32 | counter`. Every
/// change of the leader has a higher one, and none is ever given out twice,
/// however often Redis forgets. Names the consumers of the pool's lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term(pub u64);

impl Term {
    pub const fn new(incarnation: u32, counter: u32) -> Self {
        Self(Epoch::new(incarnation, counter).0)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Term {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_say_what_is_wrong_with_them() {
        assert_eq!(Token::new("").unwrap_err(), InvalidId::Empty);
        assert_eq!(
            Token::new("a.b").unwrap_err(),
            InvalidId::BadCharacter { found: '.', at: 1 }
        );
        assert_eq!(
            Token::new(&"x".repeat(65)).unwrap_err(),
            InvalidId::TooLong { len: 65 }
        );
        assert_eq!(Token::new("Az_0-9").unwrap().as_str(), "Az_0-9");
    }

    #[test]
    fn a_uuid_has_one_spelling() {
        let id = TaskId::new();
        assert_eq!(id.to_string().parse::<TaskId>().unwrap(), id);
        assert!(id.to_string().to_uppercase().parse::<TaskId>().is_err());
        assert!(id.as_uuid().simple().to_string().parse::<TaskId>().is_err());
    }

    #[test]
    fn a_derived_id_is_an_id_and_always_the_same() {
        let id = TaskId::derived(b"a");
        assert_eq!(id, TaskId::derived(b"a"));
        assert_ne!(id, TaskId::derived(b"b"));
        assert_eq!(id.to_string().parse::<TaskId>().unwrap(), id);
    }

    #[test]
    fn epochs_order_by_incarnation_first() {
        assert!(Epoch::new(2, 0) > Epoch::new(1, u32::MAX));
        assert_eq!(Epoch::new(7, 9).incarnation(), 7);
        assert_eq!(Epoch::new(7, 9).counter(), 9);
    }

    #[test]
    fn terms_order_by_incarnation_first_and_are_read_back() {
        assert!(Term::new(2, 0) > Term::new(1, u32::MAX));
        let term = Term::new(3, 5);
        assert_eq!(term.to_string().parse(), Ok(term));
        assert!("-1".parse::<Term>().is_err());
    }
}
