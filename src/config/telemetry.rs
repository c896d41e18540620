//! `telemetry:` logs and traces.

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units;

/// Logs and traces.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// The form of the log. Default `json`. What is logged is chosen with `RUST_LOG`.
    pub log: LogFormat,
    /// Where traces go, as OTLP over HTTP. Also `OTEL_EXPORTER_OTLP_ENDPOINT`. Default: nowhere.
    pub otlp_endpoint: String,
    /// The share of requests that are traced, 0 to 1. Default 0.1.
    #[serde(deserialize_with = "units::number")]
    pub sample_ratio: f64,
    /// The share of hits that are compared with the database, 0 to 1. Default 0.
    #[serde(deserialize_with = "units::number")]
    pub audit_ratio: f64,
    /// `OTEL_SERVICE_NAME`. Default `cache-aside`.
    #[serde(skip)]
    pub service_name: String,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            log: LogFormat::Json,
            otlp_endpoint: String::new(),
            sample_ratio: 0.1,
            audit_ratio: 0.0,
            service_name: "cache-aside".into(),
        }
    }
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}
