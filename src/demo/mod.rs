//! The embedded demo: a small shop in SQLite and the in-process cache, open to everybody.

use crate::config::{Config, ConfigError, Env};

/// The tables and rows.
pub const SQL: &str = include_str!("demo.sql");

/// Its configuration; the environment may override it.
///
/// # Errors
///
/// Overrides that don't fit.
pub fn config(env: &Env) -> Result<Config, ConfigError> {
    Config::from_yaml(include_str!("demo.yaml"), "the demo's configuration", env)
}

/// What to try, for a server at `address`.
#[must_use]
pub fn invitation(address: &std::net::SocketAddr) -> String {
    let host = if address.ip().is_unspecified() { "localhost".to_owned() } else { address.ip().to_string() };
    let url = format!("http://{host}:{}", address.port());
    format!(
        "cache-aside runs its demo: SQLite in memory, the in-process cache, and no access control at all.\n\
         Try:\n\
         \x20 curl -i {url}/api/fruit/1                # the first read comes from the database, the next from the cache\n\
         \x20 curl -i '{url}/api/products?category_id=5'\n\
         \x20 curl -i -X PATCH {url}/api/fruit/1 -H 'Content-Type: application/json' -d '{{\"quantity\":99}}'\n"
    )
}
