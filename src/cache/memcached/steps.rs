//! What takes more than one command: look at what is there, decide, and write only if it is there still. The decisions are
//! those of Redis's scripts.

use std::time::Duration;

use bytes::Bytes;

use super::connection::Connection;
use super::lane::Live;
use super::shared::Shared;
use super::wire::{Batch, If, Reply, life};
use crate::cache::entry::{self, Entry, Fence, Held, Marks};
use crate::cache::lane::{Asked, now_ms};
use crate::cache::{CacheError, Lease, Place, Ticket};

/// So often something is tried anew because others changed what was there.
const TRIES: usize = 16;
/// A value of another shape that is younger is left alone, in milliseconds: while a rolling update runs two shapes, they
/// must not fight over a hot key.
const YOUNG: u64 = 1_000;
/// No attempt ever leases with it: it is not random.
pub(super) const NOBODY: Fence = Fence([0; 16]);

/// Milliseconds since 1970 by this machine's clock. TTLs are counted in them, and nothing that must be exact.
pub(super) fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// What is there, each with its number and the life it has left. Zero of a life that has an end is one that is over within this second; written back,
/// it would never end.
async fn fetch(shared: &Shared, connection: &Connection, keys: &[&str]) -> Result<Vec<Reply>, CacheError> {
    connection.ask(gets(shared, keys)).await
}

fn gets(shared: &Shared, keys: &[&str]) -> Batch {
    Batch::of_gets(keys.iter().map(|key| shared.spelling.of(key)))
}

/// What a lease finds in place of nothing.
enum Found {
    Settled(Lease),
    /// To be replaced with this, for so long, to have the lease.
    Replace {
        cas: u64,
        life: u64,
        value: Vec<u8>,
        stale: Option<Entry>,
    },
}

/// What a lease needs to know beside the place.
pub(super) struct Terms<'a> {
    pub(super) groups: &'a [u64],
    /// In milliseconds.
    pub(super) lock: u64,
    pub(super) verified: bool,
    pub(super) max_entry: usize,
}

