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
    let with_notes = wanted.contains("opentelemetry");
    let filter = filter.and(filter_fn(move |event| {
        with_notes || !is_exporters_note(event)
    }));
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

/// The exporters note at `info` what they were told to do; only their warnings say something new.
fn is_exporters_note(event: &Metadata<'_>) -> bool {
    event.target().starts_with("opentelemetry") && *event.level() > Level::WARN
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
    fn the_filter_holds_by_target_and_exporters_notes_need_asking() {
        let events = || {
            tracing::info!(target: "a_part", "part info");
            tracing::debug!(target: "b_part", "part debug");
            tracing::info!(target: "opentelemetry_sdk", "a note");
            tracing::warn!(target: "opentelemetry_sdk", "a warning");
        };
        let cases = [
            ("info", vec!["part info", "a warning"]),
            ("warn,b_part=debug", vec!["part debug", "a warning"]),
            ("error,opentelemetry=info", vec!["a note", "a warning"]),
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
