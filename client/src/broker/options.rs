//! How to reach nats-server, and under what name.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach nats-server, and under what name.
#[derive(Debug, Clone)]
pub struct BrokerOptions {
    /// `nats://host:port` or `tls://host:port`; several with commas between.
    pub url: String,
    /// First token of every subject of the fleet.
    pub prefix: String,
    /// What the server shows for this connection.
    pub name: String,
    pub credentials: Credentials,
    /// Certificates, PEM, to trust beside the system's.
    pub tls_ca: Option<PathBuf>,
    /// Where replies are sent. Must begin with `_INBOX`; one of one's own keeps
    /// replies from other users of the same account.
    pub inbox_prefix: String,
    pub connect_timeout: Duration,
}

impl Default for BrokerOptions {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".to_owned(),
            prefix: "remuda".to_owned(),
            name: "remuda".to_owned(),
            credentials: Credentials::None,
            tls_ca: None,
            inbox_prefix: "_INBOX".to_owned(),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl BrokerOptions {
    /// The addresses without names and passwords: for logs and errors.
    pub fn display_url(&self) -> String {
        let shown: Vec<String> = self.url.split(',').map(without_user).collect();
        shown.join(",")
    }
}

fn without_user(url: &str) -> String {
    let url = url.trim();
    let (scheme, rest) = url.split_once("://").unwrap_or(("nats", url));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{scheme}://{host}")
}

/// Who we are for the server.
#[derive(Clone, Default)]
pub enum Credentials {
    #[default]
    None,
    Token(String),
    UserPassword {
        user: String,
        password: String,
    },
    /// A `.creds` file: JWT and key.
    File(PathBuf),
    /// An NKEY's seed.
    Nkey(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Token(_) => f.write_str("Token(..)"),
            Self::UserPassword { user, .. } => write!(f, "UserPassword({user}, ..)"),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Nkey(_) => f.write_str("Nkey(..)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown() {
        let options = BrokerOptions {
            url: "nats://joe:s3cret@a:4222, tls://b:4223,c".to_owned(),
            credentials: Credentials::UserPassword {
                user: "joe".to_owned(),
                password: "s3cret".to_owned(),
            },
            ..BrokerOptions::default()
        };
        assert_eq!(options.display_url(), "nats://a:4222,tls://b:4223,nats://c");
        assert!(!format!("{:?}", options.credentials).contains("s3cret"));
    }
}