/// Asks for leases, each with a fence of its own.
///
/// Whether a writer holds the entry is asked *after* the lease was written, and a writer destroys what is there *after* its
/// hold was written: so either he destroys the lease, or it is given back here.
pub(super) async fn lease<'a>(
    shared: &Shared,
    live: &Live,
    places: &[Place<'a>],
    terms: &Terms<'_>,
    asked_for: &mut Asked<'a, Shared>,
) -> Result<Vec<Lease>, CacheError> {
    // Whoever is overtaken again and again waits like everybody else.
    let mut leases = vec![Lease::Wait { stale: None }; places.len()];
    let mut rest: Vec<usize> = (0..places.len()).collect();
    let mut unwanted = Batch::new();
    for _ in 0..TRIES {
        let mut batch = Batch::new();
        let mut tickets = Vec::with_capacity(rest.len());
        for place in rest.iter().map(|index| &places[*index]) {
            let fence = Fence::new().map_err(|_| CacheError::Refused)?;
            let ticket = Ticket { fence, tag: live.tag(place, terms.groups), connection: live.standing.number };
            let key = shared.spelling.of(place.key);
            batch.set(&key, If::Absent, life(terms.lock), &pending(place, &ticket, terms.lock));
            batch.get(&key);
            batch.get(&shared.spelling.hold_of(place.key));
            asked_for.note(place.key, fence);
            tickets.push(ticket);
        }
        let asked = now_ms();
        let replies = live.connection.ask(batch).await?;
        let mut again = Vec::new();
        let mut replacing = Vec::new();
        for ((index, ticket), replies) in rest.into_iter().zip(tickets).zip(replies.chunks(3)) {
            let [added, found, holders] = replies else { return Err(CacheError::Refused) };
            let place = &places[index];
            let is_held = !held(place.key, holders)?.0.is_empty();
            match (added, found) {
                (Reply::Refused | Reply::Value { .. }, _) | (_, Reply::Refused) => return Err(CacheError::Refused),
                (Reply::Done(cas), _) if is_held => {
                    unwanted.delete_if(&shared.spelling.of(place.key), *cas);
                    leases[index] = Lease::Past;
                }
                (Reply::Done(cas), _) => {
                    live.tickets.note(ticket.fence, *cas, asked, terms.lock);
                    leases[index] = Lease::Fill { ticket, stale: None };
                }
                _ if is_held => leases[index] = Lease::Past,
                (_, Reply::Value { value, cas, life }) => {
                    match judge(live, place, &ticket, terms, (value, *cas, *life)) {
                        Found::Settled(lease) => leases[index] = lease,
                        found @ Found::Replace { .. } => replacing.push((index, ticket, found)),
                    }
                }
                _ => again.push(index),
            }
        }
        let mut batch = Batch::new();
        for (index, _, found) in &replacing {
            if let Found::Replace { cas, life, value, .. } = found {
                batch.set(&shared.spelling.of(places[*index].key), If::Is(*cas), *life, value);
                batch.get(&shared.spelling.hold_of(places[*index].key));
            }
        }
        let asked = now_ms();
        let replies = live.connection.ask(batch).await?;
        for ((index, ticket, found), replies) in replacing.into_iter().zip(replies.chunks(2)) {
            let [replaced, holders] = replies else { return Err(CacheError::Refused) };
            let place = &places[index];
            match (replaced, found) {
                (Reply::Done(cas), _) if !held(place.key, holders)?.0.is_empty() => {
                    unwanted.delete_if(&shared.spelling.of(place.key), *cas);
                    leases[index] = Lease::Past;
                }
                (Reply::Done(cas), Found::Replace { stale, .. }) => {
                    live.tickets.note(ticket.fence, *cas, asked, terms.lock);
                    leases[index] = Lease::Fill { ticket, stale };
                }
                (Reply::Changed | Reply::Missing, _) => again.push(index),
                _ => return Err(CacheError::Refused),
            }
        }
        if again.is_empty() {
            break;
        }
        rest = again;
    }
    // Whoever was faster has changed it, and then it is not ours to give back.
    live.connection.ask(unwanted).await?;
    Ok(leases)
}

/// The value of a lease.
fn pending(place: &Place<'_>, ticket: &Ticket, lock: u64) -> Vec<u8> {
    entry::marked(&entry::pending(place.key, ticket.fence, ticket.tag, place.shape), ticket.fence, lock)
}

/// What becomes of a lease where something is there.
fn judge(
    live: &Live,
    place: &Place<'_>,
    ticket: &Ticket,
    terms: &Terms<'_>,
    (value, cas, left): (&Bytes, u64, u64),
) -> Found {
    let pending = || {
        let value = pending(place, ticket, terms.lock);
        Found::Replace { cas, life: life(terms.lock), value, stale: None }
    };
    // Another format, or another key's value: as good as nothing.
    let Some(marks) = Marks::of(place.key, value) else { return pending() };
    let now = wall_ms();
    match (marks.state, entry::decode(place.key, value, now, terms.max_entry)) {
        (b'P', _) if live.locks.has_ended(place.key, cas, marks.lock) => pending(),
        (b'P', _) => Found::Settled(Lease::Wait { stale: None }),
        (b'V', _) if marks.tag != ticket.tag => {
            // One of the same shape is from before a purge.
            let spared = !marks.is_of_shape(place.shape) && now.saturating_sub(marks.stored_at) < YOUNG;
            if spared { Found::Settled(Lease::Past) } else { pending() }
        }
        (b'V', Some(Held::Valid { entry, .. })) => {
            let entry = Entry { verified: terms.verified, ..entry };
            if entry.ttl_ms > 0 && entry.stored_at != place.refreshes {
                return Found::Settled(Lease::Hit(entry));
            }
            if marks.fence != NOBODY && !live.locks.has_ended(place.key, cas, marks.lock) {
                return Found::Settled(Lease::Wait { stale: Some(entry) });
            }
            let value = entry::marked(value, ticket.fence, terms.lock);
            // For as long as the refresh may come, the fence is there.
            Found::Replace { cas, life: left.max(life(terms.lock)), value, stale: Some(entry) }
        }
        // Nobody writes anything else here.
        _ => Found::Settled(Lease::Past),
    }
}

