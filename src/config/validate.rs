//! What no single field can judge: names, ranges, and values that must fit each other.

use std::collections::{HashMap, HashSet};

use super::error::Origin;
use super::{Config, ConfigError, Consistency, Defaults, GenerateKey, InvalidationMode, Resource, SecretUrl};

type Fault = (String, String);

/// Finds the first thing that is wrong. `from_file`: without a file the resources come from the database.
pub(super) fn check(
    config: &Config,
    origins: &HashMap<String, Origin>,
    name: &str,
    from_file: bool,
) -> Result<(), ConfigError> {
    let Err((path, message)) = judge(config, from_file) else { return Ok(()) };
    let mut known = path.as_str();
    let origin = loop {
        match (origins.get(known), known.rfind(['.', '['])) {
            (Some(origin), _) => break origin.clone(),
            (None, Some(at)) => known = &known[..at],
            (None, None) => return Err(ConfigError::new(format!("{name}: {path}: {message}"))),
        }
    };
    Err(origin.error(name, &path, &message))
}

fn fault(path: impl Into<String>, message: impl Into<String>) -> Result<(), Fault> {
    Err((path.into(), message.into()))
}

fn judge(config: &Config, from_file: bool) -> Result<(), Fault> {
    database(&config.database.url)?;
    cache(&config.cache.url)?;
    for (path, number) in [
        ("server.max_batch", config.server.max_batch),
        ("server.max_body", config.server.max_body),
        ("database.pool_size", config.database.pool_size as usize),
        ("cache.max_entry", config.cache.max_entry),
        ("cache.local.max_bytes", config.cache.local.max_bytes),
    ] {
        if number == 0 {
            return fault(path, "must be at least 1");
        }
    }
    for (path, duration) in [
        ("server.request_timeout", config.server.request_timeout),
        ("database.statement_timeout", config.database.statement_timeout),
        ("cache.timeout", config.cache.timeout),
        ("invalidation.max_staleness", config.invalidation.max_staleness),
    ] {
        if duration.is_zero() {
            return fault(path, "must be longer than 0s");
        }
    }
    for (path, ratio) in [
        ("telemetry.sample_ratio", config.telemetry.sample_ratio),
        ("telemetry.audit_ratio", config.telemetry.audit_ratio),
    ] {
        if !(0.0..=1.0).contains(&ratio) {
            return fault(path, "must be between 0 and 1");
        }
    }
    lives("defaults", &config.defaults, config)?;
    if from_file && config.resources.is_empty() && config.queries.is_empty() {
        return fault("resources", "nothing is served; declare at least one resource or query");
    }
    for (resource, declared) in &config.resources {
        let path = format!("resources.{resource}");
        named(&path, resource)?;
        lives(&path, &declared.over(&config.defaults), config)?;
        self::resource(&path, declared)?;
    }
    for (query, declared) in &config.queries {
        let path = format!("queries.{query}");
        named(&path, query)?;
        lives(&path, &declared.over(&config.defaults), config)?;
        if declared.sql.trim().is_empty() {
            return fault(format!("{path}.sql"), "is missing");
        }
    }
    let mut names = HashSet::new();
    for (index, token) in config.access.tokens.iter().enumerate() {
        if !names.insert(&token.name) {
            return fault(format!("access.tokens[{index}].name"), format!("{:?} stands twice", token.name));
        }
    }
    Ok(())
}

fn database(url: &SecretUrl) -> Result<(), Fault> {
    match url.scheme() {
        "postgres" | "postgresql" | "sqlite" => Ok(()),
        _ if url.is_empty() => fault("database.url", "is missing; set it in the file or DATABASE_URL"),
        scheme @ ("mysql" | "mariadb") => fault("database.url", format!("{scheme}: is not built yet")),
        scheme => fault("database.url", format!("the scheme {scheme:?} is not known; use postgres:// or sqlite:")),
    }
}

fn cache(url: &SecretUrl) -> Result<(), Fault> {
    match url.scheme() {
        "redis" | "rediss" | "valkey" | "valkeys" | "memory" => Ok(()),
        scheme @ ("memcached" | "redis+cluster" | "redis+sentinel") => {
            fault("cache.url", format!("{scheme}: is not built yet"))
        }
        scheme => fault(
            "cache.url",
            format!("the scheme {scheme:?} is not known; use redis://, rediss://, valkey:// or memory:"),
        ),
    }
}

