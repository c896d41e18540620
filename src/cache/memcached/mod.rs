//! Memcached: meta commands with compare-and-set, and the same guarantees as over Redis.
//!
//! There are no scripts here. Whatever needs a look before it writes (a lease, a renewal, a hold) looks, and its write goes
//! through only if nobody has written since: every value has a number, which no other value of its key has in this life of the
//! server. So a fill that has the number of its lease's value needs one round trip. Numbers begin again after a restart,
//! but connections break then: a fill goes over the connection that got the lease, or not at all.
//!
//! Left out: a tier in process, several servers in one URL, passwords and TLS. What no clock in common makes different is told
//! in `trust` (how old what is here may be) and `locks` (who may fill). TTLs are counted by the clocks of the machines that
//! fill and read, so a clock that is off makes them that much longer or shorter; the server ends every life by its own clock too.

mod connection;
mod key;
mod lane;
mod locks;
mod look;
mod node;
mod shared;
mod steps;
mod trust;
mod wire;

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::lane::Live;
pub use self::node::MemcachedNode;
use self::shared::Shared;
use self::steps::{Terms, wall_ms};
use self::wire::{Batch, If, Reply};
use super::control::field;
use super::entry::{self, Entry, Fence, Held, Marks};
use super::lane::{Asked, Deadlines, Lane, Wait, now_ms};
use super::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Memory, Place, Ticket};
use crate::catalog::Mapping;
use crate::{config, store};

/// What an item costs beside its value, at most: the server's header, and the key.
const OVERHEAD: usize = 400;

/// A handle on a Memcached server, with a lane of its own in the runtime that made it.
#[derive(Clone)]
pub struct MemcachedCache {
    shared: Arc<Shared>,
    lane: Arc<Lane<Shared>>,
}

/// What a server says of itself, for `check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its version.
    pub version: String,
    /// The largest item that it takes, in bytes.
    pub item_size: u64,
    /// The memory that it may use for items, in bytes.
    pub memory: u64,
    /// Once full it makes room for what is new; otherwise it refuses that.
    pub evicts: bool,
}

impl std::fmt::Debug for MemcachedCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("MemcachedCache").field("health", &self.health()).finish_non_exhaustive()
    }
}

