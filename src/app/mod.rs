//! The composition root: configuration → cache and store → the heart and what keeps it true; `server` puts a door before it.

#[cfg(feature = "store")]
mod bind;
#[cfg(feature = "server")]
mod door;
#[cfg(feature = "server")]
mod filters;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "server")]
mod start;
#[cfg(feature = "store")]
mod watches;

#[allow(unused_imports, reason = "which of them is needed depends on the engines")]
use anyhow::Context;

#[cfg(feature = "store")]
pub use bind::look;
#[cfg(feature = "server")]
pub use server::App;
#[cfg(feature = "store")]
pub use watches::{Watches, serve};

use crate::cache::AnyCache;
#[cfg(feature = "memcached")]
use crate::cache::memcached::MemcachedCache;
use crate::cache::memory::MemoryCache;
#[cfg(feature = "redis")]
use crate::cache::redis::{RedisCache, cluster::ClusterCache};
use crate::config::Config;
#[cfg(feature = "store")]
use crate::store::AnyStore;
#[cfg(feature = "mysql")]
use crate::store::mysql::MysqlStore;
#[cfg(feature = "postgres")]
use crate::store::postgres::PostgresStore;
#[cfg(feature = "sqlite")]
use crate::store::sqlite::SqliteStore;

/// The cache that a URL names.
///
/// # Errors
///
/// A URL or certificate that can't be used, or an engine that this was built without.
pub fn open_cache(config: &Config) -> anyhow::Result<AnyCache> {
    let (cache, watermark) = (&config.cache, config.watermark());
    Ok(match cache.url.scheme() {
        #[cfg(feature = "redis")]
        "redis+cluster" | "rediss+cluster" => AnyCache::Cluster(
            ClusterCache::new(cache, watermark, config.holds_in_process()).context("cache.url can't be used")?,
        ),
        "memory" => AnyCache::Memory(MemoryCache::new(cache.local.max_bytes, cache.max_entry, watermark)),
        #[cfg(feature = "memcached")]
        "memcached" => AnyCache::Memcached(MemcachedCache::new(cache, watermark).context("cache.url can't be used")?),
        #[cfg(feature = "redis")]
        "redis" | "rediss" | "valkey" | "valkeys" | "redis+sentinel" => AnyCache::Redis(
            RedisCache::new(cache, watermark, config.holds_in_process()).context("cache.url can't be used")?,
        ),
        scheme => anyhow::bail!("cache.url: this was built without the feature for {scheme}:"),
    })
}

/// The database that a URL names.
///
/// # Errors
///
/// A URL or certificate that can't be used, or an engine that this was built without.
#[cfg(feature = "store")]
pub fn open_store(config: &Config) -> anyhow::Result<AnyStore> {
    let database = &config.database;
    Ok(match database.url.scheme() {
        #[cfg(feature = "mysql")]
        "mysql" | "mariadb" => AnyStore::Mysql(MysqlStore::new(database).context("database.url can't be used")?),
        #[cfg(feature = "sqlite")]
        "sqlite" => AnyStore::Sqlite(SqliteStore::new(database).context("database.url can't be used")?),
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => AnyStore::Postgres(
            PostgresStore::new(database, config.invalidation.mode).context("database.url can't be used")?,
        ),
        scheme => anyhow::bail!("database.url: this was built without the feature for {scheme}:"),
    })
}
