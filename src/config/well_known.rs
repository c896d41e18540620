//! The variables that many platforms set by themselves: they stand above the file and below `CACHE_ASIDE__…`.

use super::tree::Node;
use super::{ConfigError, Env};

/// Variables that stand for one value each; of two for the same value the later one holds.
const VARIABLES: [(&str, [&str; 2]); 5] = [
    ("DATABASE_URL", ["database", "url"]),
    ("REDIS_URL", ["cache", "url"]),
    ("CACHE_URL", ["cache", "url"]),
    ("CACHE_TTL", ["defaults", "ttl"]),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", ["telemetry", "otlp_endpoint"]),
];

/// Lays the well-known variables over `root`.
pub(super) fn overlay(root: &mut Node, env: &Env) -> Result<(), ConfigError> {
    for (name, path) in VARIABLES {
        let Some((mut text, variable)) = env.read(name)? else { continue };
        if name == "CACHE_TTL" && !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            text.push('s');
        }
        root.set(&path, Node::scalar(&variable, text));
    }
    Ok(())
}

/// What traces call this service: OpenTelemetry's own variable, and no key of the file.
pub(super) fn service_name(env: &Env) -> Result<Option<String>, ConfigError> {
    Ok(env.read("OTEL_SERVICE_NAME")?.map(|(name, _)| name))
}
