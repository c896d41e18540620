//! The in-process tier: a memory in front of a memory, kept right by the numbered batches of what was invalidated there.
//!
//! It has caught up with some batch. What is put into it was read from the node after that number was noted, and is
//! refused if the number has moved meanwhile: so a reader that paused can't bring back what a batch has just removed.
//! A batch that is missing, another life of the node, or a new connection: everything goes; but a new connection leaves the
//! filters, if no batch is missing.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use deadpool_redis::Connection;
use quick_cache::Weighter;
use quick_cache::sync::Cache as Map;
use redis::aio::MultiplexedConnection;
use xxhash_rust::xxh3::xxh3_64;

use super::filter::{Filter, Filters};
use super::lane::{Live, looked};
use super::shared::Shared;
use crate::cache::entry::Entry;
use crate::cache::lane::{Deadlines, now_ms};

/// Between two looks for batches.
const FOLLOW: Duration = Duration::from_millis(50);
/// So many batches are caught up with; after a longer absence it is quicker to begin anew.
const GAP: u64 = 64;
/// What an entry costs beside its key and payload, roughly, in bytes.
const OVERHEAD: u64 = 200;

/// The in-process tier in front of one node.
pub(super) struct Local {
    map: Map<String, Slot, Weight>,
    /// What it has caught up with; every change of it makes insertions under way void.
    caught: RwLock<Caught>,
    /// The connection that follows the node; its deadline is this tier's.
    live: ArcSwapOption<Live>,
    /// What rows there are: kept right by the same batches.
    pub(super) filters: Filters,
}

/// A moment in the life of the tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Caught {
    /// The last batch that was applied; `None`: nobody follows yet.
    batch: Option<u64>,
    /// A fingerprint of the life of the node that numbered it.
    life: u64,
    /// Counts what this process itself forgot.
    own: u64,
}

#[derive(Clone)]
struct Slot {
    entry: Entry,
    tag: u64,
    /// When it was put here, and until when it may be used, in milliseconds of this process's clock.
    since: u64,
    until: u64,
}

#[derive(Clone)]
struct Weight;

impl Weighter<String, Slot> for Weight {
    fn weight(&self, key: &String, slot: &Slot) -> u64 {
        OVERHEAD + key.len() as u64 + slot.entry.payload.len() as u64
    }
}

impl Local {
    /// An empty tier of at most `max_bytes`, which follows its node from the current runtime.
    pub(super) fn new(shared: &Arc<Shared>, max_bytes: usize) -> Arc<Self> {
        let local = Arc::new(Self {
            map: Map::with_weighter((max_bytes / 1024).max(16), max_bytes as u64, Weight),
            caught: RwLock::default(),
            live: ArcSwapOption::empty(),
            filters: Filters::default(),
        });
        tokio::spawn(follow(Arc::clone(shared), Arc::downgrade(&local)));
        local
    }

    /// How far this tier is: noted before a value is read that may be put here.
    pub(super) fn noted(&self) -> Caught {
        *self.caught.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when what is here is current; loaded before a value is looked up.
    pub(super) fn deadlines(&self) -> Option<Deadlines> {
        self.live.load().as_ref().map(|live| live.standing.deadlines())
    }

    /// The entry, as old as it is now.
    pub(super) fn get(&self, key: &str, tag: u64) -> Option<Entry> {
        let slot = self.map.get(key).filter(|slot| slot.tag == tag)?;
        let now = now_ms();
        if now >= slot.until {
            return None;
        }
        let passed = now - slot.since;
        let mut entry = slot.entry;
        entry.age_ms += passed;
        entry.ttl_ms = entry.ttl_ms.saturating_sub_unsigned(passed);
        Some(entry)
    }

    /// Whether there is an entry whose time is not over.
    pub(super) fn holds(&self, key: &str) -> bool {
        self.map.peek(key).is_some_and(|slot| now_ms() < slot.until)
    }

    /// Keeps an entry that was read from the node after `noted`, for `ttl` at most.
    pub(super) fn put(&self, key: &str, tag: u64, entry: &Entry, ttl: Duration, noted: Caught) {
        let Ok(left) = u64::try_from(entry.ttl_ms) else { return };
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).min(left);
        let since = now_ms();
        let slot = Slot { entry: Entry { local: true, ..entry.clone() }, tag, since, until: since + ttl };
        let caught = self.caught.read().unwrap_or_else(PoisonError::into_inner);
        if noted.batch.is_some() && *caught == noted {
            self.map.insert(key.to_owned(), slot);
        }
    }