impl MemcachedCache {
    /// Prepares the connection that `config` describes and starts making it; must be called inside a runtime.
    ///
    /// With `max_staleness` it is used only as far as somebody keeps it current ([`Self::node`]).
    ///
    /// # Errors
    ///
    /// A URL that can't be used. A server that is away is no error: the lane keeps trying.
    pub fn new(config: &config::Cache, max_staleness: Option<Duration>) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(config, max_staleness)?);
        Ok(Self { lane: Lane::open(&shared), shared })
    }

    /// What brings this memory up to date; `None` where nobody is to.
    #[must_use]
    pub fn node(&self) -> Option<MemcachedNode> {
        self.shared.max_staleness.map(|_| MemcachedNode::new(&self.shared))
    }

    /// Declares what is cached here and which changes concern it. Nothing is used before that is registered.
    pub fn declare(&self, mappings: HashMap<String, Mapping>) {
        self.shared.declare(mappings);
    }

    /// Waits until this handle's lane has a connection, for `patience` at most.
    pub async fn connected(&self, patience: Duration) {
        self.lane.turned(patience, |lane| lane.live.load().is_some()).await;
    }

    /// Waits until this handle's lane is trusted, for `patience` at most.
    pub async fn settled(&self, patience: Duration) {
        self.lane.settled(patience).await;
    }

    /// How it is.
    #[must_use]
    pub fn memory(&self) -> Memory {
        Memory {
            address: self.address().to_owned(),
            health: self.health(),
            staleness: self.staleness(),
            breaker: Some(self.lane.breaker.state()),
        }
    }

    /// How far behind the database this memory is at most, in milliseconds; `None` where that is not known.
    #[must_use]
    pub fn staleness(&self) -> Option<u64> {
        self.lane.live.load().as_ref()?.staleness()
    }

    /// The server's address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// A handle with a lane of its own in the current runtime.
    #[must_use]
    pub fn attach(&self) -> Self {
        Self { lane: Lane::open(&self.shared), shared: Arc::clone(&self.shared) }
    }

    /// Whether this handle's lane is connected and trusted.
    ///
    /// # Errors
    ///
    /// What it is not.
    pub fn health(&self) -> Result<(), CacheError> {
        self.lane.health()
    }

    /// What the server says of itself.
    ///
    /// # Errors
    ///
    /// Why it can't be used, in words.
    pub async fn profile(&self) -> anyhow::Result<Profile> {
        // Its own connection: that of the lane may be kept away by what is wrong.
        let connection = self.shared.connect().await?;
        let server = &connection.server;
        Ok(Profile {
            version: server.get("version").unwrap_or("of unknown version").to_owned(),
            item_size: server.number("item_size_max").unwrap_or(1 << 20),
            memory: server.number("maxbytes").unwrap_or(0),
            evicts: server.get("evictions") != Some("off"),
        })
    }

    /// Whether invalidations that failed wait for delivery.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.shared.debts.owes()
    }

    /// The number of open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections()
    }

    /// All round trips of one operation together, of which there is one at least, within its time.
    async fn within<T>(&self, steps: impl Future<Output = Result<T, CacheError>>) -> Result<T, CacheError> {
        let wait = Wait::new(self.shared.timeout);
        let outcome = wait.until(pin!(steps)).await.unwrap_or(Err(CacheError::TimedOut));
        match outcome {
            Ok(_) => self.lane.answered(),
            Err(CacheError::TimedOut) => self.lane.missed(wait),
            // Its supervisor makes another at once.
            Err(CacheError::Disconnected) => self.lane.wake.notify_one(),
            Err(_) => {}
        }
        outcome
    }

    /// Remembers invalidations that failed.
    fn owing(&self, keys: &[&str], outcome: Result<(), CacheError>) -> Result<(), CacheError> {
        if outcome.is_err() {
            self.shared.debts.owe(keys, false);
            self.lane.wake.notify_one();
        }
        outcome
    }

    /// Values, and the generations of the groups that they share, in one round trip.
    async fn get(&self, live: &Live, places: &[Place<'_>]) -> Result<(Vec<Reply>, Vec<Option<u64>>), CacheError> {
        let groups = places.first().map_or(&[][..], |place| place.groups);
        let keys = places.iter().map(|place| place.key).chain(groups.iter().map(String::as_str));
        let batch = Batch::of_gets(keys.map(|key| self.shared.spelling.of(key)));
        let mut replies = self.within(live.connection.ask(batch)).await?;
        let groups = replies.split_off(places.len().min(replies.len())).iter().map(number).collect();
        Ok((replies, groups))
    }

    async fn read_grouped(
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
    async fn groups(&self, live: &Live, place: &Place<'_>) -> Result<Option<Vec<u64>>, CacheError> {
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

    /// Whether the groups of these fills and the generations of their resources are still those of their leases. The entry's
    /// own number says nothing of a group that was dropped, or a resource that was purged, since then.
    async fn still(&self, live: &Live, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<bool>, CacheError> {
        let groups = fills.first().map_or(&[][..], |(place, ..)| place.groups);
        let mut generations = Some(Vec::new());
        if !groups.is_empty() {
            let mut batch = Batch::new();
            for group in groups {
                batch.get(&self.shared.spelling.of(group));
            }
            generations = live.connection.ask(batch).await?.iter().map(number).collect();
        }
        let is_same = |(place, ticket, _): &(Place<'_>, Ticket, Fill)| {
            generations.as_ref().is_some_and(|generations| live.tag(place, generations) == ticket.tag)
        };
        Ok(fills.iter().map(is_same).collect())
    }

    /// Puts one value into the place of its lease's, or says why not.
    fn store(
        &self,
        live: &Live,
        batch: &mut Batch,
        (place, ticket, fill): &(Place<'_>, Ticket, Fill),
        cas: u64,
    ) -> Plan {
        let key = self.shared.spelling.of(place.key);
        let largest = live.connection.server.number("item_size_max").unwrap_or(1 << 20);
        let value = entry::valid(place.key, ticket.tag, place.shape, fill, wall_ms(), self.shared.pack_above);
        if value.len() + OVERHEAD > usize::try_from(largest).unwrap_or(usize::MAX) {
            // The server would drop whatever is there, a writer's hold too. Only what this lease knows goes: nobody need wait
            // for it, and what is past its TTL must not outlive a newer value.
            batch.delete_if(&key, cas);
            return Plan::TooBig;
        }
        let life = wire::life(millis(fill.ttl.saturating_add(fill.grace)));
        batch.set(&key, If::Is(cas), life, &value);
        Plan::Store
    }

    async fn store_all(&self, live: &Live, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let now = now_ms();
        let leased: Vec<_> = fills.iter().map(|(_, ticket, _)| live.tickets.take(ticket.fence)).collect();
        let mut numbers: Vec<_> =
            leased.iter().map(|leased| leased.filter(|leased| now < leased.ends).map(|leased| leased.cas)).collect();
        // Of what was forgotten, and of what others may have taken over, the server is asked.
        let unsure: Vec<usize> = (0..fills.len()).filter(|index| numbers[*index].is_none()).collect();
        let mut verdicts = vec![Filled::Gone; fills.len()];
        let batch = Batch::of_gets(unsure.iter().map(|index| self.shared.spelling.of(fills[*index].0.key)));
        for (index, reply) in unsure.into_iter().zip(live.connection.ask(batch).await?) {
            let (place, ticket, _) = &fills[index];
            match (steps::own(place.key, ticket.fence, &reply), reply) {
                // A lock that has ended is over, though nobody has taken it yet; a refresh is not.
                (Some(b'P'), Reply::Value { .. }) if leased[index].is_some() => {}
                (Some(_), Reply::Value { cas, .. }) => numbers[index] = Some(cas),
                (None, Reply::Value { .. }) => verdicts[index] = Filled::Fenced,
                (_, Reply::Missing) => {}
                _ => return Err(CacheError::Refused),
            }
        }
        let mut batch = Batch::new();
        let mut plans = Vec::with_capacity(fills.len());
        for (index, (fill, number)) in fills.iter().zip(numbers).enumerate() {
            if let Some(cas) = number {
                plans.push((index, self.store(live, &mut batch, fill, cas)));
            }
        }
        for ((index, plan), reply) in plans.into_iter().zip(live.connection.ask(batch).await?) {
            verdicts[index] = match (plan, reply) {
                (_, Reply::Refused | Reply::Value { .. }) => return Err(CacheError::Refused),
                (Plan::TooBig, _) => Filled::TooBig,
                (Plan::Store, Reply::Done(_)) => Filled::Stored,
                (Plan::Store, Reply::Changed | Reply::Taken) => Filled::Fenced,
                (Plan::Store, Reply::Missing) => Filled::Gone,
            };
        }
        let gone: Vec<usize> = (0..fills.len()).filter(|index| verdicts[*index] == Filled::Gone).collect();
        let keys: Vec<&str> = gone.iter().map(|index| fills[*index].0.key).collect();
        for (index, is_held) in gone.iter().zip(steps::are_held(&self.shared, &live.connection, &keys).await?) {
            // Not merely gone: a writer took it away.
            if is_held {
                verdicts[*index] = Filled::Fenced;
            }
        }
        Ok(verdicts)
    }
}

/// What is done with a fill.
enum Plan {
    Store,
    TooBig,
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
fn number(reply: &Reply) -> Option<u64> {
    match reply {
        Reply::Value { value, .. } => std::str::from_utf8(value).ok()?.parse().ok(),
        _ => None,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Cache for MemcachedCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let mut found = self.read_many(&[place]).await?;
        Ok(found.pop().unwrap_or(Lookup::Absent))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        if places.is_empty() {
            return Ok(Vec::new());
        }
        self.read_grouped(&live, deadlines, places).await
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        // A lease on a memory that can't be trusted would only make others wait.
        let Some(first) = places.first() else { return Ok(Vec::new()) };
        let verified = self.shared.usable(deadlines, first)?;
        let mut asked = Asked::new(&self.shared, &live);
        let leasing = async {
            let Some(groups) = self.groups(&live, first).await? else { return Ok(vec![Lease::Past; places.len()]) };
            let max_entry = self.shared.max_entry;
            let terms = Terms { groups: &groups, lock: millis(lock), verified, max_entry };
            steps::lease(&self.shared, &live, places, &terms, &mut asked).await
        };
        let leases = self.within(Box::pin(leasing)).await?;
        let leases = self.shared.still(leases, deadlines, first)?;
        asked.settled();
        Ok(leases)
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let held: Vec<_> =
            held.iter().filter(|(_, ticket)| ticket.connection == live.standing.number).copied().collect();
        if held.is_empty() {
            return Ok(());
        }
        self.within(steps::renew(&self.shared, &live, &held, millis(lock))).await
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let live = self.lane.live().await?;
        let deadlines = live.standing.deadlines();
        if fills.is_empty() {
            return Ok(Vec::new());
        }
        if fills.iter().any(|(_, ticket, _)| ticket.connection != live.standing.number) {
            // The server may have been restarted in between, and its numbers with it. If it was not, nobody need wait for
            // the lock's end.
            let held: Vec<_> = fills.iter().map(|(place, ticket, _)| (*place, *ticket)).collect();
            self.release(&held).await?;
            return Ok(vec![Filled::Gone; fills.len()]);
        }
        let caught_up_with = self.shared.max_staleness.map(|_| store::origin(&live.standing.control.load().origin));
        let (fills, foreign): (Vec<_>, Vec<_>) = fills
            .iter()
            .cloned()
            .enumerate()
            .partition(|(_, (.., fill))| caught_up_with.is_none_or(|origin| origin == fill.origin));
        let mut verdicts = vec![Filled::Fenced; fills.len() + foreign.len()];
        let storing = async {
            if !foreign.is_empty() {
                // Read from another database, or from a former life of this one.
                let held: Vec<_> = foreign.iter().map(|(_, (place, ticket, _))| (*place, *ticket)).collect();
                steps::release(&self.shared, &live, &held).await?;
            }
            let (indexes, fills): (Vec<usize>, Vec<_>) = fills.into_iter().unzip();
            let still = self.still(&live, &fills).await?;
            let filled = self.store_all(&live, &fills).await?;
            for ((index, filled), still) in indexes.into_iter().zip(filled).zip(still) {
                verdicts[index] = if still || filled != Filled::Stored { filled } else { Filled::Fenced };
            }
            Ok(())
        };
        self.within(Box::pin(storing)).await?;
        // "Stored" means that nothing was invalidated meanwhile; while this process owes invalidations that is not known.
        if self.shared.debts.verified(deadlines)? { Ok(verdicts) } else { Err(CacheError::Untrusted) }
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        if held.is_empty() {
            return Ok(());
        }
        self.within(steps::release(&self.shared, &live, held)).await
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        if keys.is_empty() {
            return Ok(());
        }
        let telling = async {
            let live = self.lane.live().await?;
            self.shared.drop_all(&live.connection, keys).await
        };
        self.owing(keys, self.within(Box::pin(telling)).await)
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        // A hold in a memory that nobody reads from holds nobody back.
        if !self.shared.debts.verified(live.standing.deadlines())? {
            return Err(CacheError::Untrusted);
        }
        if live.connection.server.get("evictions") == Some("off") {
            // A write that it has no room for destroys what is there: a hold of somebody else, perhaps.
            return Err(CacheError::Refused);
        }
        if keys.is_empty() {
            return Ok(());
        }
        self.within(steps::hold(&self.shared, &live.connection, keys, owner, millis(time))).await
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        // Holds stand beside their entries: nothing that is done to these opens them.
        let Some(owner) = owner.filter(|_| !keys.is_empty()) else { return self.invalidate(keys).await };
        let telling = async {
            let live = self.lane.live().await?;
            steps::give_up(&self.shared, &live.connection, keys, owner).await
        };
        self.owing(keys, self.within(Box::pin(telling)).await)
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        // There is no tier in process that would have to be told.
        self.invalidate(keys).await
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let renewing = look::change(&self.shared, &live.connection, |fields| {
            fields.insert(field::generation(resource), fastrand::u64(1..).to_string());
        });
        self.within(Box::pin(renewing)).await?;
        // This process knows the new generation before it answers; the others at their next look.
        self.shared.debts.mistrust();
        Ok(())
    }

    fn answered_since(&self, _: &str, moment: Instant) -> bool {
        self.lane.answered_since(moment)
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let live = self.lane.live().await?;
        let (replies, groups) = self.get(&live, &[place]).await?;
        let groups: Vec<u64> = groups.into_iter().map(|group| group.unwrap_or(0)).collect();
        let value = match replies.into_iter().next() {
            Some(Reply::Value { value, .. }) => value,
            _ => Bytes::new(),
        };
        let is_held = self.within(steps::are_held(&self.shared, &live.connection, &[place.key])).await? == [true];
        let decoded = || entry::decode(place.key, &value, wall_ms(), self.shared.max_entry);
        let held = if is_held { Some(Held::Reserved) } else { decoded() };
        Ok(Inspection::of(held, value.len(), live.tag(&place, &groups)))
    }
}
