//! The operations of the trait.

use std::time::{Duration, Instant};

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};

use super::RedisCache;
use super::judge::number;
use super::unlink::{self, NotHere};
use crate::cache::control::field;
use crate::cache::entry::{self, Fence};
use crate::cache::lane::{Asked, Wait};
use crate::cache::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Place, Ticket};
use crate::store;

impl Cache for RedisCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        if !place.groups.is_empty() {
            let mut found = self.read_grouped(&live, deadlines, &[place]).await?;
            return Ok(found.pop().unwrap_or(Lookup::Absent));
        }
        let noted = match self.look_local(&live, &place) {
            Ok(entry) => return Ok(Lookup::Fresh(entry)),
            Err(noted) => noted,
        };
        let mut get = Cmd::with_capacity(2, 16 + place.key.len());
        get.arg("GET").arg(place.key);
        let value = self.ask(&live, get).await?;
        let verified = self.shared.usable(deadlines, &place)?;
        let lookup = self.judge(&live, &place, Some(&[]), value, verified)?;
        self.keep_local(&live, &place, &lookup, noted);
        Ok(self.known_absent(&live, &place, lookup))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        if places.iter().all(|place| self.local(place).is_none()) {
            let found = self.read_grouped(&live, deadlines, places).await?;
            let all = places.iter().zip(found);
            return Ok(all.map(|(place, lookup)| self.known_absent(&live, place, lookup)).collect());
        }
        let mut lookups = Vec::with_capacity(places.len());
        let mut rest = Vec::new();
        for (index, place) in places.iter().enumerate() {
            match self.look_local(&live, place) {
                Ok(entry) => lookups.push(Lookup::Fresh(entry)),
                Err(noted) => {
                    lookups.push(Lookup::Absent);
                    rest.push((index, noted));
                }
            }
        }
        if rest.is_empty() {
            return Ok(lookups);
        }
        let asked: Vec<Place<'_>> = rest.iter().map(|(index, _)| places[*index]).collect();
        let found = self.read_grouped(&live, deadlines, &asked).await?;
        for ((index, noted), lookup) in rest.into_iter().zip(found) {
            self.keep_local(&live, &places[index], &lookup, noted);
            lookups[index] = self.known_absent(&live, &places[index], lookup);
        }
        Ok(lookups)
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        // A lease on a memory that can't be trusted would only make others wait.
        let Some(first) = places.first() else { return Ok(Vec::new()) };
        let verified = self.shared.usable(deadlines, first)?;
        let groups = self.groups(&live, first).await?;
        let control = live.standing.control.load_full();
        let (indices, here): (Vec<usize>, Vec<Place<'_>>) =
            places.iter().copied().enumerate().filter(|(_, place)| control.holds(place.key)).unzip();
        let mut leases = vec![Lease::Past; places.len()];
        let mut asked = Asked::new(&self.shared, &live);
        let given = self.lease_here(&live, &here, &groups, (lock, verified), &mut asked).await?;
        for (index, lease) in indices.into_iter().zip(given) {
            leases[index] = lease;
        }
        if let Some(local) = &self.local {
            for (place, _) in places.iter().zip(&leases).filter(|(_, lease)| matches!(lease, Lease::Hit(_))) {
                local.outdated(place.key);
            }
        }
        let leases = self.shared.still(leases, deadlines, first)?;
        asked.settled();
        Ok(leases)
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let mut pipe = Pipeline::with_capacity(held.len());
        // What another connection gave will not be filled: nobody is to wait for it.
        for (place, ticket) in held.iter().filter(|(_, ticket)| ticket.connection == live.standing.number) {
            pipe.add_command(self.shared.scripts.renew(place.key, &ticket.fence.0, millis(lock)));
        }
        self.scripts(&live, &pipe).await.map(drop)
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let live = self.lane.live().await?;
        let deadlines = live.standing.deadlines();
        let now = live.cache_now();
        if fills.iter().any(|(_, ticket, _)| ticket.connection != live.standing.number) {
            // Another memory may be at the other end by now, whose past the fence has come back from: what is stored
            // there proves nothing. If it is the same, nobody need wait for the lock's end.
            let held: Vec<_> = fills.iter().map(|(place, ticket, _)| (*place, *ticket)).collect();
            self.release(&held).await?;
            return Ok(vec![Filled::Gone; fills.len()]);
        }
        let caught_up_with = self.shared.max_staleness.map(|_| store::origin(&live.standing.control.load().origin));
        let groups = fills.first().map_or(&[][..], |(place, ..)| place.groups);
        let mut pipe = Pipeline::with_capacity(groups.len() + fills.len());
        for group in groups {
            pipe.cmd("GET").arg(&*self.shared.spell(group));
        }
        for (place, ticket, fill) in fills {
            if caught_up_with.is_some_and(|origin| origin != fill.origin) {
                // Read from another database, or from a former life of this one.
                pipe.add_command(self.shared.scripts.release(place.key, &ticket.fence.0));
                continue;
            }
            let value = entry::valid(place.key, ticket.tag, place.shape, fill, now, self.shared.pack_above);
            let life = millis(fill.ttl.saturating_add(fill.grace));
            pipe.add_command(self.shared.scripts.fill(place.key, &ticket.fence.0, &value, life));
        }
        let mut replies = self.scripts(&live, &pipe).await?;
        let filled = replies.split_off(groups.len());
        let groups: Option<Vec<u64>> = replies.iter().map(number).collect();
        let read = |((place, ticket, _), reply): (&(Place<'_>, Ticket, Fill), Value)| match reply {
            // The entry's own fence says nothing of a group that was dropped, or a resource that was purged, since the
            // lease: what is stored carries their old generations, and nobody may share it.
            _ if groups.as_ref().and_then(|groups| Self::tag(&live, place, groups)) != Some(ticket.tag) => {
                Ok(Filled::Fenced)
            }
            Value::BulkString(word) if word == b"stored" => Ok(Filled::Stored),
            Value::BulkString(word) if word == b"fenced" => Ok(Filled::Fenced),
            Value::BulkString(word) if word == b"gone" => Ok(Filled::Gone),
            // Released.
            Value::Int(_) => Ok(Filled::Fenced),
            // The fence has left, with the entry.
            Value::ServerError(_) => Ok(Filled::Gone),
            _ => Err(CacheError::Refused),
        };
        let verdicts: Result<Vec<Filled>, CacheError> = fills.iter().zip(filled).map(read).collect();
        if let Some(local) = &self.local {
            for (place, ..) in fills {
                local.outdated(place.key);
            }
        }
        // "Stored" means that nothing was invalidated meanwhile; while this process owes invalidations that is not known.
        if self.shared.debts.verified(deadlines)? { verdicts } else { Err(CacheError::Untrusted) }
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let mut pipe = Pipeline::with_capacity(held.len());
        for (place, ticket) in held {
            pipe.add_command(self.shared.scripts.release(place.key, &ticket.fence.0));
        }
        self.scripts(&live, &pipe).await.map(drop)
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        if let Some(local) = &self.local {
            local.forget(keys);
        }
        if keys.is_empty() {
            return Ok(());
        }
        let (live, mut wait) = (self.lane.live().await, Wait::new(self.shared.timeout));
        let outcome = match &live {
            Ok(live) => unlink::unlink(&self.shared, &mut live.conn.clone(), keys, &mut wait).await,
            Err(_) => Ok(NotHere::default()),
        };
        self.told(live, outcome, (keys, false), wait)
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        // A hold in a memory that nobody reads from holds nobody back.
        if !self.shared.debts.verified(live.standing.deadlines())? {
            return Err(CacheError::Untrusted);
        }
        let mut pipe = Pipeline::with_capacity(keys.len());
        for key in keys {
            let held = entry::reserved(key, &[owner]);
            pipe.add_command(self.shared.scripts.hold(&self.shared.spell(key), &held, millis(time)));
        }
        let replies = self.scripts(&live, &pipe).await?;
        let elsewhere = replies.iter().any(|reply| matches!(reply, Value::ServerError(_)));
        if elsewhere { Err(CacheError::Elsewhere) } else { Ok(()) }
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        if keys.is_empty() {
            return Ok(());
        }
        let (live, mut wait) = (self.lane.live().await, Wait::new(self.shared.timeout));
        let owner: &[u8] = owner.as_ref().map_or(&[], |owner| &owner.0);
        let outcome = match &live {
            Ok(live) => unlink::spare(&self.shared, &mut live.conn.clone(), keys, owner, &mut wait).await,
            Err(_) => Ok(NotHere::default()),
        };
        self.told(live, outcome, (keys, true), wait)
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.invalidate(keys).await?;
        if self.shared.max_staleness.is_none() {
            return Ok(());
        }
        let live = self.lane.live().await?;
        let batch = serde_json::to_string(keys).map_err(|_| CacheError::Refused)?;
        let mut pipe = Pipeline::with_capacity(1);
        pipe.add_command(self.shared.scripts.tell([&self.shared.control_key, &self.shared.stream_key], &batch));
        self.scripts(&live, &pipe).await.map(drop)
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let mut cmd = redis::cmd("HSET");
        cmd.arg(&self.shared.control_key).arg(field::generation(resource)).arg(fastrand::u64(1..));
        self.ask(&live, cmd).await?;
        // This process knows the new generation before it answers; the others at their next look.
        self.shared.debts.mistrust();
        Ok(())
    }

    fn answered_since(&self, _: &str, moment: Instant) -> bool {
        self.lane.answered_since(moment)
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let live = self.lane.live().await?;
        let mut pipe = Pipeline::with_capacity(1 + place.groups.len());
        pipe.cmd("GET").arg(place.key);
        for group in place.groups {
            pipe.cmd("GET").arg(&*self.shared.spell(group));
        }
        let mut replies = self.ask_all(&live, &pipe).await?.into_iter();
        let value = replies.next().unwrap_or(Value::Nil);
        let groups: Vec<u64> = replies.map(|reply| number(&reply).unwrap_or(0)).collect();
        let size = if let Value::BulkString(bytes) = &value { bytes.len() } else { 0 };
        let held = match value {
            Value::BulkString(bytes) => {
                entry::decode(place.key, &Bytes::from(bytes), live.cache_now(), self.shared.max_entry)
            }
            _ => None,
        };
        // No tag is zero.
        Ok(Inspection::of(held, size, Self::tag(&live, &place, &groups).unwrap_or(0)))
    }
}

/// Whole milliseconds, at least one: Redis refuses a life of zero.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 50)
}
