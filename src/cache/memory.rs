//! The in-process memory: the same states and verdicts as the shared ones, bounded in bytes.
//!
//! Reads touch the map alone. Everything that compares a fence first takes the stripe of its key, so that
//! compare and set are one step; the map evicts what it likes, as any cache may.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use quick_cache::sync::{Cache as Map, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use tokio::time::Instant;

use super::entry::{self, Entry, Fence, HEADER, Held};
use super::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Place, Ticket};

const STRIPES: usize = 64;
/// What an entry costs beside its key and payload, roughly, in bytes.
const OVERHEAD: u64 = 160;

/// Entries in this process, shared by all clones.
#[derive(Clone)]
pub struct MemoryCache {
    inner: Arc<Inner>,
}

struct Inner {
    map: Map<String, Slot, Weight>,
    stripes: [Mutex<()>; STRIPES],
    generations: ArcSwap<HashMap<String, u64>>,
    started: Instant,
}

#[derive(Clone)]
struct Slot {
    /// The same bytes that a shared memory would hold.
    value: Bytes,
    /// Who may fill it: the fence of the lease or refresh under way.
    fence: Fence,
    /// The end of the lock (pending) or of the refresh (valid), in milliseconds.
    lock_ends: u64,
    /// When it is gone, in milliseconds.
    expires: u64,
}

#[derive(Clone)]
struct Weight;

impl Weighter<String, Slot> for Weight {
    fn weight(&self, key: &String, slot: &Slot) -> u64 {
        OVERHEAD + key.len() as u64 + slot.value.len() as u64
    }
}

impl std::fmt::Debug for MemoryCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("MemoryCache").field("bytes", &self.inner.map.weight()).finish_non_exhaustive()
    }
}

impl MemoryCache {
    /// An empty memory that holds at most `max_bytes`, and entries of up to `max_entry` bytes.
    #[must_use]
    pub fn new(max_bytes: usize, max_entry: usize) -> Self {
        // A shard takes nothing larger than itself: few enough shards that the largest entry still fits.
        let shards = (max_bytes / (max_entry + HEADER + 1024)).clamp(1, 16);
        let options = OptionsBuilder::new()
            .estimated_items_capacity((max_bytes / 1024).max(1))
            .weight_capacity(max_bytes as u64)
            .shards(shards)
            .build();
        let map = match options {
            Ok(options) => {
                Map::with_options(options, Weight, DefaultHashBuilder::default(), DefaultLifecycle::default())
            }
            // Only an option left out makes the builder fail; both are given.
            Err(_) => Map::with_weighter((max_bytes / 1024).max(1), max_bytes as u64, Weight),
        };
        let stripes = std::array::from_fn(|_| Mutex::new(()));
        let (generations, started) = (ArcSwap::default(), Instant::now());
        Self { inner: Arc::new(Inner { map, stripes, generations, started }) }
    }

