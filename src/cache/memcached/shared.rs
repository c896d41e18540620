//! What all connections of a process to one Memcached have in common: where it is, and what the process owes.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;

use super::connection::Connection;
use super::key::{Spelled, Spelling};
use super::look::change;
use super::wire::{Batch, Reply};
use crate::cache::CacheError;
use crate::cache::control::field;
use crate::cache::lane::{Common, Debts};
use crate::config;

/// Commands that go out together.
const CHUNK: usize = 1_000;
/// Where Memcached listens unless the URL says otherwise.
const PORT: u16 = 11211;

/// What all lanes of a process have in common.
pub(super) struct Shared {
    common: Common,
    host: String,
    port: u16,
    pub(super) spelling: Spelling,
    /// The key that holds the node's epoch, watermark and generations. No resource can have its name: `-` is no letter of
    /// theirs.
    pub(super) control_key: Spelled,
    connections: Arc<AtomicUsize>,
}

/// The host and port of `memcached://host[:port]`.
fn address(url: &str) -> anyhow::Result<(String, u16)> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    anyhow::ensure!(!rest.contains(['/', '@', '?', '#', ',']), "write it like memcached://host:11211, and no more");
    // An IPv6 address stands in brackets.
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            (host, port.parse().with_context(|| format!("{port:?} is no port"))?)
        }
        _ => (rest, PORT),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    anyhow::ensure!(!host.is_empty(), "the host is missing: memcached://host:11211");
    Ok((host.to_owned(), port))
}

impl Deref for Shared {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Shared {
    pub(super) fn new(config: &config::Cache, max_staleness: Option<Duration>) -> anyhow::Result<Self> {
        let (host, port) = address(config.url.expose())?;
        let spelling = Spelling::new(&config.key_prefix);
        Ok(Self {
            common: Common::new(config, max_staleness, format!("{host}:{port}"), Debts::default()),
            host,
            port,
            control_key: spelling.of(&format!("{}cache-aside:control", config.key_prefix)),
            spelling,
            connections: Arc::default(),
        })
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// A new connection, in the current runtime.
    pub(super) async fn connect(&self) -> anyhow::Result<Connection> {
        Connection::open((&self.host, self.port), self.timeout, &self.connections).await
    }

    /// Delivers what is owed. Called after a look, over the connection that it went over.
    pub(super) async fn deliver(&self, connection: &Connection) -> Result<(), CacheError> {
        let Some(due) = self.debts.due() else { return Ok(()) };
        if due.is_everything() {
            change(self, connection, |fields| {
                fields.insert(field::EPOCH.to_owned(), fastrand::u64(1..).to_string());
            })
            .await?;
        }
        self.drop_all(connection, &due.keys()).await?;
        due.done();
        Ok(())
    }

    /// Deletes whatever these keys hold, each acknowledged. What writers hold stands beside it, and stays.
    pub(super) async fn drop_all(&self, connection: &Connection, keys: &[&str]) -> Result<(), CacheError> {
        for some in keys.chunks(CHUNK) {
            let mut batch = Batch::new();
            for key in some {
                batch.delete(&self.spelling.of(key));
            }
            let told = |reply: &Reply| matches!(reply, Reply::Done(_) | Reply::Missing);
            if !connection.ask(batch).await?.iter().all(told) {
                return Err(CacheError::Refused);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_address_has_a_host_and_perhaps_a_port() {
        for (url, host, port) in [
            ("memcached://cache", "cache", 11211),
            ("memcached://cache:1234/", "cache", 1234),
            ("memcached://[::1]", "::1", 11211),
            ("memcached://[::1]:9", "::1", 9),
        ] {
            assert_eq!(address(url).unwrap(), (host.to_owned(), port), "{url}");
        }
        for url in ["memcached://", "memcached://a,b", "memcached://u:p@a", "memcached://a/1", "memcached://a:x"] {
            assert!(address(url).is_err(), "{url}");
        }
    }
}
