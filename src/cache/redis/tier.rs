//! The tier in process and the filters, as reads meet them.

use std::sync::Arc;

use bytes::Bytes;

use super::RedisCache;
use super::filter::{Filter, FilterState};
use super::lane::Live;
use super::local::{Caught, Local};
use crate::cache::entry::{self, Entry};
use crate::cache::lane::now_ms;
use crate::cache::{CacheError, Lookup, Place};
use crate::catalog::Resource;
use crate::store;

/// A filter that is being built. It is given up when this is dropped.
pub struct Building {
    live: Arc<Live>,
    local: Arc<Local>,
    filter: Arc<Filter>,
    resource: String,
}

impl Building {
    /// There is this row, by its cache key.
    pub fn insert(&self, key: &str) {
        self.filter.insert(key);
    }

    /// Whether rows of this origin are those that the cache has caught up with.
    #[must_use]
    pub fn agrees(&self, origin: u64) -> bool {
        store::origin(&self.live.standing.control.load().origin) == origin
    }

    /// There are more keys than it was begun for.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.filter.is_full()
    }

    /// All rows were inserted: it answers from now on. False: changes were missed meanwhile.
    #[must_use]
    pub fn complete(self) -> bool {
        self.local.complete(&self.resource, &self.filter)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        self.local.filters.give_up(&self.resource, &self.filter);
    }
}

impl RedisCache {
    /// The in-process tier, where one may hold this entry. What depends on groups is not held: only the node knows their
    /// generations.
    pub(super) fn local(&self, place: &Place<'_>) -> Option<&Local> {
        self.local.as_deref().filter(|_| !place.local_ttl.is_zero() && place.groups.is_empty())
    }

    /// Looks into the in-process tier; else notes how far that is, for what will be read from the node.
    pub(super) fn look_local(&self, live: &Live, place: &Place<'_>) -> Result<Entry, Option<Caught>> {
        let Some(local) = self.local(place) else { return Err(None) };
        let noted = local.noted();
        let Some(deadlines) = local.deadlines() else { return Err(None) };
        let found = Self::tag(live, place, &[]).and_then(|tag| local.get(place.key, tag));
        match found {
            Some(entry) if self.shared.debts.verified(deadlines) == Ok(true) => Ok(entry),
            _ => Err(Some(noted)),
        }
    }

    /// Keeps what was read from the node in the in-process tier.
    pub(super) fn keep_local(&self, live: &Live, place: &Place<'_>, lookup: &Lookup, noted: Option<Caught>) {
        if let (Some(local), Lookup::Fresh(entry), Some(noted)) = (self.local(place), lookup, noted)
            && let Some(tag) = Self::tag(live, place, &[])
        {
            local.put(place.key, tag, entry, place.local_ttl, noted);
        }
    }

    /// What is not in the cache and has no row either: "not found", as the filter in this process knows it.
    pub(super) fn known_absent(&self, live: &Live, place: &Place<'_>, lookup: Lookup) -> Lookup {
        let (Lookup::Absent, true, Some(local)) = (&lookup, place.filtered, self.local.as_deref()) else {
            return lookup;
        };
        let Some(deadlines) = local.deadlines() else { return lookup };
        let tag = Self::tag(live, place, &[]);
        let lacks = tag.is_some_and(|tag| local.filters.lacks(place.resource, tag, place.key));
        if !lacks || self.shared.debts.verified(deadlines) != Ok(true) {
            return lookup;
        }
        let left = deadlines.trust.saturating_sub(now_ms()).max(1);
        Lookup::Fresh(Entry {
            payload: Bytes::new(),
            etag: entry::etag(&[]),
            negative: true,
            truncated: false,
            stored_at: 0,
            age_ms: 0,
            ttl_ms: i64::try_from(left).unwrap_or(i64::MAX),
            cost_us: 0,
            verified: true,
            local: true,
        })
    }

    /// The filter of a resource's rows, where it answers.
    #[must_use]
    pub fn filter(&self, resource: &Resource) -> Option<FilterState> {
        let live = self.lane.live.load_full()?;
        self.local.as_ref()?.filters.state(&resource.name, Self::row_tag(&live, resource))
    }

    /// Begins a filter of a resource's rows, for so many keys. All that there are must be inserted, as they are in the
    /// database from now on.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where it is not known now what is told of changes.
    pub async fn begin_filter(&self, resource: &Resource, capacity: u64) -> Result<Building, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        // What is served is registered then: rounds tell of its changes.
        self.shared.debts.verified(deadlines)?;
        let local = self.local.as_ref().ok_or(CacheError::Untrusted)?;
        let prefix = resource.row_prefix();
        let filter = Filter::new(prefix, Self::row_tag(&live, resource), capacity);
        let filter = local.begin(&resource.name, filter).ok_or(CacheError::Untrusted)?;
        Ok(Building { live, local: Arc::clone(local), filter, resource: resource.name.to_string() })
    }

    /// Whether the tier in this process holds an entry of this key.
    #[must_use]
    pub fn in_process(&self, key: &str) -> bool {
        self.local.as_ref().is_some_and(|local| local.holds(key))
    }

    /// Bytes held in this process; `None` without such a tier.
    #[must_use]
    pub fn local_bytes(&self) -> Option<u64> {
        self.local.as_ref().map(|local| local.bytes())
    }

    fn row_tag(live: &Live, resource: &Resource) -> u64 {
        let control = live.standing.control.load();
        entry::tag(resource.shape, control.epoch, control.generation(&resource.name), &[])
    }
}
