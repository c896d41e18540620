//! A database behind the cache: its declared tables and statements, kept current for as long as this lives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Error, Query, Result, Table};
use crate::app::{Watches, open_cache, open_store, serve};
use crate::cache::CacheError;
use crate::catalog::{Resource, State};
use crate::config::Config;
use crate::served::Served;
use crate::store::{AnyStore, StoreError};
use crate::telemetry::Metrics;

/// How long a start waits for the first connection to the cache.
const CONNECT: Duration = Duration::from_secs(1);

/// The tables and statements of a [`Config`], read through the cache and written past it, without HTTP. It is the service
/// as a value: its replicas, and other programs with the same configuration, may use the same cache.
///
/// While it lives it looks at the tables, and carries changes by other writers into the cache as `invalidation.mode` says.
/// Clones share everything; the last one to go ends that.
///
/// ```
/// # #[cfg(feature = "sqlite")] mod example {
/// use cache_aside::config::{Config, Resource, SecretUrl, WriteKind};
/// use cache_aside::store::{AnyStore, sqlite::SqliteStore};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Fruit { id: i64, name: String, quantity: i64 }
///
/// # #[tokio::main] pub async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut config = Config::default();
/// config.database.url = SecretUrl::new("sqlite::memory:");
/// config.resources.insert("fruit".into(), Resource { write: vec![WriteKind::Update], ..Resource::default() });
///
/// let store = SqliteStore::new(&config.database)?;
/// store.execute("CREATE TABLE fruit (id INTEGER PRIMARY KEY, name TEXT, quantity INTEGER);
///                INSERT INTO fruit VALUES (1, 'apple', 100)").await?;
/// let db = cache_aside::Database::over(config, AnyStore::Sqlite(store)).await?;
///
/// let fruit = db.table::<i64, Fruit>("fruit");
/// assert_eq!(fruit.get(&1).await?.map(|fruit| fruit.quantity), Some(100));
/// fruit.merge(&1, &serde_json::json!({ "quantity": 99 })).await?; // and out of the cache, before this returns
/// let rich: Vec<Fruit> = db.query("SELECT * FROM fruit WHERE quantity >= $1").bind(99).get().await?;
/// assert_eq!(rich[0].name, "apple");
/// db.close().await?;
/// # Ok(()) }}
/// # #[cfg(feature = "sqlite")] example::main().unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Database {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    served: Served,
    config: Arc<Config>,
    watches: Mutex<Option<Watches>>,
}

impl Database {
    /// Opens the database and the cache that `config` names, and waits until the tables were looked at, for
    /// `server.request_timeout` at most. A server that is away is no error: it is tried again until it is there.
    ///
    /// Of the configuration everything counts but `server`, save its timeouts, `access` and the log.
    ///
    /// # Errors
    ///
    /// [`Error::Config`]: what is wrong with it, or which feature is not enabled.
    pub async fn open(config: Config) -> Result<Self> {
        // Its words are about values, which the store's are not.
        config.validate().map_err(|error| Error::Config(error.to_string()))?;
        let store = open_store(&config).map_err(|error| Error::Config(format!("{error:#}")))?;
        Self::over(config, store).await
    }

    /// The same over a database that was opened before, by this `config`.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub async fn over(config: Config, store: AnyStore) -> Result<Self> {
        config.validate().map_err(|error| Error::Config(error.to_string()))?;
        let cache = open_cache(&config).map_err(|error| Error::Config(format!("{error:#}")))?;
        let metrics =
            Metrics::within(&prometheus::Registry::new()).map_err(|error| Error::Config(error.to_string()))?;
        cache.connected(CONNECT).await;
        let served = serve(&config, store, cache, Arc::new(metrics));
        let config = Arc::new(config);
        let watches = {
            let mut looked = std::pin::pin!(served.health.looked.notified());
            looked.as_mut().enable();
            let watches = Watches::start(&served, &config);
            // Where it takes longer, the first reads say so.
            let _ = tokio::time::timeout(config.server.request_timeout, looked).await;
            watches
        };
        Ok(Self { inner: Arc::new(Inner { served, config, watches: Mutex::new(Some(watches)) }) })
    }

    /// The rows of a declared resource, as `V`, by keys as `K`: a tuple or list where the key has several columns.
    #[must_use]
    pub fn table<K, V>(&self, resource: &str) -> Table<K, V> {
        Table::new(self.clone(), resource)
    }

    /// The result of a statement that reads, whose parameters are `$1`, `$2`… on every engine; its cache key is the SHA-256
    /// of both. Only its TTL and [`Query::invalidate`] bound how old it can be: declare statements whose results should
    /// follow their tables, and name them with [`Self::named`].
    ///
    /// Values belong into parameters: each text is a statement that the database prepares and keeps.
    pub fn query(&self, sql: &str) -> Query {
        Query::ad_hoc(self.clone(), sql)
    }

    /// The result of a declared statement.
    pub fn named(&self, query: &str) -> Query {
        Query::named(self.clone(), query)
    }

    /// What it counts.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        self.served().aside.metrics()
    }

    /// The database itself, past the cache.
    #[must_use]
    pub fn store(&self) -> &AnyStore {
        self.served().aside.store()
    }

    /// Whether the cache can be used now. Where it can't, reads go to the database and nothing fails.
    ///
    /// # Errors
    ///
    /// What keeps it from being used.
    pub fn health(&self) -> Result<(), CacheError> {
        self.served().aside.cache().health()
    }

    /// Whether all that is declared is served: the database was looked at, and has it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.served().catalog.load().is_ready()
    }

    /// Waits until every write that was begun has ended and the cache was told of it, for `server.shutdown_timeout` at most;
    /// then ends what runs in the background.
    ///
    /// # Errors
    ///
    /// [`Error::Unsettled`].
    pub async fn close(self) -> Result<()> {
        let patience = self.inner.config.server.shutdown_timeout;
        let settled = self.served().aside.settle(patience).await;
        drop(self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner).take());
        if settled { Ok(()) } else { Err(Error::Unsettled(patience)) }
    }

    pub(super) fn served(&self) -> &Served {
        &self.inner.served
    }

    pub(super) fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The most that one call may take.
    pub(super) fn timeout(&self) -> Duration {
        self.inner.config.server.request_timeout
    }

    /// What is served under this name now; statements are called `query:NAME`.
    pub(super) fn resource(&self, name: &str) -> Result<Arc<Resource>> {
        let catalog = self.served().catalog.load();
        match catalog.resources.get(name).or_else(|| catalog.queries.get(name)) {
            Some(State::Ready(resource, _)) => Ok(Arc::clone(resource)),
            Some(State::Waiting(problems)) => {
                let words: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
                Err(Error::NotServed(format!("{name} can't be served now: {}", words.join("; "))))
            }
            None => Err(Error::NotServed(match catalog.nearest(name) {
                Some(near) => format!("there is no {name:?}; did you mean {near:?}?"),
                None => format!("there is no {name:?}"),
            })),
        }
    }

    /// Has the tables looked at anew where one was not as the catalog knows it.
    pub(super) fn failed(&self, error: Error) -> Error {
        if let Error::Database(StoreError::Changed(_)) = &error {
            self.served().health.look_again.notify_one();
        }
        error
    }
}
