//! What is read, and whether it is of any use.

use bytes::Bytes;
use redis::{Pipeline, Value};

use super::RedisCache;
use super::lane::Live;
use crate::cache::entry::{self, Entry, Held};
use crate::cache::lane::Deadlines;
use crate::cache::{CacheError, Lookup, Place};

impl RedisCache {
    /// What an entry must carry to be of use; `None`: nothing here is, since the key may have been another node's.
    pub(super) fn tag(live: &Live, place: &Place<'_>, groups: &[u64]) -> Option<u64> {
        let control = live.standing.control.load();
        let tag = || entry::tag(place.shape, control.epoch, control.generation(place.resource), groups);
        control.holds(place.key).then(tag)
    }

    /// `groups`: the generations of the groups that the place depends on; `None` where one was lost.
    pub(super) fn judge(
        &self,
        live: &Live,
        place: &Place<'_>,
        groups: Option<&[u64]>,
        value: Value,
        verified: bool,
    ) -> Result<Lookup, CacheError> {
        let value = match value {
            Value::Nil => return Ok(Lookup::Absent),
            Value::BulkString(bytes) => Bytes::from(bytes),
            // One key that has left leaves the others of a batch alone.
            Value::ServerError(error) if matches!(error.code(), "MOVED" | "ASK") => return Ok(Lookup::Absent),
            _ => return Err(CacheError::Refused),
        };
        let held = entry::decode(place.key, &value, live.cache_now(), self.shared.max_entry);
        Ok(match (held, groups) {
            (Some(Held::Valid { tag, entry, .. }), Some(groups)) if Some(tag) == Self::tag(live, place, groups) => {
                let entry = Entry { verified, ..entry };
                if entry.ttl_ms > 0 { Lookup::Fresh(entry) } else { Lookup::Soft(entry) }
            }
            (Some(Held::Pending), _) => Lookup::Pending,
            _ => Lookup::Absent,
        })
    }

    /// Entries, and the generations of the groups that they share, in one round trip.
    pub(super) async fn read_grouped(
        &self,
        live: &Live,
        deadlines: Deadlines,
        places: &[Place<'_>],
    ) -> Result<Vec<Lookup>, CacheError> {
        let groups = places.first().map_or(&[][..], |place| place.groups);
        let mut pipe = Pipeline::with_capacity(places.len() + groups.len());
        for place in places {
            pipe.cmd("GET").arg(place.key);
        }
        for group in groups {
            pipe.cmd("GET").arg(&*self.shared.spell(group));
        }
        let mut values = self.ask_all(live, &pipe).await?;
        let verified = places.first().map_or(Ok(true), |first| self.shared.usable(deadlines, first))?;
        let groups: Option<Vec<u64>> = values.drain(places.len()..).map(|reply| number(&reply)).collect();
        let judge = |(place, value)| self.judge(live, place, groups.as_deref(), value, verified);
        places.iter().zip(values).map(judge).collect()
    }

    /// The generations of a place's groups, made where there are none: before the database is read for it.
    pub(super) async fn groups(&self, live: &Live, place: &Place<'_>) -> Result<Vec<u64>, CacheError> {
        if place.groups.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = Pipeline::with_capacity(place.groups.len() * 2);
        for group in place.groups {
            let group = &*self.shared.spell(group);
            pipe.cmd("SET").arg(group).arg(fastrand::u64(1..)).arg("NX").cmd("GET").arg(group);
        }
        let replies = self.ask_all(live, &pipe).await?;
        replies.chunks(2).map(|pair| pair.last().and_then(number).ok_or(CacheError::Refused)).collect()
    }
}

/// A generation as it is kept.
pub(super) fn number(reply: &Value) -> Option<u64> {
    match reply {
        Value::BulkString(text) => std::str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    }
}