    /// Bytes held now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.map.weight()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.inner.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn tag(&self, place: &Place<'_>) -> u64 {
        let generation = self.inner.generations.load().get(place.resource).copied().unwrap_or(0);
        entry::tag(place.shape, 0, generation)
    }

    /// One step at a time for each key.
    fn stripe(&self, key: &str) -> MutexGuard<'_, ()> {
        let index = usize::try_from(entry::check(key) % STRIPES as u64).unwrap_or(0);
        self.inner.stripes[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, key: &str, now: u64) -> Option<Slot> {
        self.inner.map.get(key).filter(|slot| slot.expires > now)
    }

    fn look(&self, place: &Place<'_>, slot: Option<&Slot>, now: u64) -> Lookup {
        let Some(slot) = slot else { return Lookup::Absent };
        match entry::decode(place.key, &slot.value, now) {
            Some(Held::Pending) => Lookup::Pending,
            Some(Held::Valid { tag, entry, .. }) if tag == self.tag(place) => {
                if entry.ttl_ms > 0 {
                    Lookup::Fresh(entry)
                } else {
                    Lookup::Soft(entry)
                }
            }
            _ => Lookup::Absent,
        }
    }

    fn lease_one(&self, place: &Place<'_>, lock: u64) -> Result<Lease, CacheError> {
        let ticket = Ticket { fence: Fence::new().map_err(|_| CacheError::Refused)?, tag: self.tag(place) };
        let _step = self.stripe(place.key);
        let now = self.now();
        let slot = self.slot(place.key, now);
        let ends = now.saturating_add(lock);
        let refresh = |entry: Entry, slot: Slot| {
            if slot.lock_ends > now {
                return Lease::Wait { stale: Some(entry) };
            }
            self.inner.map.insert(place.key.to_owned(), Slot { fence: ticket.fence, lock_ends: ends, ..slot });
            Lease::Fill { ticket, stale: Some(entry) }
        };
        Ok(match (self.look(place, slot.as_ref(), now), slot) {
            (Lookup::Fresh(entry), _) => Lease::Hit(entry),
            (Lookup::Pending, _) => Lease::Wait { stale: None },
            (Lookup::Soft(entry), Some(slot)) => refresh(entry, slot),
            (Lookup::Soft(_) | Lookup::Absent, _) => {
                let value = entry::pending(place.key, ticket.fence, ticket.tag).into();
                let slot = Slot { value, fence: ticket.fence, lock_ends: ends, expires: ends };
                self.inner.map.insert(place.key.to_owned(), slot);
                Lease::Fill { ticket, stale: None }
            }
        })
    }

    /// Changes the slot that a live ticket guards; `change` returns what stays.
    fn with_ticket(&self, key: &str, ticket: &Ticket, change: impl FnOnce(Slot, u64) -> Option<Slot>) -> Filled {
        let _step = self.stripe(key);
        let now = self.now();
        match self.slot(key, now) {
            None => Filled::Gone,
            Some(slot) if slot.fence != ticket.fence => Filled::Fenced,
            Some(slot) => {
                match change(slot, now) {
                    Some(slot) => self.inner.map.insert(key.to_owned(), slot),
                    None => drop(self.inner.map.remove(key)),
                }
                Filled::Stored
            }
        }
    }
}

/// No attempt ever leases with it: it is not random.
const NOBODY: Fence = Fence([0; 16]);

fn is_pending(slot: &Slot) -> bool {
    slot.value.get(2) == Some(&b'P')
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Cache for MemoryCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let now = self.now();
        Ok(self.look(&place, self.slot(place.key, now).as_ref(), now))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let now = self.now();
        Ok(places.iter().map(|place| self.look(place, self.slot(place.key, now).as_ref(), now)).collect())
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        places.iter().map(|place| self.lease_one(place, millis(lock))).collect()
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        for (place, ticket) in held {
            self.with_ticket(place.key, ticket, |slot, now| {
                let ends = now.saturating_add(millis(lock));
                let expires = if is_pending(&slot) { ends } else { slot.expires };
                Some(Slot { lock_ends: ends, expires, ..slot })
            });
        }
        Ok(())
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let store = |(place, ticket, fill): &(Place<'_>, Ticket, Fill)| {
            self.with_ticket(place.key, ticket, |_, now| {
                let life = millis(fill.ttl.saturating_add(fill.grace));
                Some(Slot {
                    value: entry::valid(place.key, ticket.tag, fill, now),
                    fence: NOBODY,
                    lock_ends: 0,
                    expires: now.saturating_add(life),
                })
            })
        };
        Ok(fills.iter().map(store).collect())
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        for (place, ticket) in held {
            self.with_ticket(place.key, ticket, |slot, _| {
                (!is_pending(&slot)).then_some(Slot { fence: NOBODY, lock_ends: 0, ..slot })
            });
        }
        Ok(())
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        for key in keys {
            let _step = self.stripe(key);
            self.inner.map.remove(*key);
        }
        Ok(())
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        self.inner.generations.rcu(|generations| {
            let mut generations = HashMap::clone(generations);
            generations.insert(resource.to_owned(), fastrand::u64(1..));
            generations
        });
        Ok(())
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let now = self.now();
        let slot = self.slot(place.key, now);
        let size = slot.as_ref().map_or(0, |slot| slot.value.len());
        let held = slot.and_then(|slot| entry::decode(place.key, &slot.value, now));
        Ok(Inspection::of(held, size, self.tag(&place)))
    }
}
