//! Leases: a plain `SET NX GET` where nothing is there, a script where something is.

use std::time::Duration;

use bytes::Bytes;
use redis::{Pipeline, Value};

use super::RedisCache;
use super::lane::Live;
use super::operations::millis;
use super::shared::Shared;
use crate::cache::entry::{self, Entry, Fence, Held};
use crate::cache::lane::Asked;
use crate::cache::{CacheError, Lease, Lookup, Place, Ticket};

impl RedisCache {
    /// Leases on entries that are this server's to keep.
    pub(super) async fn lease_here<'a>(
        &self,
        live: &Live,
        places: &[Place<'a>],
        groups: &[u64],
        (lock, verified): (Duration, bool),
        asked: &mut Asked<'a, Shared>,
    ) -> Result<Vec<Lease>, CacheError> {
        if !live.set_nx_get {
            return self.lease_by_script(live, places, groups, (lock, verified), asked).await;
        }
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(live, place, groups)?.ok_or(CacheError::Elsewhere)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag, place.shape);
            pipe.cmd("SET").arg(place.key).arg(pending).arg("NX").arg("GET").arg("PX").arg(millis(lock));
            asked.note(place.key, ticket.fence);
            tickets.push(ticket);
        }
        let mut leases = Vec::with_capacity(places.len());
        let mut unsettled = Vec::new();
        let replies = self.ask_all(live, &pipe).await?;
        for (index, ((place, ticket), reply)) in places.iter().zip(tickets).zip(replies).enumerate() {
            leases.push(match reply {
                Value::Nil => Lease::Fill { ticket, stale: None },
                Value::ServerError(error) => match self.refused(error.code()) {
                    CacheError::Elsewhere => Lease::Past,
                    refused => return Err(refused),
                },
                found => match self.judge(live, place, Some(groups), found, verified)? {
                    Lookup::Fresh(entry) if entry.stored_at != place.refreshes => Lease::Hit(entry),
                    Lookup::Pending => Lease::Wait { stale: None },
                    Lookup::Fresh(_) | Lookup::Soft(_) | Lookup::Absent => {
                        unsettled.push(index);
                        Lease::Past
                    }
                },
            });
        }
        if !unsettled.is_empty() {
            let places: Vec<Place<'a>> = unsettled.iter().map(|index| places[*index]).collect();
            let settled = self.lease_by_script(live, &places, groups, (lock, verified), asked).await?;
            for (index, lease) in unsettled.into_iter().zip(settled) {
                leases[index] = lease;
            }
        }
        Ok(leases)
    }

    /// The leases that a plain `SET NX GET` does not settle, by script, each with a fence of its own.
    pub(super) async fn lease_by_script<'a>(
        &self,
        live: &Live,
        places: &[Place<'a>],
        groups: &[u64],
        (lock, verified): (Duration, bool),
        asked: &mut Asked<'a, Shared>,
    ) -> Result<Vec<Lease>, CacheError> {
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(live, place, groups)?.ok_or(CacheError::Elsewhere)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag, place.shape);
            pipe.add_command(self.shared.scripts.lease(place.key, &pending, millis(lock), place.refreshes));
            asked.note(place.key, ticket.fence);
            tickets.push(ticket);
        }
        let replies = self.scripts(live, &pipe).await?;
        places
            .iter()
            .zip(tickets)
            .zip(replies)
            .map(|((place, ticket), reply)| self.verdict(live, place, ticket, reply, verified))
            .collect()
    }

    /// `None`: nothing may be filled here.
    fn ticket(live: &Live, place: &Place<'_>, groups: &[u64]) -> Result<Option<Ticket>, CacheError> {
        let fence = Fence::new().map_err(|_| CacheError::Refused)?;
        Ok(Self::tag(live, place, groups).map(|tag| Ticket { fence, tag, connection: live.standing.number }))
    }

    /// Reads the answer of the lease script.
    fn verdict(
        &self,
        live: &Live,
        place: &Place<'_>,
        ticket: Ticket,
        reply: Value,
        verified: bool,
    ) -> Result<Lease, CacheError> {
        let parts = match reply {
            Value::Array(parts) => parts,
            // It has left: the others were told apart already.
            Value::ServerError(_) => return Ok(Lease::Past),
            _ => return Err(CacheError::Refused),
        };
        let mut parts = parts.into_iter();
        let Some(Value::BulkString(word)) = parts.next() else { return Err(CacheError::Refused) };
        let held = match parts.next() {
            Some(Value::BulkString(value)) => {
                entry::decode(place.key, &Bytes::from(value), live.cache_now(), self.shared.max_entry)
            }
            _ => None,
        };
        let held: Option<Entry> = match held {
            Some(Held::Valid { entry, .. }) => Some(Entry { verified, ..entry }),
            _ => None,
        };
        match (word.as_slice(), held) {
            (b"fill", stale) => Ok(Lease::Fill { ticket, stale }),
            (b"wait", stale) => Ok(Lease::Wait { stale }),
            (b"hit", Some(entry)) => Ok(Lease::Hit(entry)),
            // A payload that can't be unpacked is no hit, and no reason to be refused.
            (b"past", _) | (b"hit", None) => Ok(Lease::Past),
            _ => Err(CacheError::Refused),
        }
    }
}
