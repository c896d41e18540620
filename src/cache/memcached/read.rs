//! What is there, and the generations that it depends on: asked for together, and judged.

use super::MemcachedCache;
use super::lane::Live;
use super::steps::{self, wall_ms};
use super::wire::{Batch, If, Reply};
use crate::cache::entry::{self, Entry, Held, Marks};
use crate::cache::lane::Deadlines;
use crate::cache::{CacheError, Lookup, Place};

impl MemcachedCache {
    /// Values, and the generations of the groups that they share, in one round trip.
    pub(super) async fn get(
        &self,
        live: &Live,
        places: &[Place<'_>],
    ) -> Result<(Vec<Reply>, Vec<Option<u64>>), CacheError> {
        let groups = places.first().map_or(&[][..], |place| place.groups);
        let keys = places.iter().map(|place| place.key).chain(groups.iter().map(String::as_str));
        let batch = Batch::of_gets(keys.map(|key| self.shared.spelling.of(key)));
        let mut replies = self.within(live.connection.ask(batch)).await?;
        let groups = replies.split_off(places.len().min(replies.len())).iter().map(number).collect();
        Ok((replies, groups))
    }

    pub(super) async fn read_grouped(
        &self,
        live: &Live,
        deadlines: Deadlines,
        places: &[Place<'_>],
    ) -> Result<Vec<Lookup>, CacheError> {
        let (replies, groups) = self.get(live, places).await?;
        let verified = places.first().map_or(Ok(true), |first| self.shared.usable(deadlines, first))?;
        let groups: Option<Vec<u64>> = groups.into_iter().collect();
        let now = wall_ms();
        let max_entry = self.shared.max_entry;
        let judge = |(place, reply)| judge(live, place, groups.as_deref(), reply, (verified, now, max_entry));
        places.iter().zip(replies).map(judge).collect()
    }

    /// The generations of a place's groups, made where there are none: before the database is read for it.
    /// `None`: a writer holds one of them. He writes his hold before he drops the generation, and it is looked for after the
    /// generation was made, so one of the two is seen.
    pub(super) async fn groups(&self, live: &Live, place: &Place<'_>) -> Result<Option<Vec<u64>>, CacheError> {
        let mut batch = Batch::new();
        for group in place.groups {
            let key = self.shared.spelling.of(group);
            batch.set(&key, If::Absent, 0, fastrand::u64(1..).to_string().as_bytes());
            batch.get(&key);
            batch.get(&self.shared.spelling.hold_of(group));
        }
        let replies = live.connection.ask(batch).await?;
        let mut generations = Vec::with_capacity(place.groups.len());
        for (group, replies) in place.groups.iter().zip(replies.chunks(3)) {
            let [_, generation, holders] = replies else { return Err(CacheError::Refused) };
            if steps::is_held(group, holders)? {
                return Ok(None);
            }
            generations.push(number(generation).ok_or(CacheError::Refused)?);
        }
        Ok(Some(generations))
    }
}

/// `groups`: the generations of the groups that the place depends on; `None` where one was lost.
fn judge(
    live: &Live,
    place: &Place<'_>,
    groups: Option<&[u64]>,
    reply: Reply,
    (verified, now, max_entry): (bool, u64, usize),
) -> Result<Lookup, CacheError> {
    let (value, cas) = match reply {
        Reply::Missing => return Ok(Lookup::Absent),
        Reply::Value { value, cas, .. } => (value, cas),
        _ => return Err(CacheError::Refused),
    };
    Ok(match (entry::decode(place.key, &value, now, max_entry), groups) {
        (Some(Held::Valid { tag, entry, .. }), Some(groups)) if tag == live.tag(place, groups) => {
            let entry = Entry { verified, ..entry };
            if entry.ttl_ms > 0 { Lookup::Fresh(entry) } else { Lookup::Soft(entry) }
        }
        (Some(Held::Pending), _) => {
            let lock = Marks::of(place.key, &value).map_or(0, |marks| marks.lock);
            if live.locks.has_ended(place.key, cas, lock) { Lookup::Absent } else { Lookup::Pending }
        }
        _ => Lookup::Absent,
    })
}

/// A generation as it is kept.
pub(super) fn number(reply: &Reply) -> Option<u64> {
    match reply {
        Reply::Value { value, .. } => std::str::from_utf8(value).ok()?.parse().ok(),
        _ => None,
    }
}
