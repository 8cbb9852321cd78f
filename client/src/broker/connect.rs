//! The connection: made, checked, kept.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{ConnectErrorKind, ConnectOptions};
use broker_schema::Subjects;
use broker_schema::stream::StreamNames;
use rand::Rng as _;
use tokio::sync::watch;

use super::link::{Link, LinkState};
use super::{BrokerError, BrokerOptions, Credentials};

/// Older servers lose settings silently, hang on a full disk and have open
/// security holes.
pub const VERSION_FLOOR: Version = Version(2, 10, 27);

/// How long one request to the server may take.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Acknowledgements that may be outstanding on one connection.
const MAX_UNACKNOWLEDGED: usize = 8192;
/// Longest pause between two attempts to reconnect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// A connection to the fleet's nats-server. Clones share it.
#[derive(Clone, Debug)]
pub struct Broker {
    nats: async_nats::Client,
    jetstream: jetstream::Context,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    subjects: Subjects,
    streams: StreamNames,
    link: Arc<Link>,
    url: String,
}

impl Broker {
    /// Connects once: a server that is not there is an error now. A connection
    /// that is lost later is made again for as long as the broker lives.
    pub async fn connect(options: &BrokerOptions) -> Result<Self, BrokerError> {
        let subjects = Subjects::new(&options.prefix).map_err(|error| BrokerError::Option {
            what: "prefix",
            value: options.prefix.clone(),
            mend: error.to_string(),
        })?;
        if !options.inbox_prefix.starts_with("_INBOX")
            || options.inbox_prefix.contains(['*', '>', ' '])
        {
            return Err(BrokerError::Option {
                what: "inbox prefix",
                value: options.inbox_prefix.clone(),
                mend: "must begin with _INBOX and have no wildcard".to_owned(),
            });
        }
        let url = options.display_url();
        let link = Arc::new(Link::new(url.clone()));
        let connecting = settings(options, &url, &link)
            .await?
            .connect(servers(&options.url));
        // The library's own bound is per address and does not cover the greeting.
        let nats = tokio::time::timeout(options.connect_timeout, connecting)
            .await
            .map_err(|elapsed| BrokerError::Connect {
                url: url.clone(),
                mend: "nothing answered in time, is it a nats-server and reachable from here",
                source: elapsed.into(),
            })?
            .map_err(|error| BrokerError::Connect {
                url: url.clone(),
                mend: mend(error.kind()),
                source: error.into(),
            })?;
        let jetstream = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .max_ack_inflight(MAX_UNACKNOWLEDGED)
            .backpressure_on_inflight(true)
            .build(nats.clone());
        let broker = Self {
            nats,
            jetstream,
            shared: Arc::new(Shared {
                streams: StreamNames::new(&subjects),
                subjects,
                link,
                url,
            }),
        };
        broker.check_server().await?;
        Ok(broker)
    }

    async fn check_server(&self) -> Result<(), BrokerError> {
        let info = self.nats.server_info();
        let found = Version::parse(&info.version);
        if found.is_none_or(|found| found < VERSION_FLOOR) {
            return Err(BrokerError::TooOld {
                name: info.server_name,
                url: self.shared.url.clone(),
                found: info.version,
            });
        }
        self.jetstream
            .query_account()
            .await
            .map_err(|error| BrokerError::NoJetStream {
                name: info.server_name.clone(),
                url: self.shared.url.clone(),
                source: error.into(),
            })?;
        Ok(())
    }

    pub fn nats(&self) -> &async_nats::Client {
        &self.nats
    }

    pub fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    pub fn subjects(&self) -> &Subjects {
        &self.shared.subjects
    }

    pub fn streams(&self) -> &StreamNames {
        &self.shared.streams
    }

    /// The server's address, without secrets.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// Whether the connection stands right now: for readiness.
    pub fn connected(&self) -> bool {
        self.shared.link.watch().borrow().connected
    }

    /// Resolves once the connection has been missing for `long` without a break, or will never
    /// come back.
    pub async fn lost_for(&self, long: Duration) {
        let mut link = self.link();
        loop {
            if link.wait_for(|state| !state.connected).await.is_err() {
                return;
            }
            let back = link.wait_for(|state| state.connected || state.closed);
            match tokio::time::timeout(long, back).await {
                Ok(Ok(state)) if !state.closed => {}
                _ => return,
            }
        }
    }

