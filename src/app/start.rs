//! `cache.local.warm_start`: a new replica does not begin with an empty tier in process. What is hot at one that serves is
//! noted in the cache now and then; one that starts reads the note and then, from the cache alone, what it names, before it
//! is ready. Otherwise a rolling restart sends the first reads of all hot keys to the cache.
//!
//! The note is a hint. Whatever stands where it should be, nothing comes of it but a line in the log and some reads of the
//! cache, for two seconds at most. Keys are data: they go nowhere else.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cache::redis::RedisCache;
use crate::cache::{AnyCache, CacheError};
use crate::catalog::{Catalog, State, Target};
use crate::served::{Health, Served};

/// Between two looks at what is hot here, about.
const EVERY: Duration = Duration::from_secs(5);
/// A note that would say the same is left again after so long.
const AGAIN: Duration = Duration::from_mins(1);
/// A note that nobody renews is forgotten after so long.
const LIFE: Duration = Duration::from_mins(10);
/// The most that a note names, and its bytes.
const MOST: usize = 128;
const BYTES: usize = 16 << 10;
/// Another one is a note of another version.
const VERSION: u32 = 1;
/// The most that it may delay a start, once all that is declared can be served.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks whether it can.
const LOOK: Duration = Duration::from_millis(20);

/// What is hot somewhere.
#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    /// Resources and cache keys, the most read first.
    entries: Vec<(String, String)>,
}

/// While this lives, the service is not ready.
#[derive(Debug)]
pub(super) struct Starting(Arc<Health>);

impl Starting {
    pub(super) fn begin(health: &Arc<Health>) -> Self {
        health.starting.store(true, Ordering::Relaxed);
        Self(Arc::clone(health))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.starting.store(false, Ordering::Relaxed);
    }
}

/// Runs for as long as the service does.
pub(super) async fn watch(served: Served, starting: Starting) {
    let AnyCache::Redis(cache) = served.aside.cache().clone() else { return };
    while !served.catalog.load().is_ready() {
        tokio::time::sleep(LOOK).await;
    }
    begin(&served, &cache).await;
    drop(starting);
    let (mut said, mut when) = (Vec::new(), Instant::now());
    loop {
        tokio::time::sleep(EVERY.mul_f64(0.5 + fastrand::f64())).await;
        let (text, mut names) = hot(&served);
        names.sort_unstable();
        if names.is_empty() || names == said && when.elapsed() < AGAIN {
            continue;
        }
        match cache.leave_note(&text, LIFE).await {
            Ok(()) => (said, when) = (names, Instant::now()),
            Err(error) => tracing::debug!(%error, "what is hot here could not be noted"),
        }
    }
}

/// A note of what is hot here and may be held in process, and the keys that it names.
fn hot(served: &Served) -> (String, Vec<String>) {
    let catalog = served.catalog.load();
    let named =
        |resource: &str, key: &str| target(&catalog, resource, key).is_some_and(|it| served.aside.may_hold(&it));
    let hot = served.aside.top(usize::MAX).hot.into_iter().filter(|one| named(&one.resource, &one.key));
    let entries = hot.take(MOST).map(|one| (one.resource.to_string(), one.key)).collect();
    let mut note = Note { version: VERSION, entries };
    loop {
        // Texts and a number always are JSON.
        let text = serde_json::to_string(&note).unwrap_or_default();
        if text.len() <= BYTES {
            return (text, note.entries.into_iter().map(|(_, key)| key).collect());
        }
        note.entries.truncate(note.entries.len() / 2);
    }
}

/// Holds what is hot elsewhere.
async fn begin(served: &Served, cache: &RedisCache) {
    let began = Instant::now();
    let note = tokio::time::timeout(PATIENCE, cache.note(BYTES)).await.unwrap_or(Err(CacheError::TimedOut));
    let targets = match note {
        Ok(text) if text.is_empty() => return tracing::debug!("nobody has noted what is hot"),
        Ok(text) => read(&served.catalog.load(), &text),
        Err(error) => return tracing::debug!(%error, "what others have noted to be hot could not be read"),
    };
    let Some(targets) = targets else {
        return tracing::debug!("where a note of what is hot should be stands another thing");
    };
    // Those that were read by then are held all the same.
    let all = tokio::time::timeout(PATIENCE.saturating_sub(began.elapsed()), served.aside.hold(&targets)).await.is_ok();
    let held = targets.iter().filter(|target| cache.in_process(target.entry())).count();
    let (named, milliseconds) = (targets.len(), began.elapsed().as_millis());
    tracing::debug!(named, held, all, milliseconds, "began with what is hot at other replicas");
}

/// What a note names, of what is served here; `None`: it is no note of this version.
fn read(catalog: &Catalog, text: &[u8]) -> Option<Vec<Target>> {
    if text.len() > BYTES {
        return None;
    }
    let note: Note = serde_json::from_slice(text).ok()?;
    let entries = note.entries.iter().take(MOST);
    let targets = entries.filter_map(|(resource, key)| target(catalog, resource, key)).collect();
    (note.version == VERSION).then_some(targets)
}

fn target(catalog: &Catalog, resource: &str, key: &str) -> Option<Target> {
    let State::Ready(resource, _) = catalog.resources.get(resource)? else { return None };
    resource.of_entry(key)
}