/// Makes the locks of live tickets longer. A ticket whose fence is gone is forgotten.
pub(super) async fn renew(
    shared: &Shared,
    live: &Live,
    held: &[(Place<'_>, Ticket)],
    lock: u64,
) -> Result<(), CacheError> {
    let keys: Vec<&str> = held.iter().map(|(place, _)| place.key).collect();
    let mut batch = Batch::new();
    let mut renewed = Vec::with_capacity(held.len());
    for ((place, ticket), reply) in held.iter().zip(fetch(shared, &live.connection, &keys).await?) {
        match (own(place.key, ticket.fence, &reply), reply) {
            (Some(state), Reply::Value { value, cas, life: left }) => {
                let left = if state == b'P' { life(lock) } else { left.max(life(lock)) };
                let value = entry::marked(&value, ticket.fence, lock);
                batch.set(&shared.spelling.of(place.key), If::Is(cas), left, &value);
                renewed.push(ticket.fence);
            }
            _ => live.tickets.forget(ticket.fence),
        }
    }
    let asked = now_ms();
    for (fence, reply) in renewed.into_iter().zip(live.connection.ask(batch).await?) {
        match reply {
            Reply::Done(cas) => live.tickets.note(fence, cas, asked, lock),
            _ => live.tickets.forget(fence),
        }
    }
    Ok(())
}

/// Gives leases back unused.
pub(super) async fn release(shared: &Shared, live: &Live, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
    let held: Vec<_> = held.iter().map(|(place, ticket)| (place.key, ticket.fence)).collect();
    give_back(shared, live, &held, shared.timeout).await
}

/// The same by their fences, with as much time for each of two round trips.
pub(super) async fn give_back<K: AsRef<str>>(
    shared: &Shared,
    live: &Live,
    held: &[(K, Fence)],
    patience: Duration,
) -> Result<(), CacheError> {
    let keys: Vec<&str> = held.iter().map(|(key, _)| key.as_ref()).collect();
    let mut batch = Batch::new();
    for ((name, fence), reply) in held.iter().zip(live.connection.ask_within(patience, gets(shared, &keys)).await?) {
        live.tickets.forget(*fence);
        let name = name.as_ref();
        let key = shared.spelling.of(name);
        match (own(name, *fence, &reply), reply) {
            (Some(b'P'), Reply::Value { cas, .. }) => batch.delete_if(&key, cas),
            (Some(_), Reply::Value { value, cas, life }) => {
                batch.set(&key, If::Is(cas), life.max(1), &entry::marked(&value, NOBODY, 0));
            }
            _ => {}
        }
    }
    // Whoever was faster has changed it, and then it is not ours to give back.
    live.connection.ask_within(patience, batch).await.map(drop)
}

/// The state of what is there, if it has this fence.
pub(super) fn own(key: &str, fence: Fence, reply: &Reply) -> Option<u8> {
    let Reply::Value { value, .. } = reply else { return None };
    Marks::of(key, value).filter(|marks| marks.fence == fence).map(|marks| marks.state)
}

/// Whether somebody holds an entry, going by the reply to a look at its hold.
pub(super) fn is_held(key: &str, reply: &Reply) -> Result<bool, CacheError> {
    Ok(!held(key, reply)?.0.is_empty())
}

/// Who does, and for how long the server keeps that.
fn held(key: &str, reply: &Reply) -> Result<(Vec<Fence>, u64), CacheError> {
    match reply {
        Reply::Value { value, life, .. } if Marks::of(key, value).is_some() => Ok((entry::holders(value), *life)),
        Reply::Value { .. } | Reply::Missing => Ok((Vec::new(), 0)),
        _ => Err(CacheError::Refused),
    }
}

async fn fetch_holds(shared: &Shared, connection: &Connection, keys: &[&str]) -> Result<Vec<Reply>, CacheError> {
    connection.ask(Batch::of_gets(keys.iter().map(|key| shared.spelling.hold_of(key)))).await
}

/// Which of these entries writers hold.
pub(super) async fn are_held(shared: &Shared, connection: &Connection, keys: &[&str]) -> Result<Vec<bool>, CacheError> {
    let replies = fetch_holds(shared, connection, keys).await?;
    keys.iter().zip(replies).map(|(key, reply)| Ok(!held(key, &reply)?.0.is_empty())).collect()
}

/// Keeps entries empty, beside other writers, for `time` milliseconds at least.
///
/// Holds stand beside their entries, not in their place: so the many who fill and invalidate an entry don't keep a writer from
/// holding it, and nothing that is done to it opens his hold.
pub(super) async fn hold(
    shared: &Shared,
    connection: &Connection,
    keys: &[&str],
    owner: Fence,
    time: u64,
) -> Result<(), CacheError> {
    let mut rest = keys.to_vec();
    for _ in 0..TRIES {
        let mut batch = Batch::new();
        for (key, reply) in rest.iter().zip(fetch_holds(shared, connection, &rest).await?) {
            let (mut owners, left) = held(key, &reply)?;
            owners.retain(|other| *other != owner);
            let life = if owners.is_empty() { life(time) } else { life(time).max(left) };
            owners.push(owner);
            let condition = if let Reply::Value { cas, .. } = reply { If::Is(cas) } else { If::Absent };
            batch.set(&shared.spelling.hold_of(key), condition, life, &entry::reserved(key, &owners));
            // In this order: see `lease`.
            batch.delete(&shared.spelling.of(key));
        }
        rest = overtaken(rest, &connection.ask(batch).await?)?;
        if rest.is_empty() {
            return Ok(());
        }
    }
    Err(CacheError::Refused)
}

/// Gives up what `owner` holds, and destroys whatever else is there.
pub(super) async fn give_up(
    shared: &Shared,
    connection: &Connection,
    keys: &[&str],
    owner: Fence,
) -> Result<(), CacheError> {
    let mut rest = keys.to_vec();
    for _ in 0..TRIES {
        let mut batch = Batch::new();
        let mut told = Vec::new();
        for (key, reply) in rest.iter().zip(fetch_holds(shared, connection, &rest).await?) {
            let (mut owners, left) = held(key, &reply)?;
            let Reply::Value { cas, .. } = reply else { continue };
            if !owners.contains(&owner) {
                continue;
            }
            owners.retain(|other| *other != owner);
            let hold = shared.spelling.hold_of(key);
            if owners.is_empty() {
                batch.delete_if(&hold, cas);
            } else {
                batch.set(&hold, If::Is(cas), left.max(1), &entry::reserved(key, &owners));
            }
            batch.delete(&shared.spelling.of(key));
            told.push(*key);
        }
        let given_up = connection.ask(batch).await?;
        let again = overtaken(told.clone(), &given_up)?;
        // What was not his to give up is destroyed all the same.
        let others: Vec<&str> = rest.into_iter().filter(|key| !told.contains(key)).collect();
        shared.drop_all(connection, &others).await?;
        if again.is_empty() {
            return Ok(());
        }
        rest = again;
    }
    Err(CacheError::Refused)
}

/// The keys whose holds were changed by others meanwhile. Of each there are two replies: about the hold, about the entry.
fn overtaken<'a>(keys: Vec<&'a str>, replies: &[Reply]) -> Result<Vec<&'a str>, CacheError> {
    let mut again = Vec::new();
    for (key, replies) in keys.into_iter().zip(replies.chunks(2)) {
        match replies {
            [Reply::Done(_), Reply::Done(_) | Reply::Missing] => {}
            // What is gone may have been replaced as well as not: it is looked at again.
            [Reply::Changed | Reply::Missing | Reply::Taken, _] => again.push(key),
            _ => return Err(CacheError::Refused),
        }
    }
    Ok(again)
}
