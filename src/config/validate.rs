//! What no single field can judge: names, ranges, and values that must fit each other.

use std::collections::HashSet;

use super::error;
use super::{
    Cache, Config, ConfigError, Consistency, Database, Defaults, GenerateKey, InvalidationMode, Query, Resource,
};
use super::{SecretUrl, Server};
#[cfg(feature = "config")]
use super::{error::Origin, tree::Node};

/// What is wrong: the path of the value, and words.
type Fault = (Vec<String>, String);

impl Cache {
    /// Judges the section alone.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key of the first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        cache(self).map_err(|(path, message)| error::fault(&path, &message))
    }
}

impl Config {
    /// Judges a configuration that was made in code: ranges, names, and values that must fit each other. Those that were
    /// loaded are judged already.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key of the first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.database.url.is_empty() {
            return Err(error::fault(&["database".to_owned(), "url".to_owned()], "is missing"));
        }
        judge(self).map_err(|(path, message)| error::fault(&path, &message))
    }
}

/// Finds the first thing that is wrong. `from_file`: without a file the resources come from the database.
#[cfg(feature = "config")]
pub(super) fn check(config: &Config, root: &Node, name: &str, from_file: bool) -> Result<(), ConfigError> {
    // Said without a line, since there is none, and with the key in the sentence.
    if config.database.url.is_empty() {
        let message = "database.url is missing: set it in the file or DATABASE_URL";
        let path = ["database".to_owned(), "url".to_owned()];
        let origin = if root.get(&path).is_some() { root.origin_of(&path) } else { &Origin::Absent };
        return Err(origin.error(name, &[], message));
    }
    if from_file && config.resources.is_empty() && config.queries.is_empty() {
        let message = "nothing is served: declare at least one resource or query";
        return Err(Origin::Absent.error(name, &[], message));
    }
    judge(config).map_err(|(path, message)| root.origin_of(&path).error(name, &path, &message))
}

fn fault(path: &[&str], message: impl Into<String>) -> Result<(), Fault> {
    Err((path.iter().map(|step| (*step).to_owned()).collect(), message.into()))
}

fn judge(config: &Config) -> Result<(), Fault> {
    server(&config.server)?;
    database(&config.database)?;
    cache(&config.cache)?;
    // What proves that a replica follows this primary is installed with the capture.
    if config.database.replica_url.is_some() && config.invalidation.mode == InvalidationMode::None {
        return fault(&["database", "replica_url"], "needs invalidation.mode outbox or wal");
    }
    if config.invalidation.max_staleness.is_zero() {
        return fault(&["invalidation", "max_staleness"], "must be longer than 0s");
    }
    if config.invalidation.mode == InvalidationMode::Wal && matches!(config.database.url.scheme(), "mysql" | "mariadb")
    {
        let message =
            "wal reads the log of PostgreSQL; with MySQL and MariaDB use outbox, whose triggers migrate installs";
        return fault(&["invalidation", "mode"], message);
    }
    for (key, ratio) in [("sample_ratio", config.telemetry.sample_ratio), ("audit_ratio", config.telemetry.audit_ratio)]
    {
        if !(0.0..=1.0).contains(&ratio) {
            return fault(&["telemetry", key], "must be between 0 and 1");
        }
    }
    lives(&["defaults"], &config.defaults, config)?;
    for (name, declared) in &config.resources {
        named(&["resources", name], name)?;
        let values = declared.over(&config.defaults);
        lives(&["resources", name], &values, config)?;
        for (key, time) in [("local_ttl", values.local_ttl), ("local_hot_ttl", values.local_hot_ttl)] {
            if declared.consistency == Consistency::Hold && !time.is_zero() {
                let message = format!("hold can't be kept in process: set {key}: 0s");
                return fault(&["resources", name, "consistency"], message);
            }
        }
        if let (true, Some(words)) = (declared.filter, unfiltered(declared, &values, config)) {
            return fault(&["resources", name, "filter"], words);
        }
        resource(name, declared)?;
    }
    for (name, declared) in &config.queries {
        named(&["queries", name], name)?;
        lives(&["queries", name], &declared.over(&config.defaults), config)?;
        query(name, declared)?;
    }
    let mut names = HashSet::new();
    for (index, token) in config.access.tokens.iter().enumerate() {
        let path = ["access", "tokens", &format!("[{index}]"), "name"];
        if token.name.is_empty() {
            return fault(&path, "is empty; say who has the token");
        }
        if !names.insert(&token.name) {
            return fault(&path, format!("{:?} stands twice", token.name));
        }
    }
    Ok(())
}

