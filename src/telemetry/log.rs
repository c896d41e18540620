//! The log: structured, on standard output where a service runs and on standard error where a command does.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::config::LogFormat;

/// What is logged where `RUST_LOG` says nothing: the server's own remarks at every start are of no use to an operator.
const DEFAULT: &str = "info,actix_server=warn";

/// Starts logging; `filter` is `RUST_LOG`, by default `info`. A second call does nothing.
pub fn init(format: LogFormat, filter: Option<&str>, to_stderr: bool) {
    let filter = EnvFilter::try_new(filter.unwrap_or(DEFAULT)).unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let writer = if to_stderr { BoxMakeWriter::new(std::io::stderr) } else { BoxMakeWriter::new(std::io::stdout) };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // It fails only where a log was started before: in tests, which share a process.
    let _ = match format {
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Text => log.with_target(false).with_ansi(std::io::stdout().is_terminal()).try_init(),
    };
}
