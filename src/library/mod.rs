//! The cache inside other programs: their own loaders behind it, or the tables and statements of a database; typed, and
//! without HTTP.
//!
//! Nothing here caches, locks or loads: it turns types into keys and bytes for [`crate::aside`], where all of that is done.

mod builder;
mod entries;
mod error;
mod fetched;
mod key;
mod load;

#[cfg(feature = "store")]
mod database;
#[cfg(feature = "store")]
mod query;
#[cfg(feature = "store")]
mod table;

use std::sync::Arc;
use std::time::Duration;

pub use builder::Builder;
#[cfg(feature = "store")]
pub use database::Database;
pub use entries::{Entries, EntriesBuilder};
pub use error::{Error, Result};
pub use fetched::Fetched;
pub use load::Found;
#[cfg(feature = "store")]
pub use query::Query;
#[cfg(feature = "store")]
pub use table::{Saved, Table};

use tokio::runtime::Handle;

use crate::aside::Writes;
use crate::cache::{AnyCache, CacheError};
use crate::config::Defaults;
use crate::telemetry::Metrics;

/// How long closing waits for a cache that was not told yet.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cache in front of loaders that the program brings. Clones share everything.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
/// use std::{collections::HashMap, convert::Infallible, time::Duration};
///
/// let cache = cache_aside::CacheAside::builder().url("memory:").key_prefix("shop:").build().await?;
/// let lengths = cache
///     .entries::<String, usize>("lengths")
///     .ttl(Duration::from_secs(10))
///     .loader(async |words: Vec<String>| {
///         // Only what the cache lacks comes here, all of it in one call.
///         Ok::<_, Infallible>(words.into_iter().map(|word| (word.clone(), word.len())).collect::<HashMap<_, _>>())
///     });
/// assert_eq!(lengths.get("cache").await?, Some(5));
/// assert!(lengths.fetch("cache").await?.is_hit());
/// cache.close().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct CacheAside {
    shared: Arc<Shared>,
}

/// What all entries of a cache have in common.
#[derive(Debug)]
struct Shared {
    cache: AnyCache,
    key_prefix: String,
    max_entry: usize,
    defaults: Defaults,
    metrics: Arc<Metrics>,
    writes: Writes,
    /// Where loaders run.
    runtime: Handle,
}

impl CacheAside {
    /// Says where the cache is, and what holds for all entries.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Declares entries: values of type `V` by keys of type `K`, under a name that stands in cache keys and metrics. They
    /// are used once they have a [loader](EntriesBuilder::loader).
    ///
    /// Keys are whatever serde can write and read back: integers, strings, ULIDs, UUIDs, tuples, newtypes. Two entries of
    /// one name are the same entries: clone them instead, so that this process loads nothing twice.
    pub fn entries<K, V>(&self, name: &str) -> EntriesBuilder<K, V> {
        EntriesBuilder::new(Arc::clone(&self.shared), name)
    }

    /// What it counts: register it, encode it, or read it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
    /// let registry = cache_aside::prometheus::Registry::new(); // the program's own
    /// let cache = cache_aside::CacheAside::builder().registry(&registry).build().await?;
    /// # let numbers = cache.entries::<u8, u8>("numbers").loader(async |ids: Vec<u8>| {
    /// #     Ok::<_, std::convert::Infallible>(ids.into_iter().map(Some).collect::<Vec<_>>())
    /// # });
    /// numbers.get(&1).await?;
    /// assert!(registry.gather().iter().any(|family| family.name() == "cache_aside_requests_total"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Whether the cache can be used now. Where it can't, reads go to the loaders and nothing fails.
    ///
    /// # Errors
    ///
    /// What keeps it from being used.
    pub fn health(&self) -> Result<(), CacheError> {
        self.shared.cache.health()
    }

    /// Waits until every invalidation that was begun has been told to the cache, for ten seconds at most. Call it before
    /// the program ends: what was not told by then stays in a shared cache until its TTL ends.
    ///
    /// # Errors
    ///
    /// [`Error::Unsettled`].
    pub async fn close(self) -> Result<()> {
        let settled = self.shared.writes.settle(&self.shared.cache, PATIENCE).await;
        if settled { Ok(()) } else { Err(Error::Unsettled(PATIENCE)) }
    }
}
