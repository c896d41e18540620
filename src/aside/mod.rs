//! The pattern itself: look in the cache, load what is not there once, store it if nothing changed meanwhile.
//!
//! ```text
//! lookup   the cache is asked                  hit: answered
//! flight   one per key and process             whoever comes later waits for it
//! lease    the right to fill, from the cache   or wait for whoever has it
//! load     the database is asked, under the lease
//! fill     stored if the lease's fence is still there, else refused and counted
//! answer   with what was read, whatever became of the fill
//! ```
//!
//! A cache can only make us slower, never wrong or down: its errors end here, as a counter and a miss.
//! This room knows two traits and a clock: no Redis, no SQL, no HTTP.

mod answer;
mod audit;
mod fill;
mod flight;
mod guard;
mod invalidate;
mod lease;
mod load;
mod read;
mod read_many;
mod refresh;
mod sketch;
#[cfg(feature = "server")]
mod start;
#[cfg(test)]
mod tests;
mod top;
#[cfg(feature = "server")]
mod warm;
mod write;
mod writes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

pub use answer::{Answer, Ask, Forward, ReadError, Source, Status};
use flight::Flights;
pub use guard::Guard;
use refresh::Refreshes;
use top::Top;
pub use top::{Outstanding, Standing};
#[cfg(feature = "server")]
pub use warm::{Counts, RATE, Share, Tally, Warming, batches};
pub use write::Wrote;
pub use writes::Writes;

use crate::cache::{AnyCache, Cache, CacheError};
use crate::catalog::Mapping;
use crate::store::Load;
use crate::telemetry::{Metrics, Throttle};

/// The lock of a lease; a live filler renews it. A dead one delays readers by this much.
const LOCK: Duration = Duration::from_millis(750);

/// How long a cache may take to be ready for what is newly served; it is served past the cache until then.
const DECLARED: Duration = Duration::from_secs(1);

/// What bounds the work on one entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Larger entries are served and not cached, in bytes.
    pub max_entry: usize,
    /// How long to wait for another process's load before loading past it.
    pub wait: Duration,
    /// How long a writer holds entries at most: longer than the database lets its transaction live.
    pub hold: Duration,
    /// Statements that refresh what is still fresh, at most at once: a part of what the store takes, for whoever misses
    /// goes before them.
    pub refreshes: usize,
    /// The share of hits that are compared with the database.
    pub audit_ratio: f64,
    /// How far behind the database a hit may be.
    pub max_staleness: Duration,
}

/// Reads and writes through a cache. Clones share everything.
#[derive(Debug)]
pub struct Aside<C, S> {
    core: Arc<Core<C, S>>,
    /// For lookups; flights use the core's.
    cache: C,
}

impl<C: Clone, S> Clone for Aside<C, S> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), cache: self.cache.clone() }
    }
}

#[derive(Debug)]
struct Core<C, S> {
    cache: C,
    store: S,
    /// Whether the store is asked.
    guard: Guard,
    flights: Flights,
    /// Flights that ask a cache of which nobody knows whether it answers.
    probes: Arc<Semaphore>,
    refreshes: Refreshes,
    limits: Limits,
    metrics: Arc<Metrics>,
    /// Where flights and writes run, whatever becomes of the request that began them.
    runtime: Handle,
    /// Writes under way: a commit whose invalidation was not sent yet must not be left behind.
    writes: Writes,
    warnings: Throttle,
    audit: audit::Audit,
    /// Which entries stand out.
    top: Top,
    /// Which changes concern what is served.
    mappings: ArcSwap<Vec<Mapping>>,
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Aside<C, S> {
    /// Puts a cache in front of a store. Loads and writes run in the runtime that calls this.
    #[must_use]
    pub fn new(cache: C, store: S, limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self::beside(cache, store, limits, metrics, Writes::default())
    }

    /// The same for one of several stores behind a cache, whose writes are settled together.
    #[must_use]
    pub fn beside(cache: C, store: S, limits: Limits, metrics: Arc<Metrics>, writes: Writes) -> Self {
        let core = Core {
            cache: cache.clone(),
            store,
            guard: Guard::default(),
            flights: Flights::default(),
            probes: Arc::new(Semaphore::new(read::PROBES)),
            refreshes: Refreshes::new(limits.refreshes),
            limits,
            metrics,
            runtime: Handle::current(),
            writes,
            warnings: Throttle::default(),
            audit: audit::Audit::new(limits.audit_ratio, limits.max_staleness),
            top: Top::default(),
            mappings: ArcSwap::default(),
        };
        Self { core: Arc::new(core), cache }
    }

    /// The store behind the cache.
    pub fn store(&self) -> &S {
        &self.core.store
    }

    /// What stands before the store.
    pub fn guard(&self) -> &Guard {
        &self.core.guard
    }

    /// The cache.
    pub fn cache(&self) -> &C {
        &self.cache
    }

    /// The metrics that it counts in.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.core.metrics
    }
}

impl<S: Load + 'static> Aside<AnyCache, S> {
    /// Waits until every write that was begun has ended and the cache was told of all of them, for `patience` at most;
    /// whether that was so.
    pub async fn settle(&self, patience: Duration) -> bool {
        self.core.writes.settle(&self.core.cache, patience).await
    }

    /// Declares which changes concern what is served from now on: to the cache, which must know it before it is used, and
    /// to writes.
    pub async fn declare(&self, mappings: Vec<Mapping>) {
        let named = mappings.iter().map(|mapping| (mapping.fingerprint(), mapping.clone())).collect();
        self.core.mappings.store(Arc::new(mappings));
        self.core.cache.declare(named, DECLARED).await;
    }

    /// The same, with lookups over a connection of the runtime that calls this.
    #[must_use]
    pub fn attach(&self) -> Self {
        Self { core: Arc::clone(&self.core), cache: self.cache.attach() }
    }
}

impl<C, S> Core<C, S> {
    /// Times an operation of the cache and counts its error; whoever asked does without.
    async fn asked<T>(
        &self,
        operation: &'static str,
        asking: impl Future<Output = Result<T, CacheError>>,
    ) -> Result<T, CacheError> {
        let started = Instant::now();
        let outcome = asking.await;
        self.metrics.cache_operation(operation, started.elapsed());
        if let Err(error) = outcome {
            self.metrics.error("cache", error.kind());
            if let Some(kept_back) = self.warnings.pass(operation, error.kind()) {
                tracing::warn!(operation, %error, kept_back, "the cache could not be asked; doing without");
            }
        }
        outcome
    }
}