fn named(path: &str, name: &str) -> Result<(), Fault> {
    let well_formed = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|letter| matches!(letter, 'a'..='z' | '0'..='9' | '_'));
    if !well_formed {
        return fault(path, "a name starts with a lower-case letter and goes on with those, digits and _");
    }
    if matches!(name, "query" | "queries") {
        return fault(path, "this name is taken by the API; choose another and say table: or sql:");
    }
    Ok(())
}

fn lives(path: &str, values: &Defaults, config: &Config) -> Result<(), Fault> {
    if values.ttl.is_zero() {
        return fault(format!("{path}.ttl"), "must be longer than 0s");
    }
    if !(0.0..=1.0).contains(&values.ttl_jitter) {
        return fault(format!("{path}.ttl_jitter"), "must be between 0 and 1");
    }
    if !values.refresh_ahead.is_finite() || values.refresh_ahead < 0.0 {
        return fault(format!("{path}.refresh_ahead"), "must be 0 or more");
    }
    if !values.local_ttl.is_zero() && config.invalidation.mode == InvalidationMode::None {
        return fault(format!("{path}.local_ttl"), "needs invalidation.mode outbox or wal");
    }
    Ok(())
}

fn resource(path: &str, declared: &Resource) -> Result<(), Fault> {
    let twice = |names: &[String]| {
        let mut seen = HashSet::new();
        names.iter().find(|name| !seen.insert(name.as_str())).cloned()
    };
    if let Some(column) = twice(&declared.key) {
        return fault(format!("{path}.key"), format!("{column:?} stands twice"));
    }
    if let Some(columns) = &declared.columns {
        if columns.is_empty() {
            return fault(format!("{path}.columns"), "shows nothing; leave it out for all columns");
        }
        if let Some(column) = twice(columns) {
            return fault(format!("{path}.columns"), format!("{column:?} stands twice"));
        }
        if let Some(column) = declared.key.iter().find(|column| !columns.contains(column)) {
            return fault(format!("{path}.columns"), format!("lacks the key column {column:?}"));
        }
    }
    let kinds: Vec<String> = declared.write.iter().map(|kind| format!("{kind:?}").to_lowercase()).collect();
    if let Some(kind) = twice(&kinds) {
        return fault(format!("{path}.write"), format!("{kind:?} stands twice"));
    }
    if declared.generate_key != GenerateKey::Database && declared.key.len() > 1 {
        return fault(format!("{path}.generate_key"), "needs a key of one column");
    }
    if declared.consistency == Consistency::Hold {
        return fault(format!("{path}.consistency"), "hold is not built yet; use fenced");
    }
    for (column, list) in &declared.lists {
        if list.limit == 0 {
            return fault(format!("{path}.lists.{column}.limit"), "must be at least 1");
        }
        if list.ttl.is_some_and(|ttl| ttl.is_zero()) {
            return fault(format!("{path}.lists.{column}.ttl"), "must be longer than 0s");
        }
    }
    Ok(())
}

impl Config {
    /// What this configuration asks for and this version does not do yet: one sentence each.
    #[must_use]
    pub fn not_built_yet(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.invalidation.mode != InvalidationMode::None {
            missing.push(format!(
                "invalidation.mode {}: is not built yet; changes of other writers are seen when the TTL ends",
                format!("{:?}", self.invalidation.mode).to_lowercase()
            ));
        }
        let local = |values: Defaults| !values.local_ttl.is_zero();
        if local(self.defaults.clone()) || self.resources.values().any(|one| local(one.over(&self.defaults))) {
            missing.push("local_ttl: the in-process tier is not built yet".into());
        }
        for (set, what) in [
            (!self.database.replica_url.is_empty(), "database.replica_url: fills read the primary"),
            (!self.telemetry.otlp_endpoint.is_empty(), "telemetry.otlp_endpoint: traces are not built yet"),
            (self.telemetry.audit_ratio > 0.0, "telemetry.audit_ratio: the auditor is not built yet"),
            (!self.queries.is_empty(), "queries: are not served yet"),
            (self.access.adhoc_queries != super::AccessLevel::Off, "access.adhoc_queries: are not served yet"),
            (
                self.resources.values().any(|one| !one.depends_on.is_empty()),
                "depends_on: is not built yet; a view's rows live until their TTL ends",
            ),
        ] {
            if set {
                missing.push(what.into());
            }
        }
        missing
    }
}
