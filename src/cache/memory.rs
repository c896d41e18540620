//! The in-process memory: the same states and verdicts as the shared ones, bounded in bytes.
//!
//! Reads touch the map alone. Everything that compares a fence first takes the stripe of its key, so that
//! compare and set are one step; the map evicts what it likes, as any cache may. Over a database with other writers it
//! has a watermark like any other memory, and this process runs its rounds. Nothing is packed here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use quick_cache::sync::{Cache as Map, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use tokio::time::Instant;

use super::control::Control;
use super::entry::{self, Entry, Fence, HEADER, Held};
use super::{Cache, CacheError, Fill, Filled, Inspection, Lease, Looked, Lookup, Node, Place, Step, Ticket};
use crate::catalog::Mapping;
use crate::store;

const STRIPES: usize = 64;
/// What an entry costs beside its key and payload, roughly, in bytes.
const OVERHEAD: u64 = 160;
/// After a round that the database did not answer, for how long that is taken to be so, in milliseconds.
const AWAY: u64 = 3_000;

/// Entries in this process, shared by all clones.
#[derive(Clone)]
pub struct MemoryCache {
    inner: Arc<Inner>,
}

struct Inner {
    map: Map<String, Slot, Weight>,
    stripes: [Mutex<()>; STRIPES],
    generations: ArcSwap<Generations>,
    started: Instant,
    /// How far behind the database a hit may be, in milliseconds; `None`: nobody keeps this memory current.
    max_staleness: Option<u64>,
    /// Until when what is here is current enough, in milliseconds.
    trust: AtomicU64,
    /// Until then the database is taken not to answer.
    away: AtomicU64,
    control: Mutex<Control>,
}

