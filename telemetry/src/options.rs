//! What an operator may choose about telemetry. The caller reads it from its configuration.

use std::net::SocketAddr;
#[cfg(debug_assertions)]
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The `telemetry` part of a daemon's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryOptions {
    pub log_format: LogFormat,
    /// `info`, or directives by target such as `info,remuda_worker=debug`.
    pub log_filter: String,
    /// Where traces and metrics are sent over OTLP gRPC, such as `http://127.0.0.1:4317`.
    /// Without it nothing is sent and spans cost nothing but their log fields.
    pub otlp_endpoint: Option<String>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served. Port 0 takes a free one.
    pub http_listen: Option<SocketAddr>,
    /// For tests, in debug builds alone: the file that this process's history is appended to.
    #[cfg(debug_assertions)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<PathBuf>,
    /// For tests, with the feature of this name alone: see `docs/faults.md`.
    #[cfg(feature = "failpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failpoints: Option<String>,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self {
            log_format: LogFormat::default(),
            log_filter: "info".to_owned(),
            otlp_endpoint: None,
            http_listen: None,
            #[cfg(debug_assertions)]
            history: None,
            #[cfg(feature = "failpoints")]
            failpoints: None,
        }
    }
}

/// How log lines look. They go to standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::{LogFormat, TelemetryOptions};

    #[test]
    fn what_is_left_out_is_the_default() {
        let options: TelemetryOptions =
            serde_json::from_str(r#"{"log_format": "json", "http_listen": "127.0.0.1:0"}"#)
                .unwrap();
        let expected = TelemetryOptions {
            log_format: LogFormat::Json,
            http_listen: Some("127.0.0.1:0".parse().unwrap()),
            ..TelemetryOptions::default()
        };
        assert_eq!(options, expected);
        assert_eq!(options.log_filter, "info");
    }

    #[test]
    fn a_misspelt_option_is_named() {
        let error = serde_json::from_str::<TelemetryOptions>(r#"{"log_fromat": "json"}"#)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`log_fromat`") && error.contains("`log_format`"),
            "{error}"
        );
    }
}
