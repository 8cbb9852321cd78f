//! The log of a process: which lines there are and how they look.

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use crate::init::TelemetryError;
use crate::options::{LogFormat, TelemetryOptions};

pub(crate) fn layer<S, W>(
    options: &TelemetryOptions,
    writer: W,
    colours: bool,
) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let wanted = &options.log_filter;
    let filter = EnvFilter::try_new(wanted).map_err(|source| TelemetryError::LogFilter {
        filter: wanted.clone(),
        source,
    })?;
    let unasked: Vec<&str> = NOTES
        .into_iter()
        .filter(|part| !wanted.contains(part))
        .collect();
    let filter = filter.and(filter_fn(move |event| !is_note(event, &unasked)));
    // Its own errors would be printed to standard error, and when that is what is gone, panic.
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .log_internal_errors(false);
    Ok(match options.log_format {
        LogFormat::Human => lines.with_ansi(colours).with_filter(filter).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(true)
            .with_filter(filter)
            .boxed(),
    })
}

/// Libraries that say more at `info` than anybody wants to read: exporters note what they were
/// told to do, and the NATS client each of its attempts to reconnect.
const NOTES: [&str; 2] = ["opentelemetry", "async_nats"];

/// Only warnings of such a library say something new.
fn is_note(event: &Metadata<'_>, libraries: &[&str]) -> bool {
    *event.level() > Level::WARN
        && libraries
            .iter()
            .any(|library| event.target().starts_with(library))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::layer;
    use crate::options::{LogFormat, TelemetryOptions};
    use tracing_subscriber::layer::SubscriberExt as _;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(log_format: LogFormat, log_filter: &str, body: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let options = TelemetryOptions {
            log_format,
            log_filter: log_filter.to_owned(),
            ..TelemetryOptions::default()
        };
        let writer = buffer.clone();
        let layer = layer(&options, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), body);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_is_one_object_a_line_with_the_fields_of_every_span() {
        let text = logged(LogFormat::Json, "info", || {
            let task = tracing::info_span!("json_task", tenant = "acme").entered();
            let step = tracing::info_span!("json_step", n = 2).entered();
            tracing::info!(exit = 1, "step ended\nbadly");
            drop((step, task));
            tracing::info!("after");
        });
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert_eq!(lines[0]["message"], "step ended\nbadly");
        assert_eq!(lines[0]["exit"], 1);
        assert_eq!(lines[0]["level"], "INFO");
        assert_eq!(lines[0]["spans"][0]["tenant"], "acme");
        assert_eq!(lines[0]["spans"][1]["n"], 2);
        assert!(lines[0]["timestamp"].is_string());
    }

    #[test]
    fn the_filter_holds_by_target_and_notes_of_libraries_need_asking() {
        let events = || {
            tracing::info!(target: "a_part", "part info");
            tracing::debug!(target: "b_part", "part debug");
            tracing::info!(target: "opentelemetry_sdk", "a note");
            tracing::warn!(target: "opentelemetry_sdk", "a warning");
            tracing::info!(target: "async_nats", "an attempt");
        };
        let cases = [
            ("info", vec!["part info", "a warning"]),
            ("warn,b_part=debug", vec!["part debug", "a warning"]),
            ("error,opentelemetry=info", vec!["a note", "a warning"]),
            (
                "info,async_nats=info",
                vec!["part info", "a warning", "an attempt"],
            ),
        ];
        for (filter, expected) in cases {
            let text = logged(LogFormat::Human, filter, events);
            let lines: Vec<&str> = text
                .lines()
                .filter_map(|line| line.rsplit(": ").next())
                .collect();
            assert_eq!(lines, expected, "{filter}");
        }
    }
}
