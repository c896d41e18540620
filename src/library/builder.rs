//! Where the cache is, and what holds for all entries.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use tokio::runtime::Handle;

use super::{CacheAside, Error, Result, Shared};
use crate::aside::Writes;
use crate::config::{self, Config, Defaults, Invalidation, InvalidationMode, SecretUrl};
use crate::telemetry::Metrics;

/// How long a start waits for the first connection: so that the first reads find the cache.
const CONNECT: Duration = Duration::from_secs(1);

/// Makes a [`CacheAside`]. What is not said has the service's default.
///
/// ```no_run
/// # async fn example() -> cache_aside::Result<()> {
/// use std::time::Duration;
///
/// let cache = cache_aside::CacheAside::builder()
///     .url("redis://localhost:6379")
///     .key_prefix("shop:")
///     .timeout(Duration::from_millis(50))
///     .build()
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    cache: config::Cache,
    defaults: Defaults,
    registry: Registry,
}

impl Default for Builder {
    fn default() -> Self {
        Self { cache: config::Cache::default(), defaults: Defaults::default(), registry: Registry::new() }
    }
}

impl Builder {
    /// Where the cache is: `memory:` (in this process, the default), or with the feature `redis` `redis://`, `rediss://`,
    /// `valkey://`, `redis+sentinel://h1,h2,h3/NAME`, `redis+cluster://h1,h2,h3`.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.cache.url = SecretUrl::new(url);
        self
    }

    /// Stands before every key, for a server that several programs share. Default: nothing.
    #[must_use]
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.cache.key_prefix = prefix.into();
        self
    }

    /// The most that one operation of the cache may take; past it the read goes to the loader. Default 100 ms.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.cache.timeout = timeout;
        self
    }

    /// Larger values, in bytes of JSON, are served and not cached. Default 1 MiB.
    #[must_use]
    pub fn max_entry(mut self, bytes: usize) -> Self {
        self.cache.max_entry = bytes;
        self
    }

    /// Larger values, in bytes of JSON, are packed on their way to Redis or Memcached; 0: none are. Default 0.
    #[must_use]
    pub fn compress_above(mut self, bytes: usize) -> Self {
        self.cache.compress_above = bytes;
        self
    }

    /// The most that a `memory:` cache holds, in bytes. Default 64 MiB.
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.cache.local.max_bytes = bytes;
        self
    }

    /// A file of certificates (PEM) to trust instead of the system's, for `rediss://`.
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.cache.ca_file = Some(file.into());
        self
    }

    /// How long entries live that don't say otherwise.
    #[must_use]
    pub fn defaults(mut self, defaults: Defaults) -> Self {
        self.defaults = defaults;
        self
    }

    /// Where metrics are registered; one cache per registry. Default: a registry of its own.
    #[must_use]
    pub fn registry(mut self, registry: &Registry) -> Self {
        self.registry = registry.clone();
        self
    }

    /// Opens the cache, and waits a moment for the first connection. A server that is away is no error: reads go to the
    /// loaders until it is there.
    ///
    /// # Errors
    ///
    /// [`Error::Config`]: a URL that can't be used, or one whose feature is not enabled; metrics that the registry has
    /// already; no Tokio runtime.
    pub async fn build(self) -> Result<CacheAside> {
        let no_runtime = |_| Error::Config("a Tokio runtime must run this".into());
        let runtime = Handle::try_current().map_err(no_runtime)?;
        self.cache.validate().map_err(|error| Error::Config(error.to_string()))?;
        let config = Config {
            cache: self.cache,
            // Who loads invalidates: there is nobody else who could tell of changes.
            invalidation: Invalidation { mode: InvalidationMode::None, ..Invalidation::default() },
            ..Config::default()
        };
        let cache = crate::app::open_cache(&config).map_err(|error| Error::Config(format!("{error:#}")))?;
        let metrics = Metrics::within(&self.registry).map_err(|error| Error::Config(error.to_string()))?;
        cache.connected(CONNECT).await;
        let config::Cache { key_prefix, max_entry, .. } = config.cache;
        let (defaults, metrics, writes) = (self.defaults, Arc::new(metrics), Writes::default());
        let shared = Shared { cache, key_prefix, max_entry, defaults, metrics, writes, runtime };
        Ok(CacheAside { shared: Arc::new(shared) })
    }
}