/// Why a filter could not be kept right.
fn unfiltered(declared: &Resource, values: &Defaults, config: &Config) -> Option<&'static str> {
    match config.cache.url.scheme() {
        "redis" | "rediss" | "valkey" | "valkeys" | "redis+sentinel" => {}
        "redis+cluster" | "rediss+cluster" => {
            return Some("can't be used with a cluster: no node tells of all changes");
        }
        _ => return Some("needs redis:// or valkey://, whose stream of changes keeps it right"),
    }
    if config.invalidation.mode == InvalidationMode::None {
        return Some("needs invalidation.mode outbox or wal");
    }
    if config.database.url.scheme() == "sqlite" {
        return Some("can't be used with SQLite, which tells nobody of changes");
    }
    if declared.consistency == Consistency::Hold {
        return Some("can't be used with consistency: hold, whose rows are not kept in process");
    }
    if !declared.depends_on.is_empty() {
        return Some("can't be used with depends_on: a change of other tables does not name the rows");
    }
    if values.negative_ttl.is_zero() {
        return Some("needs a negative_ttl: with 0s \"not found\" is not to be remembered");
    }
    None
}

fn server(server: &Server) -> Result<(), Fault> {
    for (key, number) in
        [("max_batch", server.max_batch), ("max_body", server.max_body), ("max_connections", server.max_connections)]
    {
        if number == 0 {
            return fault(&["server", key], "must be at least 1");
        }
    }
    if server.request_timeout.is_zero() {
        return fault(&["server", "request_timeout"], "must be longer than 0s");
    }
    // Port 0 is any free one, so two of them differ.
    if server.management_listen == Some(server.listen) && server.listen.port() != 0 {
        let message = "is the same as server.listen; leave it out to have all on one port";
        return fault(&["server", "management_listen"], message);
    }
    for (index, origin) in server.cors_origins.iter().enumerate() {
        let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
        if origin != "*" && !host.is_some_and(|host| !host.is_empty() && !host.contains('/')) {
            let message = format!("{origin:?} is no origin; write it like https://shop.example, or * for all");
            return fault(&["server", "cors_origins", &format!("[{index}]")], message);
        }
    }
    Ok(())
}

fn database(database: &Database) -> Result<(), Fault> {
    let check = |key: &str, url: &SecretUrl| match url.scheme() {
        "postgres" | "postgresql" | "mysql" | "mariadb" | "sqlite" => Ok(()),
        scheme => fault(&["database", key], unknown_scheme(scheme, "postgres://, mysql://, mariadb:// or sqlite:")),
    };
    check("url", &database.url)?;
    if let Some(replica) = &database.replica_url {
        let postgres = |url: &SecretUrl| matches!(url.scheme(), "postgres" | "postgresql");
        if !postgres(replica) || !postgres(&database.url) {
            return fault(&["database", "replica_url"], "is for PostgreSQL alone: both URLs begin with postgres://");
        }
    }
    if database.pool_size == 0 {
        return fault(&["database", "pool_size"], "must be at least 1");
    }
    if database.statement_timeout.is_zero() {
        return fault(&["database", "statement_timeout"], "must be longer than 0s");
    }
    Ok(())
}

fn cache(cache: &Cache) -> Result<(), Fault> {
    match cache.url.scheme() {
        "redis" | "rediss" | "valkey" | "valkeys" | "redis+sentinel" | "memory" => {}
        "redis+cluster" | "rediss+cluster" => {
            if cache.key_prefix.contains(['{', '}']) {
                let message = "braces decide which node of a cluster holds a key: leave them out";
                return fault(&["cache", "key_prefix"], message);
            }
        }
        "memcached" => memcached(cache)?,
        _ if cache.url.is_empty() => {
            return fault(&["cache", "url"], "is empty; set it, or leave it out for memory:");
        }
        scheme => {
            let known = "redis://, rediss://, valkey://, valkeys://, redis+sentinel://, redis+cluster://, rediss+cluster://, memcached:// or memory:";
            return fault(&["cache", "url"], unknown_scheme(scheme, known));
        }
    }
    if cache.timeout.is_zero() {
        return fault(&["cache", "timeout"], "must be longer than 0s");
    }
    if cache.max_entry == 0 {
        return fault(&["cache", "max_entry"], "must be at least 1");
    }
    if cache.local.filter_max_bytes == 0 {
        return fault(&["cache", "local", "filter_max_bytes"], "must be at least 1");
    }
    if cache.local.max_bytes == 0 {
        return fault(&["cache", "local", "max_bytes"], "must be at least 1");
    }
    let notes = matches!(cache.url.scheme(), "redis" | "rediss" | "valkey" | "valkeys" | "redis+sentinel");
    if cache.local.warm_start && !notes {
        let message = "needs redis:// or valkey:// and no cluster: there replicas note what is hot";
        return fault(&["cache", "local", "warm_start"], message);
    }
    Ok(())
}

