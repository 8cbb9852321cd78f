//! The connection: made, checked, and the incarnation that everything rests on.

use std::sync::Arc;
use std::time::Duration;

use broker_schema::Timestamp;
use deadpool_redis::{Manager, Pool, Runtime};
use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, Script};

use crate::answer::{Answer, garbled};
use crate::error::{Fault, LeaseError};
use crate::foreign::Foreign;
use crate::keys;
use crate::options::LeaseOptions;
use crate::script::Scripts;

/// The fleet's state in Redis. Clones share the connections.
#[derive(Clone, Debug)]
pub struct LeaseStore {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Pool,
    scripts: Scripts,
    root: String,
    ttl: Duration,
    timeout: Duration,
    foreign: Foreign,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("root", &self.root)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// Oldest Redis that has what the scripts need.
const FLOOR: (u32, u32) = (7, 0);

impl LeaseStore {
    /// Connects and checks that the server will do.
    pub async fn connect(options: &LeaseOptions) -> Result<Self, LeaseError> {
        let problems = options.problems();
        if !problems.is_empty() {
            return Err(LeaseError::Options { problems });
        }
        let url = options.shown_url();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(options.timeout))
            .set_response_timeout(Some(options.timeout));
        let manager = Manager::new_with_config(options.url.as_str(), config).map_err(|source| {
            LeaseError::Url {
                url: url.clone(),
                source,
            }
        })?;
        let pool = Pool::builder(manager)
            .max_size(options.pool_size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(options.timeout))
            .create_timeout(Some(options.timeout))
            .recycle_timeout(Some(options.timeout))
            .build()
            .map_err(|source| LeaseError::Pool {
                url: url.clone(),
                source,
            })?;
        let store = Self {
            inner: Arc::new(Inner {
                pool,
                scripts: Scripts::new(),
                root: keys::root(&options.prefix),
                ttl: options.ttl,
                timeout: options.timeout,
                foreign: Foreign::default(),
            }),
        };
        let found = store
            .version()
            .await
            .map_err(|source| LeaseError::Connect {
                url: url.clone(),
                source,
            })?;
        if parse_version(&found).is_none_or(|version| version < FLOOR) {
            return Err(LeaseError::TooOld { url, found });
        }
        Ok(store)
    }

    /// How long leases and heartbeats hold.
    pub fn ttl(&self) -> Duration {
        self.inner.ttl
    }

    /// Whether Redis answers.
    pub async fn ping(&self) -> Result<(), LeaseError> {
        self.command::<String>(&redis::cmd("PING"))
            .await
            .map(drop)
            .map_err(LeaseError::Incarnation)
    }

    /// What about this server weakens promises: one sentence each, with the mend.
    pub async fn suitability(&self) -> Result<Vec<String>, LeaseError> {
        let mut warnings = Vec::new();
        let memory = self.info("memory").await.map_err(LeaseError::Incarnation)?;
        let policy = info_field(&memory, "maxmemory_policy").unwrap_or("unknown");
        if policy != "noeviction" {
            warnings.push(format!(
                "redis may evict leases under memory pressure (maxmemory-policy is {policy}): \
                 set maxmemory-policy noeviction"
            ));
        }
        let kept = self
            .info("persistence")
            .await
            .map_err(LeaseError::Incarnation)?;
        if info_field(&kept, "aof_enabled") != Some("1") {
            warnings.push(
                "redis forgets leases when it restarts (appendonly is off): set appendonly yes"
                    .to_owned(),
            );
        }
        Ok(warnings)
    }

    /// The incarnation that sandboxes are granted under; `None` where Redis is new, was flushed,
    /// or was started again: it may then have lost the last epochs that it gave out.
    pub async fn incarnation(&self) -> Result<Option<u32>, LeaseError> {
        let mut read = self.read_incarnation().await;
        if matches!(read, Err(Fault::Garbled { .. })) {
            let aside = Box::pin(self.set_foreign_aside()).await;
            aside.map_err(LeaseError::Incarnation)?;
            read = self.read_incarnation().await;
        }
        read.map_err(LeaseError::Incarnation)
    }

    async fn read_incarnation(&self) -> Result<Option<u32>, Fault> {
        let mut answer = self.run(&self.scripts().incarnation, &[]).await?;
        match answer.tag()?.as_str() {
            "in_force" => answer.value("incarnation").map(Some),
            "none" => Ok(None),
            other => Err(garbled("answer", other)),
        }
    }