#[derive(Clone, Default)]
struct Generations {
    epoch: u64,
    /// A fingerprint of the database that this memory caught up with.
    origin: u64,
    resources: HashMap<String, u64>,
    groups: HashMap<String, u64>,
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
    /// An empty memory that holds at most `max_bytes`, and entries of up to `max_entry` bytes. With `max_staleness` it is
    /// used only as far as somebody keeps it current ([`Self::node`]).
    #[must_use]
    pub fn new(max_bytes: usize, max_entry: usize, max_staleness: Option<Duration>) -> Self {
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
        let inner = Inner {
            map,
            stripes,
            generations: ArcSwap::default(),
            started: Instant::now(),
            max_staleness: max_staleness.map(millis),
            trust: AtomicU64::new(0),
            away: AtomicU64::new(0),
            control: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// What brings this memory up to date; `None` where nobody is to.
    #[must_use]
    pub fn node(&self) -> Option<MemoryNode> {
        self.inner.max_staleness.map(|_| MemoryNode { cache: self.clone() })
    }

    /// Declares what is cached here and which changes concern it. A round under way is void.
    pub fn declare(&self, mappings: HashMap<String, Mapping>) {
        let mut control = self.control();
        if control.mappings != mappings {
            control.mappings = mappings;
            control.number += 1;
        }
    }

    /// Whether it can be used now.
    ///
    /// # Errors
    ///
    /// [`CacheError::Untrusted`] where it is not known to be current.
    pub fn health(&self) -> Result<(), CacheError> {
        self.verified(self.deadline()).map(drop)
    }

    /// How far behind the database this memory is at most, in milliseconds; `None` where that is not known.
    #[must_use]
    pub fn staleness(&self) -> Option<u64> {
        let taken = self.control().taken;
        (self.inner.max_staleness.is_some() && taken > 0).then(|| self.now().saturating_sub(taken))
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.inner.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loaded before a value is looked up, compared when it is used.
    fn deadline(&self) -> u64 {
        self.inner.trust.load(Ordering::Acquire)
    }

    /// Whether what was found is known to be current; false where that can't be known because the database itself does
    /// not answer.
    fn verified(&self, deadline: u64) -> Result<bool, CacheError> {
        let now = self.now();
        if self.inner.max_staleness.is_none() || now <= deadline {
            Ok(true)
        } else if deadline > 0 && now < self.inner.away.load(Ordering::Acquire) {
            Ok(false)
        } else {
            Err(CacheError::Untrusted)
        }
    }

    fn renew(&self, change: impl Fn(&mut Generations)) {
        self.inner.generations.rcu(|generations| {
            let mut generations = Generations::clone(generations);
            change(&mut generations);
            generations
        });
    }

    /// Gives a group another generation, where it has one.
    fn renew_group(&self, key: &str) {
        if self.inner.generations.load().groups.contains_key(key) {
            let fresh = fastrand::u64(1..);
            self.renew(|generations| {
                generations.groups.insert(key.to_owned(), fresh);
            });
        }
    }

    /// Whether a writer holds a group that this place depends on.
    fn has_held_group(&self, place: &Place<'_>) -> bool {
        let now = self.now();
        let held = |group: &String| self.slot(group, now).is_some_and(|slot| !entry::holders(&slot.value).is_empty());
        place.groups.iter().any(held)
    }

    /// Makes the generations of a place's groups where there are none: before the database is read for it.
    fn open_groups(&self, place: &Place<'_>) {
        let known = self.inner.generations.load();
        if place.groups.iter().any(|group| !known.groups.contains_key(group)) {
            let fresh = fastrand::u64(1..);
            self.renew(|generations| {
                for group in place.groups {
                    generations.groups.entry(group.clone()).or_insert(fresh);
                }
            });
        }
    }

    /// Whether it holds an entry of this key.
    #[must_use]
    pub fn in_process(&self, key: &str) -> bool {
        let valid = |slot: &Slot| slot.expires > self.now() && slot.value.get(2) == Some(&b'V');
        self.inner.map.peek(key).is_some_and(|slot| valid(&slot))
    }

    /// Bytes held now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.map.weight()
    }

    /// Milliseconds of this memory's life, the first of which is 1.
    fn now(&self) -> u64 {
        u64::try_from(self.inner.started.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn tag(&self, place: &Place<'_>) -> u64 {
        let generations = self.inner.generations.load();
        let generation = generations.resources.get(place.resource).copied().unwrap_or(0);
        let groups: Vec<u64> =
            place.groups.iter().map(|group| generations.groups.get(group).copied().unwrap_or(0)).collect();
        entry::tag(place.shape, generations.epoch, generation, &groups)
    }

    /// One step at a time for each key.
    fn stripe(&self, key: &str) -> MutexGuard<'_, ()> {
        let index = usize::try_from(entry::check(key) % STRIPES as u64).unwrap_or(0);
        self.inner.stripes[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, key: &str, now: u64) -> Option<Slot> {
        self.inner.map.get(key).filter(|slot| slot.expires > now)
    }

    fn look(&self, place: &Place<'_>, slot: Option<&Slot>, now: u64, verified: bool) -> Lookup {
        let Some(slot) = slot else { return Lookup::Absent };
        match entry::decode(place.key, &slot.value, now, 0) {
            Some(Held::Pending) => Lookup::Pending,
            Some(Held::Valid { tag, entry, .. }) if tag == self.tag(place) => {
                let entry = Entry { verified, ..entry };
                if entry.ttl_ms > 0 { Lookup::Fresh(entry) } else { Lookup::Soft(entry) }
            }
            _ => Lookup::Absent,
        }
    }

    fn lease_one(&self, place: &Place<'_>, lock: u64, verified: bool) -> Result<Lease, CacheError> {
        self.open_groups(place);
        let ticket =
            Ticket { fence: Fence::new().map_err(|_| CacheError::Refused)?, tag: self.tag(place), connection: 0 };
        let _step = self.stripe(place.key);
        let now = self.now();
        let slot = self.slot(place.key, now);
        let ends = now.saturating_add(lock);
        let refresh = |entry: Entry, slot: Slot| {
            if slot.lock_ends > now {
                return Lease::Wait { stale: Some(entry) };
            }
            self.inner.map.insert(
                place.key.to_owned(),
                Slot { fence: ticket.fence, lock_ends: ends, expires: slot.expires.max(ends), ..slot },
            );
            Lease::Fill { ticket, stale: Some(entry) }
        };
        Ok(match (self.look(place, slot.as_ref(), now, verified), slot) {
            (Lookup::Fresh(entry), _) if entry.stored_at != place.refreshes => Lease::Hit(entry),
            (Lookup::Pending, _) => Lease::Wait { stale: None },
            (Lookup::Fresh(entry) | Lookup::Soft(entry), Some(slot)) => refresh(entry, slot),
            // Only its holder ends it, or time.
            (Lookup::Absent, Some(slot)) if is_reserved(&slot) => Lease::Past,
            (Lookup::Fresh(_) | Lookup::Soft(_) | Lookup::Absent, _) => {
                let value = entry::pending(place.key, ticket.fence, ticket.tag, place.shape).into();
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

fn is_reserved(slot: &Slot) -> bool {
    slot.value.get(2) == Some(&b'H')
}

fn is_pending(slot: &Slot) -> bool {
    slot.value.get(2) == Some(&b'P')
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Cache for MemoryCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let (now, deadline) = (self.now(), self.deadline());
        let slot = self.slot(place.key, now);
        Ok(self.look(&place, slot.as_ref(), now, self.verified(deadline)?))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let (now, deadline) = (self.now(), self.deadline());
        let slots: Vec<Option<Slot>> = places.iter().map(|place| self.slot(place.key, now)).collect();
        let verified = self.verified(deadline)?;
        Ok(places.iter().zip(slots).map(|(place, slot)| self.look(place, slot.as_ref(), now, verified)).collect())
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let verified = self.verified(self.deadline())?;
        let lease = |place: &Place<'_>| {
            if self.has_held_group(place) { Ok(Lease::Past) } else { self.lease_one(place, millis(lock), verified) }
        };
        places.iter().map(lease).collect()
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        for (place, ticket) in held {
            self.with_ticket(place.key, ticket, |slot, now| {
                let ends = now.saturating_add(millis(lock));
                let expires = if is_pending(&slot) { ends } else { slot.expires.max(ends) };
                Some(Slot { lock_ends: ends, expires, ..slot })
            });
        }
        Ok(())
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let caught_up_with = self.inner.max_staleness.map(|_| self.inner.generations.load().origin);
        let store = |(place, ticket, fill): &(Place<'_>, Ticket, Fill)| {
            if caught_up_with.is_some_and(|origin| origin != fill.origin) {
                // Read from another database, or from a former life of this one.
                return Filled::Fenced;
            }
            let filled = self.with_ticket(place.key, ticket, |_, now| {
                let life = millis(fill.ttl.saturating_add(fill.grace));
                Some(Slot {
                    value: entry::valid(place.key, ticket.tag, place.shape, fill, now, None),
                    fence: NOBODY,
                    lock_ends: 0,
                    expires: now.saturating_add(life),
                })
            });
            // The entry's own fence says nothing of a group that was dropped, or a resource that was purged, since the
            // lease: what is stored carries their old generations, and nobody may share it.
            if filled == Filled::Stored && self.tag(place) != ticket.tag { Filled::Fenced } else { filled }
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
            self.renew_group(key);
        }
        Ok(())
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        for key in keys {
            let _step = self.stripe(key);
            let expires = self.now().saturating_add(millis(time));
            let held = self.slot(key, self.now());
            let mut owners = held.as_ref().map_or_else(Vec::new, |slot| entry::holders(&slot.value));
            owners.retain(|other| *other != owner);
            let others = held.filter(|_| !owners.is_empty()).map_or(0, |slot| slot.expires);
            owners.push(owner);
            let expires = expires.max(others);
            let value = entry::reserved(key, &owners).into();
            self.inner.map.insert((*key).to_owned(), Slot { value, fence: NOBODY, lock_ends: expires, expires });
            // What depends on a group that is held is good for nothing.
            self.renew_group(key);
        }
        Ok(())
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        for key in keys {
            let step = self.stripe(key);
            let slot = self.slot(key, self.now());
            let mut owners = slot.as_ref().map_or_else(Vec::new, |slot| entry::holders(&slot.value));
            owners.retain(|other| Some(*other) != owner);
            match slot {
                Some(slot) if !owners.is_empty() => {
                    let value = entry::reserved(key, &owners).into();
                    self.inner.map.insert((*key).to_owned(), Slot { value, ..slot });
                }
                _ => {
                    self.inner.map.remove(*key);
                    self.renew_group(key);
                }
            }
            drop(step);
        }
        Ok(())
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.invalidate(keys).await
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let fresh = fastrand::u64(1..);
        self.renew(|generations| {
            generations.resources.insert(resource.to_owned(), fresh);
        });
        Ok(())
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let now = self.now();
        let slot = self.slot(place.key, now);
        let size = slot.as_ref().map_or(0, |slot| slot.value.len());
        let held = slot.and_then(|slot| entry::decode(place.key, &slot.value, now, 0));
        Ok(Inspection::of(held, size, self.tag(&place)))
    }
}

/// The in-process memory as those who keep it current see it.
#[derive(Debug)]
pub struct MemoryNode {
    cache: MemoryCache,
}

impl Node for MemoryNode {
    async fn look(&self) -> Result<Looked, CacheError> {
        // One clock for all: the look is over when it begins.
        let now = self.cache.now().max(1);
        Ok(Looked { control: self.cache.control().clone(), now, ..Looked::default() })
    }

    async fn advance(&self, looked: &Looked, step: &Step) -> Result<bool, CacheError> {
        let keys: Vec<&str> = step.drop.iter().map(String::as_str).collect();
        self.cache.invalidate(&keys).await?;
        let spared: Vec<&str> = step.spare.iter().map(String::as_str).collect();
        self.cache.invalidate_unless_held(&spared, None).await?;
        let mut control = self.cache.control();
        if control.number != looked.control.number {
            return Ok(false);
        }
        let (epoch, origin) = (fastrand::u64(1..), store::origin(&step.origin));
        self.cache.renew(|generations| {
            generations.origin = origin;
            if step.anew {
                generations.epoch = epoch;
            }
            for resource in &step.renew {
                generations.resources.insert(resource.clone(), epoch);
            }
        });
        *control = Control {
            epoch: if step.anew { epoch } else { control.epoch },
            number: control.number + 1,
            origin: step.origin.clone(),
            mappings: std::mem::take(&mut control.mappings),
            point: step.point.clone(),
            taken: looked.now,
            ..Control::default()
        };
        let longest = self.cache.inner.max_staleness.unwrap_or(0);
        self.cache.inner.trust.store(looked.now.saturating_add(longest), Ordering::Release);
        Ok(true)
    }

    fn database_answers(&self, yes: bool) {
        let until = if yes { 0 } else { self.cache.now() + AWAY };
        self.cache.inner.away.store(until, Ordering::Release);
    }
}
