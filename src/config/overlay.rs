//! Lays the environment over the file: `${NAME}` inside values, the well-known variables, and `CACHE_ASIDE__SECTION__KEY`.

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::env::read_secret;
use super::error::Origin;
use super::tree::{Node, Value, parse_value};
use super::{ConfigError, Env};

const PREFIX: &str = "CACHE_ASIDE__";

/// Replaces `${NAME}` and `${NAME:-default}` in every value. `$${` stands for `${`.
pub(super) fn interpolate(node: &mut Node, name: &str, path: &str, env: &Env) -> Result<(), ConfigError> {
    let origin = &node.origin;
    match &mut node.value {
        Value::Null => Ok(()),
        Value::Scalar(text) => {
            if text.contains("${") {
                *text = expand(text, env).map_err(|message| origin.error(name, path, &message))?;
            }
            Ok(())
        }
        Value::List(items) => items
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, item)| interpolate(item, name, &format!("{path}[{index}]"), env)),
        Value::Map(entries) => entries.iter_mut().try_for_each(|(key, value)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            interpolate(value, name, &path, env)
        }),
    }
}

fn expand(text: &str, env: &Env) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out.push_str(&rest[..at - 1]);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let Some(end) = rest[at..].find('}') else {
            return Err("a ${ without its }; write $${ for the two characters".into());
        };
        let inside = &rest[at + 2..at + end];
        let (variable, default) = match inside.split_once(":-") {
            Some((variable, default)) => (variable, Some(default)),
            None => (inside, None),
        };
        match (env.get(variable), default) {
            (Some(value), None) => out.push_str(value),
            (Some(value), Some(_)) if !value.is_empty() => out.push_str(value),
            (_, Some(default)) => out.push_str(default),
            (None, None) => {
                return Err(format!("${{{variable}}} is not set; set it or write ${{{variable}:-default}}"));
            }
        }
        rest = &rest[at + end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// The well-known variables, which stand above the file.
pub(super) fn well_known(root: &mut Node, env: &Env) -> Result<(), ConfigError> {
    let mut set = |path: [&str; 2], variable: &str, text: String| {
        let origin = Origin::Variable(variable.to_owned());
        root.set(&path.map(str::to_owned), Node { origin, value: Value::Scalar(text) });
    };
    let cache_url = match env.read("CACHE_URL")? {
        Some(url) => Some(("CACHE_URL", url)),
        None => env.read("REDIS_URL")?.map(|url| ("REDIS_URL", url)),
    };
    if let Some((variable, url)) = cache_url {
        set(["cache", "url"], variable, url);
    }
    if let Some(url) = env.read("DATABASE_URL")? {
        set(["database", "url"], "DATABASE_URL", url);
    }
    if let Some(ttl) = env.read("CACHE_TTL")? {
        let bare = ttl.bytes().all(|byte| byte.is_ascii_digit());
        set(["defaults", "ttl"], "CACHE_TTL", if bare { format!("{ttl}s") } else { ttl });
    }
    if let Some(endpoint) = env.read("OTEL_EXPORTER_OTLP_ENDPOINT")? {
        set(["telemetry", "otlp_endpoint"], "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
    }
    Ok(())
}

/// URLs made of their parts, where nothing else gave one.
pub(super) fn compose(root: &mut Node, env: &Env) -> Result<(), ConfigError> {
    for (section, variable, url) in
        [("database", "DB_HOST", database_url(env)?), ("cache", "CACHE_HOST", cache_url(env)?)]
    {
        let given = root
            .get(&[section, "url"])
            .is_some_and(|url| !matches!(&url.value, Value::Null) && url.value != Value::Scalar(String::new()));
        if let (false, Some(url)) = (given, url) {
            let origin = Origin::Variable(variable.to_owned());
            root.set(&[section.to_owned(), "url".to_owned()], Node { origin, value: Value::Scalar(url) });
        }
    }
    Ok(())
}

/// Kubernetes sets `DB_PORT=tcp://…` for a Service called `db`: that is not meant.
fn port(env: &Env, name: &str) -> Result<Option<String>, ConfigError> {
    Ok(env.read(name)?.filter(|port| !port.starts_with("tcp://")))
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

fn database_url(env: &Env) -> Result<Option<String>, ConfigError> {
    let (host, name) = (env.read("DB_HOST")?, env.read("DB_NAME")?);
    let engine = env.read("DB_ENGINE")?;
    if host.is_none() && name.is_none() {
        return Ok(None);
    }
    let (scheme, default_port, default_user) = match engine.as_deref().unwrap_or("postgres") {
        "postgres" | "postgresql" => ("postgres", "5432", "postgres"),
        engine @ ("mysql" | "mariadb") => (engine, "3306", "root"),
        "sqlite" => return Ok(Some(format!("sqlite:{}", name.unwrap_or_else(|| ":memory:".into())))),
        other => {
            let message = format!("DB_ENGINE: {other:?} is not known; use postgres, mysql, mariadb or sqlite");
            return Err(ConfigError::new(message));
        }
    };
    let host = host.unwrap_or_else(|| "localhost".into());
    let port = port(env, "DB_PORT")?.unwrap_or_else(|| default_port.into());
    let user = encode(&env.read("DB_USER")?.unwrap_or_else(|| default_user.into()));
    let password = env.read("DB_PASSWORD")?.map(|password| format!(":{}", encode(&password))).unwrap_or_default();
    let name = encode(&name.unwrap_or_else(|| default_user.into()));
    Ok(Some(format!("{scheme}://{user}{password}@{host}:{port}/{name}")))
}

fn cache_url(env: &Env) -> Result<Option<String>, ConfigError> {
    let (host, engine) = (env.read("CACHE_HOST")?, env.read("CACHE_ENGINE")?);
    let (scheme, default_port) = match (engine.as_deref(), &host) {
        (Some("memory"), _) => return Ok(Some("memory:".into())),
        (Some(scheme @ ("redis" | "valkey")), _) => (scheme, "6379"),
        (Some("memcached"), _) => ("memcached", "11211"),
        (Some(other), _) => {
            let message = format!("CACHE_ENGINE: {other:?} is not known; use redis, valkey, memcached or memory");
            return Err(ConfigError::new(message));
        }
        (None, Some(_)) => ("redis", "6379"),
        (None, None) => return Ok(None),
    };
    let host = host.unwrap_or_else(|| "localhost".into());
    let port = port(env, "CACHE_PORT")?.unwrap_or_else(|| default_port.into());
    Ok(Some(format!("{scheme}://{host}:{port}")))
}

/// `CACHE_ASIDE__SECTION__KEY`, which stands above all but flags.
pub(super) fn overrides(root: &mut Node, env: &Env) -> Result<(), ConfigError> {
    for (variable, value) in env.iter() {
        let Some(path) = variable.strip_prefix(PREFIX) else { continue };
        let mut path = path.to_lowercase();
        let mut text = value.to_owned();
        // No key ends in `_file` but `ca_file`, which is a path itself.
        if let Some(bare) = path.strip_suffix("_file").filter(|bare| !bare.ends_with("__ca")) {
            if env.get(&variable[..variable.len() - "_FILE".len()]).is_some() {
                let bare = &variable[..variable.len() - "_FILE".len()];
                return Err(ConfigError::new(format!("{bare} and {variable} are both set; keep one of them")));
            }
            text = read_secret(variable, value)?;
            path = bare.to_owned();
        }
        let path: Vec<String> = path.split("__").map(str::to_owned).collect();
        if path.iter().any(String::is_empty) {
            return Err(ConfigError::new(format!("{variable}: expected {PREFIX}SECTION__KEY")));
        }
        root.set(&path, parse_value(&text, variable)?);
    }
    Ok(())
}
