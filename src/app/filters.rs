//! Keeps filters of existing keys built, one resource after another, at the cost of a quarter of the time at most.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cache::AnyCache;
use crate::cache::redis::{FilterState, RedisCache, Sizes};
use crate::catalog::{Resource, State};
use crate::config::Config;
use crate::served::Served;
use crate::store::{Keys, Load, StoreError};

/// Between two looks whether a filter is to be built.
const LOOK: Duration = Duration::from_millis(200);
/// Building takes at most one part of so many of the time.
const SHARE: u32 = 4;
/// Between two attempts, at least.
const PAUSE: Duration = Duration::from_secs(1);
/// Where there were too many keys, there may be fewer after so long.
const LATER: Duration = Duration::from_mins(10);
/// Keys of one page.
const PAGE: usize = 1_000;
/// The most that a page waits for readers: random keys in a flood are what a filter is for.
const PATIENCE: Duration = Duration::from_millis(250);
/// Between two looks whether readers still wait for a connection.
const YIELD: Duration = Duration::from_millis(5);

/// Why there is no filter.
enum Void {
    /// Changes were missed while it was built, or it is not known now what is told of them.
    Missed,
    /// It would take more than it may.
    TooManyKeys,
    /// The keys could not be read.
    Unread(StoreError),
}

/// What is known of a resource's filter.
struct Known {
    /// For how many keys they are made.
    sizes: Sizes,
    /// Not before.
    again: Instant,
    /// Why there is none, in words, where that will not pass by itself.
    trouble: Option<String>,
}

/// Runs for as long as the service does.
pub(super) async fn watch(served: Served, config: Arc<Config>) {
    let AnyCache::Redis(cache) = served.aside.cache().clone() else { return };
    let mut known: HashMap<Arc<str>, Known> = HashMap::new();
    loop {
        let catalog = served.catalog.load_full();
        let mut troubles = BTreeMap::new();
        for state in catalog.resources.values() {
            let State::Ready(resource, _) = state else { continue };
            if !resource.is_filtered() {
                continue;
            }
            let one = known.entry(Arc::clone(&resource.name)).or_insert_with(|| Known {
                sizes: Sizes::within(config.cache.local.filter_max_bytes as u64),
                again: Instant::now(),
                trouble: None,
            });
            let state = cache.filter(resource);
            if state.is_none_or(|state| state.is_old) && Instant::now() >= one.again {
                keep(&served, &cache, resource, one).await;
            }
            let state = cache.filter(resource);
            served
                .aside
                .metrics()
                .filter(&resource.name, state.map_or((0, 0), |FilterState { keys, bytes, .. }| (keys, bytes)));
            let words = match (state, one.trouble.as_deref()) {
                (None, trouble) => Some(format!("does not answer: {}", trouble.unwrap_or("is being built"))),
                (Some(_), Some(trouble)) => Some(format!("can't be built anew: {trouble}")),
                (Some(_), None) => None,
            };
            troubles.extend(words.map(|words| (resource.name.to_string(), words)));
        }
        served.health.filters.store(Arc::new(troubles));
        tokio::time::sleep(LOOK).await;
    }
}

/// Builds a filter, and says what became of it.
async fn keep(served: &Served, cache: &RedisCache, resource: &Arc<Resource>, known: &mut Known) {
    let started = Instant::now();
    let built = loop {
        let Some(capacity) = known.sizes.next() else { break Err(Void::TooManyKeys) };
        match build(served, cache, resource, capacity).await {
            // Nothing is told to anybody: the next attempt is for more.
            Err(Void::TooManyKeys) if known.sizes.grow() => {}
            other => break other,
        }
    };
    let took = started.elapsed();
    let pause = if let Err(Void::TooManyKeys) = built { LATER } else { PAUSE };
    known.again = Instant::now() + (took * (SHARE - 1)).max(pause);
    let (outcome, trouble) = match &built {
        Ok(keys) => {
            tracing::info!(resource = %resource.name, keys, seconds = took.as_secs_f64(), "a filter of the existing keys was built");
            known.sizes.leave_room(*keys);
            ("built", None)
        }
        Err(Void::Missed) => ("missed", None),
        Err(Void::TooManyKeys) => {
            ("too_many_keys", Some("there are more keys than cache.local.filter_max_bytes is enough for".to_owned()))
        }
        Err(Void::Unread(error)) => ("error", Some(format!("the keys can't be read: {error}"))),
    };
    served.aside.metrics().filter_built(&resource.name, outcome);
    if let Some(words) = trouble.as_ref().filter(|_| known.trouble != trouble) {
        tracing::warn!(resource = %resource.name, "no filter was built: {words}");
    }
    known.trouble = trouble;
}

/// Builds a filter for so many keys; how many there are.
async fn build(served: &Served, cache: &RedisCache, resource: &Arc<Resource>, capacity: u64) -> Result<u64, Void> {
    let store = served.aside.store();
    // Before the first key is read: from here on it is told of changes.
    let filter = cache.begin_filter(resource, capacity).await.map_err(|_| Void::Missed)?;
    let mut keys = Keys::new(PAGE);
    let mut count = 0;
    loop {
        let asked = Instant::now();
        while store.is_pressed() && asked.elapsed() < PATIENCE {
            tokio::time::sleep(YIELD).await;
        }
        let started = Instant::now();
        let page = keys.next(store, resource).await.map_err(Void::Unread)?;
        served.aside.metrics().store_query(&resource.name, "keys", started.elapsed());
        // Another database than the cache has caught up with: what it has says nothing.
        if !filter.agrees(page.origin) {
            return Err(Void::Missed);
        }
        if page.keys.is_empty() {
            break;
        }
        count += page.keys.len() as u64;
        for key in page.keys {
            filter.insert(resource.row_of(key).entry());
        }
        if filter.is_full() {
            return Err(Void::TooManyKeys);
        }
    }
    if filter.complete() { Ok(count) } else { Err(Void::Missed) }
}
