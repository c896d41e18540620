//! URLs made of `DB_HOST`, `DB_USER`… and `CACHE_HOST`…, where nothing else gave one.

use super::tree::{Node, Value};
use super::{ConfigError, Env};

/// Fills in the URLs that are still missing once everything else was read.
pub(super) fn compose(root: &mut Node, env: &Env) -> Result<(), ConfigError> {
    // Read only where they are wanted: parts that nobody uses can't be wrong.
    if !given(root, "database")
        && let Some(url) = database(env)?
    {
        root.set(&["database", "url"], url);
    }
    if !given(root, "cache")
        && let Some(url) = cache(env)?
    {
        root.set(&["cache", "url"], url);
    }
    Ok(())
}

fn given(root: &Node, section: &str) -> bool {
    root.get(&[section, "url"]).is_some_and(|url| match &url.value {
        Value::Null => false,
        Value::Scalar(url) => !url.is_empty(),
        Value::List(_) | Value::Map(_) => true,
    })
}

fn database(env: &Env) -> Result<Option<Node>, ConfigError> {
    let (host, name) = (env.read("DB_HOST")?, env.read("DB_NAME")?);
    // The variable to look at, should the URL turn out to be wrong.
    let Some((_, origin)) = host.as_ref().or(name.as_ref()) else { return Ok(None) };
    let engine = env.read("DB_ENGINE")?;
    let origin = engine.as_ref().map_or(origin, |(_, variable)| variable).clone();
    let origin = origin.as_str();
    let (scheme, default_port, default_user) = match engine.as_ref().map_or("postgres", |(engine, _)| engine.as_str()) {
        "postgres" | "postgresql" => ("postgres", "5432", "postgres"),
        engine @ ("mysql" | "mariadb") => (engine, "3306", "root"),
        "sqlite" => {
            let file = name.map_or_else(|| ":memory:".into(), |(name, _)| name);
            return Ok(Some(Node::scalar(origin, format!("sqlite:{file}"))));
        }
        other => {
            let message = format!("{origin}: {other:?} is not known; use postgres, mysql, mariadb or sqlite");
            return Err(ConfigError::new(message));
        }
    };
    let text = |name: &str| env.read(name).map(|read| read.map(|(text, _)| text));
    let user = encode(&text("DB_USER")?.unwrap_or_else(|| default_user.into()));
    let password = text("DB_PASSWORD")?.map(|password| format!(":{}", encode(&password))).unwrap_or_default();
    let host = authority(host.map(|(host, _)| host));
    let port = port(env, "DB_PORT", default_port)?;
    // Without a name the database of the user's own name is meant, as everywhere else.
    let name = name.map(|(name, _)| format!("/{}", encode(&name))).unwrap_or_default();
    Ok(Some(Node::scalar(origin, format!("{scheme}://{user}{password}@{host}:{port}{name}"))))
}

fn cache(env: &Env) -> Result<Option<Node>, ConfigError> {
    let (host, engine) = (env.read("CACHE_HOST")?, env.read("CACHE_ENGINE")?);
    let Some((_, origin)) = engine.as_ref().or(host.as_ref()) else { return Ok(None) };
    let (scheme, default_port) = match engine.as_ref().map_or("redis", |(engine, _)| engine.as_str()) {
        "memory" => return Ok(Some(Node::scalar(origin, "memory:"))),
        scheme @ ("redis" | "valkey") => (scheme, "6379"),
        "memcached" => ("memcached", "11211"),
        other => {
            let message = format!("{origin}: {other:?} is not known; use redis, valkey, memcached or memory");
            return Err(ConfigError::new(message));
        }
    };
    let host = authority(host.as_ref().map(|(host, _)| host.clone()));
    let port = port(env, "CACHE_PORT", default_port)?;
    Ok(Some(Node::scalar(origin, format!("{scheme}://{host}:{port}"))))
}

/// Kubernetes sets `DB_PORT=tcp://…` for a Service called `db`: that is not meant.
fn port(env: &Env, name: &str, default: &str) -> Result<String, ConfigError> {
    match env.read(name)? {
        Some((port, variable)) if !port.starts_with("tcp://") => match port.parse::<u16>() {
            Ok(port) => Ok(port.to_string()),
            Err(_) => Err(ConfigError::new(format!("{variable}: {port:?} is no port; write a number up to 65535"))),
        },
        _ => Ok(default.to_owned()),
    }
}

/// A host as it stands in a URL: IPv6 addresses in brackets, directories of Unix sockets percent-encoded.
fn authority(host: Option<String>) -> String {
    match host {
        None => "localhost".into(),
        Some(host) if host.parse::<std::net::Ipv6Addr>().is_ok() => format!("[{host}]"),
        Some(host) if host.starts_with('/') => encode(&host),
        Some(host) => host,
    }
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase();
            out.extend(['%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}