    /// Resolves once the connection stands; false where it will not any more.
    pub async fn regained(&self) -> bool {
        let mut link = self.link();
        let back = link.wait_for(|state| state.connected || state.closed);
        back.await.is_ok_and(|state| !state.closed)
    }

    pub(crate) fn link(&self) -> watch::Receiver<LinkState> {
        self.shared.link.watch()
    }
}

async fn settings(
    options: &BrokerOptions,
    url: &str,
    link: &Arc<Link>,
) -> Result<ConnectOptions, BrokerError> {
    let observer = Arc::clone(link);
    let mut settings = ConnectOptions::new()
        .name(&options.name)
        .connection_timeout(options.connect_timeout)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(Duration::from_secs(10))
        .custom_inbox_prefix(&options.inbox_prefix)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(move |event| {
            let link = Arc::clone(&observer);
            async move { link.observe(&event) }
        });
    if let Some(path) = &options.tls_ca {
        settings = settings
            .add_root_certificates(path.clone())
            .require_tls(true);
    }
    Ok(match &options.credentials {
        Credentials::None => settings,
        Credentials::Token(token) => settings.token(token.clone()),
        Credentials::UserPassword { user, password } => {
            settings.user_and_password(user.clone(), password.clone())
        }
        Credentials::Nkey(seed) => settings.nkey(seed.clone()),
        Credentials::File(path) => {
            settings
                .credentials_file(path)
                .await
                .map_err(|error| BrokerError::Connect {
                    url: url.to_owned(),
                    mend: "the credentials file cannot be read",
                    source: error.into(),
                })?
        }
    })
}

fn servers(url: &str) -> Vec<String> {
    url.split(',').map(|part| part.trim().to_owned()).collect()
}

/// At once, then doubling from 50 ms, spread so that a fleet does not come back
/// as one.
fn reconnect_delay(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let doublings = u32::try_from(attempts - 2).unwrap_or(u32::MAX).min(10);
    let delay = Duration::from_millis(50 << doublings).min(MAX_RECONNECT_DELAY);
    delay.mul_f64(rand::rng().random_range(0.5..1.0))
}

fn mend(kind: ConnectErrorKind) -> &'static str {
    match kind {
        ConnectErrorKind::ServerParse => "the address is not nats://host:port",
        ConnectErrorKind::Dns => "the host name is not known, check the address",
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            "the server does not accept these credentials"
        }
        ConnectErrorKind::Tls => "TLS failed, check the certificates and the tls:// scheme",
        ConnectErrorKind::TimedOut | ConnectErrorKind::Io | ConnectErrorKind::MaxReconnects => {
            "start it with JetStream (nats-server -js), or give the address of one that runs"
        }
    }
}

/// A server's version: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Reads `2.10.27`, `2.12.0-RC.1`; a pre-release counts as its release.
    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let core = text.split(['-', '+']).next()?;
        let mut parts = core.split('.').map(str::parse);
        let version = Self(
            parts.next()?.ok()?,
            parts.next()?.ok()?,
            parts.next()?.ok()?,
        );
        parts.next().is_none().then_some(version)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_as_numbers() {
        for (text, enough) in [
            ("2.9.10", false),
            ("2.10.26", false),
            ("2.10.27", true),
            ("2.10.27-binary", true),
            ("2.12.0-RC.1", true),
            ("v2.15.1", true),
            ("10.0.0", true),
        ] {
            let version = Version::parse(text).unwrap();
            assert_eq!(version >= VERSION_FLOOR, enough, "{text}");
        }
        for text in ["", "2", "2.10", "2.x.1", "2.10.27.1"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn reconnecting_starts_at_once_and_never_waits_long() {
        assert_eq!(reconnect_delay(0), Duration::ZERO);
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        for attempts in [2, 3, 10, 1_000_000, usize::MAX] {
            let delay = reconnect_delay(attempts);
            assert!(delay >= Duration::from_millis(25), "{attempts}: {delay:?}");
            assert!(delay <= MAX_RECONNECT_DELAY, "{attempts}: {delay:?}");
        }
    }
}
