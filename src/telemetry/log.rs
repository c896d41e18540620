//! The log: structured, on standard output where a service runs and on standard error where a command does.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::config::LogFormat;

/// Starts logging; `filter` is `RUST_LOG`, by default `info`. A second call does nothing.
pub fn init(format: LogFormat, filter: Option<&str>, to_stderr: bool) {
    let filter = EnvFilter::try_new(filter.unwrap_or("info")).unwrap_or_else(|_| EnvFilter::new("info"));
    let writer = if to_stderr { BoxMakeWriter::new(std::io::stderr) } else { BoxMakeWriter::new(std::io::stdout) };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // It fails only where a log was started before: in tests, which share a process.
    let _ = match format {
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Text => log.with_target(false).try_init(),
    };
}