    /// Forgets what this process itself has changed.
    pub(super) fn forget(&self, keys: &[&str]) {
        let mut caught = self.caught.write().unwrap_or_else(PoisonError::into_inner);
        caught.own += 1;
        for key in keys {
            self.map.remove(*key);
        }
        self.filters.insert(keys);
    }

    /// Begins a filter: it takes the keys of all batches after this moment. `None`: nobody has followed the node yet.
    pub(super) fn begin(&self, resource: &str, filter: Filter) -> Option<Arc<Filter>> {
        let caught = self.caught.write().unwrap_or_else(PoisonError::into_inner);
        caught.batch?;
        let filter = Arc::new(filter);
        self.filters.register(resource, Arc::clone(&filter));
        Some(filter)
    }

    /// A filter has all keys that there were when it was begun; false: it missed something since.
    pub(super) fn complete(&self, resource: &str, filter: &Arc<Filter>) -> bool {
        let _caught = self.caught.write().unwrap_or_else(PoisonError::into_inner);
        self.filters.complete(resource, filter)
    }

    /// Lets go of what the node holds a later value of. What is here is no less right, but it ends sooner.
    pub(super) fn outdated(&self, key: &str) {
        self.map.remove(key);
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.map.weight()
    }

    /// Nobody follows the node now: what is being put here is void, and nothing is used. Where it was is kept: a filter is
    /// dear, and right again once it was told of every batch since, in the same life of the node.
    fn lost(&self) {
        let mut caught = self.caught.write().unwrap_or_else(PoisonError::into_inner);
        caught.own += 1;
        self.map.clear();
    }

    /// Moves on to a batch, forgetting those keys; `None`: everything.
    fn advance(&self, batch: u64, life: u64, keys: Option<&[String]>) {
        let mut caught = self.caught.write().unwrap_or_else(PoisonError::into_inner);
        (caught.batch, caught.life) = (Some(batch), life);
        if let Some(keys) = keys {
            for key in keys {
                self.map.remove(key);
            }
            self.filters.insert(keys);
        } else {
            self.map.clear();
            self.filters.clear();
        }
    }
}

/// Follows the node for as long as the tier is there.
async fn follow(shared: Arc<Shared>, local: Weak<Local>) {
    loop {
        if let Ok(made) = shared.connect().await {
            let live = Arc::new(Live::new(&made));
            loop {
                let Some(local) = local.upgrade() else { return };
                if let Err(error) = step(&shared, &live, &local).await {
                    tracing::debug!(cache = shared.address, %error, "the in-process tier lost its node");
                    local.live.store(None);
                    local.lost();
                    break;
                }
                if local.live.load().is_none() {
                    local.live.store(Some(Arc::clone(&live)));
                }
                drop(local);
                tokio::time::sleep(FOLLOW).await;
            }
            drop(Connection::take(made.connection));
        }
        if local.strong_count() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200).mul_f64(0.5 + fastrand::f64())).await;
    }
}

/// One look: first everything that was invalidated up to it, then its deadline.
async fn step(shared: &Shared, live: &Live, local: &Local) -> anyhow::Result<()> {
    let mut conn = live.conn.clone();
    let seen = looked(shared, live).await?;
    let batch = seen.control.batch;
    let text = format!("{} {} {}", seen.control.epoch, seen.ids.run, seen.ids.replication);
    let life = xxh3_64(text.as_bytes());
    let noted = local.noted();
    match noted.batch.filter(|_| noted.life == life) {
        Some(caught) if caught == batch => {}
        Some(caught) if caught < batch && batch - caught <= GAP => {
            let batches = batches(shared, &mut conn, caught + 1, batch).await?;
            local.advance(batch, life, batches.as_deref());
        }
        _ => local.advance(batch, life, None),
    }
    live.learn(shared, seen);
    Ok(())
}

/// The keys of these batches; `None` where one is missing, or says "anything".
async fn batches(
    shared: &Shared,
    conn: &mut MultiplexedConnection,
    first: u64,
    last: u64,
) -> redis::RedisResult<Option<Vec<String>>> {
    let mut range = redis::cmd("XRANGE");
    range.arg(&shared.stream_key).arg(format!("{first}-0")).arg(format!("{last}-0"));
    let found: Vec<(String, HashMap<String, String>)> = range.query_async(conn).await?;
    let mut keys = Vec::new();
    for ((id, fields), expected) in found.iter().zip(first..=last) {
        let more = fields.get("keys").and_then(|keys| serde_json::from_str::<Vec<String>>(keys).ok());
        let Some(more) = more.filter(|_| *id == format!("{expected}-0")) else { return Ok(None) };
        keys.extend(more);
    }
    Ok((found.len() as u64 == last - first + 1).then_some(keys))
}
