//! The heart over a database and a cache, and what keeps it true: looks at the tables and the database, and rounds.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::bind;
use crate::aside::{Aside, Limits};
use crate::cache::AnyCache;
use crate::catalog::Catalog;
use crate::config::Config;
#[cfg(feature = "postgres")]
use crate::config::InvalidationMode;
#[cfg(feature = "rounds")]
use crate::invalidation::{Pace, Rounds};
use crate::served::Served;
use crate::store::AnyStore;
#[cfg(feature = "postgres")]
use crate::store::postgres::Decoder;
use crate::telemetry::Metrics;

/// The heart over a store and a cache, with nothing looked at yet.
pub fn serve(config: &Config, store: AnyStore, cache: AnyCache, metrics: Arc<Metrics>) -> Served {
    let queries = config.queries.keys().map(|name| format!("query:{name}"));
    for name in config.resources.keys().cloned().chain(queries) {
        // Known from the first scrape on.
        drop(metrics.resource(&name));
    }
    let limits = Limits {
        max_entry: config.cache.max_entry,
        wait: config.database.statement_timeout + Duration::from_millis(500),
        // Half of the connections: whoever misses goes first.
        refreshes: usize::try_from(config.database.pool_size / 2).unwrap_or(1).max(1),
        audit_ratio: config.telemetry.audit_ratio,
        max_staleness: config.invalidation.max_staleness,
        hold: config.database.statement_timeout + Duration::from_secs(5),
    };
    Served {
        aside: Aside::new(cache, store, limits, metrics),
        catalog: Arc::new(ArcSwap::from_pointee(Catalog::unseen(config))),
        health: Arc::default(),
    }
}

/// What keeps all that true, for as long as this lives: looks at the tables and the database, and rounds.
#[derive(Debug)]
pub struct Watches(Vec<tokio::task::JoinHandle<()>>);

impl Watches {
    /// Starts them in the current runtime.
    #[must_use]
    pub fn start(served: &Served, config: &Arc<Config>) -> Self {
        #[allow(unused_mut, reason = "there may be no rounds to add")]
        let mut watches = vec![
            tokio::spawn(bind::watch_catalog(served.clone(), Arc::clone(config))),
            tokio::spawn(bind::watch_database(served.clone())),
            tokio::spawn(watch_staleness(served.clone())),
        ];
        #[cfg(feature = "rounds")]
        if let Some(rounds) = rounds(served, config) {
            watches.push(tokio::spawn(rounds.run()));
        }
        #[cfg(feature = "postgres")]
        if let (InvalidationMode::Wal, AnyStore::Postgres(store)) = (config.invalidation.mode, served.aside.store()) {
            let decoder = Decoder::new(store.clone(), Arc::clone(served.aside.metrics()));
            watches.push(tokio::spawn(decoder.run()));
        }
        Self(watches)
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

#[cfg(feature = "rounds")]
/// What keeps the cache current, where somebody is to.
fn rounds(served: &Served, config: &Config) -> Option<Rounds> {
    let max_staleness = config.watermark()?;
    let pace = Pace::new(max_staleness);
    let feed = served.aside.store().feed(pace.patience)?;
    let (cache, metrics) = (served.aside.cache().clone(), Arc::clone(served.aside.metrics()));
    Some(Rounds::new(cache, feed, pace, metrics, Arc::clone(&served.health.rounds)))
}

/// Tells in metrics how far behind the cache may be, for how long nobody knew, and whether it is asked.
async fn watch_staleness(served: Served) {
    const STEP: Duration = Duration::from_millis(100);
    let (cache, metrics) = (served.aside.cache(), served.aside.metrics());
    let mut before = std::time::Instant::now();
    let mut known: Vec<String> = Vec::new();
    let mut broken: Vec<String> = Vec::new();
    loop {
        tokio::time::sleep(STEP).await;
        let passed = before.elapsed();
        before = std::time::Instant::now();
        let memories = cache.memories();
        for memory in &memories {
            let mistrusted = if memory.health.is_err() { passed } else { Duration::ZERO };
            metrics.untrusted(&memory.address, mistrusted);
            #[expect(clippy::cast_precision_loss, reason = "milliseconds, shown to people")]
            let seconds = memory.staleness.map(|milliseconds| milliseconds as f64 / 1000.0);
            metrics.staleness(&memory.address, seconds);
        }
        // A node that has left a cluster is not behind any more.
        for gone in known.iter().filter(|address| memories.iter().all(|memory| memory.address != **address)) {
            metrics.staleness(gone, None);
        }
        let breakers = cache.breakers(&memories);
        for gone in broken.iter().filter(|backend| breakers.iter().all(|(other, _)| other != *backend)) {
            metrics.breaker(gone, None);
        }
        for (backend, state) in &breakers {
            metrics.breaker(backend, Some(*state));
        }
        broken = breakers.into_iter().map(|(backend, _)| backend).collect();
        known = memories.into_iter().map(|memory| memory.address).collect();
    }
}