    /// Puts `candidate` in force where [`incarnation`](Self::incarnation) is none, unless a
    /// newer one was before; returns the newest. The candidate must be one that was never in
    /// force before: a sequence of the broker's. Leases of an older incarnation that Redis still
    /// knows can be renewed: nothing is granted under their epochs any more.
    pub async fn install_incarnation(&self, candidate: u32) -> Result<u32, LeaseError> {
        let script = &self.scripts().install_incarnation;
        let answer = self.run(script, &[candidate.to_string()]).await;
        answer
            .and_then(|mut answer| answer.value("incarnation"))
            .map_err(LeaseError::Incarnation)
    }

    /// How far Redis's clock, the only one that all parties share, is ahead of this machine's, in
    /// microseconds; as exact as the way there and back is short.
    pub async fn clock_offset(&self) -> Result<i64, LeaseError> {
        let sent = Timestamp::of_this_machine();
        let (seconds, micros): (u64, u64) = self
            .command(&redis::cmd("TIME"))
            .await
            .map_err(LeaseError::Clock)?;
        let received = Timestamp::of_this_machine();
        let here = i128::from(sent.0 / 2 + received.0 / 2);
        let there = i128::from(seconds) * 1_000_000 + i128::from(micros);
        Ok(i64::try_from(there - here).unwrap_or(i64::MAX))
    }

    async fn version(&self) -> Result<String, Fault> {
        let info = self.info("server").await?;
        info_field(&info, "redis_version")
            .map(str::to_owned)
            .ok_or_else(|| garbled("version", &info))
    }

    async fn info(&self, section: &str) -> Result<String, Fault> {
        let mut info = redis::cmd("INFO");
        info.arg(section);
        self.command(&info).await
    }

    pub(crate) fn scripts(&self) -> &Scripts {
        &self.inner.scripts
    }

    pub(crate) fn foreign(&self) -> &Foreign {
        &self.inner.foreign
    }

    pub(crate) fn ttl_millis(&self) -> String {
        millis(self.inner.ttl)
    }

    pub(crate) fn key(&self, rest: &str) -> String {
        format!("{}:{rest}", self.inner.root)
    }

    /// Runs one script, once more where a foreign key stood in its way. Dropping the future does
    /// not undo what Redis was told.
    pub(crate) async fn run(&self, script: &Script, args: &[String]) -> Result<Answer, Fault> {
        match self.run_once(script, args).await {
            Err(fault) if self.mended(&fault).await => self.run_once(script, args).await,
            done => done,
        }
    }

    async fn run_once(&self, script: &Script, args: &[String]) -> Result<Answer, Fault> {
        self.bounded(async {
            let mut connection = self.inner.pool.get().await.map_err(Fault::Pool)?;
            let mut call = script.key(&self.inner.root);
            for arg in args {
                call.arg(arg);
            }
            call.invoke_async::<Vec<String>>(&mut connection)
                .await
                .map(Answer::new)
                .map_err(Fault::Redis)
        })
        .await
    }

    pub(crate) async fn command<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Fault> {
        self.bounded(async {
            let mut connection = self.inner.pool.get().await.map_err(Fault::Pool)?;
            command
                .query_async(&mut connection)
                .await
                .map_err(Fault::Redis)
        })
        .await
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let after = self.inner.timeout;
        match tokio::time::timeout(after, work).await {
            Ok(done) => done,
            Err(_) => Err(Fault::Timeout { after }),
        }
    }
}

pub(crate) fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

fn info_field<'i>(info: &'i str, name: &str) -> Option<&'i str> {
    info.lines()
        .filter_map(|line| line.trim().split_once(':'))
        .find(|(field, _)| *field == name)
        .map(|(_, value)| value)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_fields_are_read_from_info() {
        let info = "# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n";
        assert_eq!(info_field(info, "redis_version"), Some("7.0.15"));
        assert_eq!(info_field(info, "version"), None);
        assert_eq!(parse_version("7.0.15"), Some((7, 0)));
        assert_eq!(parse_version("garbage"), None);
        assert!(parse_version("6.2.1").unwrap() < FLOOR);
    }

    #[tokio::test]
    async fn nobody_there_is_said_with_the_address() {
        let options = LeaseOptions {
            url: "redis://127.0.0.1:1".into(),
            ..LeaseOptions::default()
        };
        let error = LeaseStore::connect(&options).await.unwrap_err();
        assert_eq!(error.code(), broker_schema::ErrorCode::RedisUnreachable);
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}