/// Memcached knows no password and no spaces in keys, and this service one of them at a time.
fn memcached(cache: &Cache) -> Result<(), Fault> {
    let url = cache.url.expose();
    let rest = url.strip_prefix("memcached://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    let problem = match rest {
        None | Some("") => "names no host; write it like memcached://cache:11211",
        Some(rest) if rest.contains('@') => "has credentials: memcached with a password is not built yet",
        Some(rest) if rest.contains(',') => "names several hosts: one memcached is all that is built yet",
        Some(rest) if rest.contains(['/', '?', '#']) => {
            "has more than a host and a port; write it like memcached://cache:11211"
        }
        Some(_) => "",
    };
    if !problem.is_empty() {
        return fault(&["cache", "url"], problem);
    }
    if cache.ca_file.is_some() {
        return fault(&["cache", "ca_file"], "memcached over TLS is not built yet; leave it out");
    }
    if cache.key_prefix.len() > 100 || !cache.key_prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
        return fault(&["cache", "key_prefix"], "must be at most 100 visible ASCII characters for memcached");
    }
    Ok(())
}

fn unknown_scheme(scheme: &str, known: &str) -> String {
    if scheme.is_empty() {
        return format!("this is no URL; write it with {known}");
    }
    format!("the scheme {scheme:?} is not known; use {known}")
}

fn named(path: &[&str], name: &str) -> Result<(), Fault> {
    let well_formed = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|letter| matches!(letter, 'a'..='z' | '0'..='9' | '_'));
    if !well_formed {
        return fault(path, "a name starts with a lower-case letter and goes on with those, digits and _");
    }
    if matches!(name, "query" | "queries") && path.first() == Some(&"resources") {
        return fault(path, "this name is taken by the API; choose another and say table:");
    }
    Ok(())
}

fn lives(path: &[&str], values: &Defaults, config: &Config) -> Result<(), Fault> {
    let fault = |key, message| fault(&[path, &[key]].concat(), message);
    if values.ttl.is_zero() {
        return fault("ttl", "must be longer than 0s");
    }
    if !(0.0..=1.0).contains(&values.ttl_jitter) {
        return fault("ttl_jitter", "must be between 0 and 1");
    }
    if !values.refresh_ahead.is_finite() || values.refresh_ahead < 0.0 {
        return fault("refresh_ahead", "must be 0 or more");
    }
    for (key, time) in [("local_ttl", values.local_ttl), ("local_hot_ttl", values.local_hot_ttl)] {
        if !time.is_zero() && config.cache.url.scheme() == "memcached" {
            return fault(
                key,
                "can't be used with memcached, which has no stream of changes; leave it out or use redis://",
            );
        }
        if !time.is_zero() && config.invalidation.mode == InvalidationMode::None {
            return fault(key, "needs invalidation.mode outbox or wal");
        }
    }
    Ok(())
}

fn twice<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> Option<String> {
    let mut seen = HashSet::new();
    names.into_iter().map(|name| name.as_ref().to_owned()).find(|name| !seen.insert(name.clone()))
}

fn resource(name: &str, declared: &Resource) -> Result<(), Fault> {
    let fault = |steps: &[&str], message: String| fault(&[&["resources", name], steps].concat(), message);
    if let Some(column) = twice(&declared.key) {
        return fault(&["key"], format!("{column:?} stands twice"));
    }
    if let Some(columns) = &declared.columns {
        if columns.is_empty() {
            return fault(&["columns"], "shows nothing; leave it out for all columns".into());
        }
        if let Some(column) = twice(columns) {
            return fault(&["columns"], format!("{column:?} stands twice"));
        }
        if let Some(column) = declared.key.iter().find(|column| !columns.contains(column)) {
            return fault(&["columns"], format!("lacks the key column {column:?}"));
        }
    }
    let kinds = declared.write.iter().map(|kind| format!("{kind:?}").to_lowercase());
    if let Some(kind) = twice(kinds) {
        return fault(&["write"], format!("{kind:?} stands twice"));
    }
    if declared.generate_key != GenerateKey::Database && declared.key.len() > 1 {
        return fault(&["generate_key"], "needs a key of one column".into());
    }
    for (column, list) in &declared.lists {
        if list.limit == 0 {
            return fault(&["lists", column, "limit"], "must be at least 1".into());
        }
        if list.ttl.is_some_and(|ttl| ttl.is_zero()) {
            return fault(&["lists", column, "ttl"], "must be longer than 0s".into());
        }
    }
    Ok(())
}

fn query(name: &str, declared: &Query) -> Result<(), Fault> {
    if declared.sql.trim().is_empty() {
        return fault(&["queries", name, "sql"], "is missing; write the statement");
    }
    if let Some(parameter) = twice(declared.params.iter().map(|parameter| &parameter.name)) {
        return fault(&["queries", name, "params"], format!("{parameter:?} stands twice"));
    }
    Ok(())
}
