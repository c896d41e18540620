//! Redis and Valkey: a pipelined GET on the hot path, scripts only where a fence must be compared.
//!
//! Requests share one multiplexed connection per worker (a *lane*) and never check one out: see
//! `docs/adr/0001-lanes.md`. The pool makes and counts the connections; supervisors hold them.

pub mod cluster;

mod filter;
mod lane;
mod local;
mod look;
mod node;
#[cfg(feature = "server")]
mod note;
mod rights;
mod script;
mod sentinel;
mod shared;
mod trouble;
mod unlink;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};

use self::filter::Filter;
pub use self::filter::{FilterState, Sizes};
use self::lane::{Deadlines, Lane, Live};
use self::local::{Caught, Local};
pub use self::node::RedisNode;
use self::sentinel::Sentinels;
use self::shared::{Shared, now_ms};
use self::unlink::NotHere;
use super::control::field;
use super::entry::{self, Entry, Fence, Held};
use super::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Memory, Place, Ticket};
use crate::catalog::{Mapping, Resource};
use crate::{config, store};

/// How long a read waits for a lane that is about to be trusted.
const PATIENCE: Duration = Duration::from_millis(50);

/// A handle on a Redis server, with a lane of its own in the runtime that made it.
#[derive(Clone)]
pub struct RedisCache {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
    local: Option<Arc<Local>>,
}

impl std::fmt::Debug for RedisCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("RedisCache").field("health", &self.health()).finish_non_exhaustive()
    }
}

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
        store::origin(&self.live.control.load().origin) == origin
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
    /// Prepares the connection that `config` describes and starts making it; must be called inside a runtime.
    ///
    /// With `max_staleness` it is used only as far as somebody keeps it current ([`Self::node`]); then it may have a tier in
    /// this process too.
    ///
    /// # Errors
    ///
    /// A URL or certificate that can't be used. A server that is away is no error: the lane keeps trying.
    pub fn new(config: &config::Cache, max_staleness: Option<Duration>, tiered: bool) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(config, max_staleness)?);
        if shared.sentinels.is_some() {
            tokio::spawn(Sentinels::watch(Arc::downgrade(&shared)));
        }
        Ok(Self::over(shared, (tiered && max_staleness.is_some()).then_some(config.local.max_bytes)))
    }

    /// The same for a server that is known, with a tier in this process of so many bytes.
    fn over(shared: Arc<Shared>, local: Option<usize>) -> Self {
        let local = local.map(|max_bytes| Local::new(&shared, max_bytes));
        Self { lane: Lane::open(&shared), shared, local }
    }

    fn shared(&self) -> &Shared {
        &self.shared
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

    /// What brings this memory up to date; `None` where nobody is to.
    #[must_use]
    pub fn node(&self) -> Option<RedisNode> {
        self.shared.max_staleness.map(|_| RedisNode::new(&self.shared))
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
        let away = |lane: &Lane| !lane.untried() && lane.live.load().is_none();
        self.lane.turned(patience, |lane| self.health().is_ok() || away(lane)).await;
    }

    /// The in-process tier, where one may hold this entry. What depends on groups is not held: only the node knows their
    /// generations.
    fn local(&self, place: &Place<'_>) -> Option<&Local> {
        self.local.as_deref().filter(|_| !place.local_ttl.is_zero() && place.groups.is_empty())
    }

    /// Looks into the in-process tier; else notes how far that is, for what will be read from the node.
    fn look_local(&self, live: &Live, place: &Place<'_>) -> Result<Entry, Option<Caught>> {
        let Some(local) = self.local(place) else { return Err(None) };
        let noted = local.noted();
        let Some(deadlines) = local.deadlines() else { return Err(None) };
        let found = Self::tag(live, place, &[]).and_then(|tag| local.get(place.key, tag));
        match found {
            Some(entry) if self.verified(deadlines) == Ok(true) => Ok(entry),
            _ => Err(Some(noted)),
        }
    }

    /// Keeps what was read from the node in the in-process tier.
    fn keep_local(&self, live: &Live, place: &Place<'_>, lookup: &Lookup, noted: Option<Caught>) {
        if let (Some(local), Lookup::Fresh(entry), Some(noted)) = (self.local(place), lookup, noted)
            && let Some(tag) = Self::tag(live, place, &[])
        {
            local.put(place.key, tag, entry, place.local_ttl, noted);
        }
    }

    /// What is not in the cache and has no row either: "not found", as the filter in this process knows it.
    fn known_absent(&self, live: &Live, place: &Place<'_>, lookup: Lookup) -> Lookup {
        let (Lookup::Absent, true, Some(local)) = (&lookup, place.filtered, self.local.as_deref()) else {
            return lookup;
        };
        let Some(deadlines) = local.deadlines() else { return lookup };
        let tag = Self::tag(live, place, &[]);
        let lacks = tag.is_some_and(|tag| local.filters.lacks(place.resource, tag, place.key));
        if !lacks || self.verified(deadlines) != Ok(true) {
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
        let (live, deadlines) = self.ready().await?;
        // What is served is registered then: rounds tell of its changes.
        self.verified(deadlines)?;
        let local = self.local.as_ref().ok_or(CacheError::Untrusted)?;
        let prefix = resource.row_prefix();
        let filter = Filter::new(prefix, Self::row_tag(&live, resource), capacity);
        let filter = local.begin(&resource.name, filter).ok_or(CacheError::Untrusted)?;
        Ok(Building { live, local: Arc::clone(local), filter, resource: resource.name.to_string() })
    }

    fn row_tag(live: &Live, resource: &Resource) -> u64 {
        let control = live.control.load();
        entry::tag(resource.shape, control.epoch, control.generation(&resource.name), &[])
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
        Self { lane: Lane::open(&self.shared), shared: Arc::clone(&self.shared), local: self.local.clone() }
    }

    /// Whether this handle's lane is connected and trusted.
    ///
    /// # Errors
    ///
    /// What it is not.
    pub fn health(&self) -> Result<(), CacheError> {
        let live = self.lane.live.load_full().ok_or(CacheError::Disconnected)?;
        self.verified(live.deadlines()).map(drop)
    }

    /// What the server says of itself, for `check`: `INFO` as text, or why there is none in words. A lane that was not tried
    /// yet is waited for, for `patience` at most.
    pub(super) async fn info(&self, patience: Duration) -> Result<String, String> {
        self.lane.turned(patience, |lane| !lane.untried()).await;
        let asked = async {
            let live = self.live().await?;
            let reply = self.ask(&live, redis::cmd("INFO")).await?;
            shared::text(&reply).ok_or(CacheError::Refused)
        };
        asked.await.map_err(|error| self.trouble().unwrap_or_else(|| error.to_string()))
    }

    /// Why there is no connection that can be used, in words; `None` where the last attempt succeeded.
    #[must_use]
    fn trouble(&self) -> Option<String> {
        self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether invalidations that failed wait for delivery.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.shared.owes()
    }

    /// The number of open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections()
    }

    /// The connection. A lane that is new is given the time of one operation to open: the first requests after a
    /// start need not go past a cache that is there.
    async fn live(&self) -> Result<Arc<Live>, CacheError> {
        if let Some(live) = self.lane.live.load_full() {
            return Ok(live);
        }
        if self.lane.untried() {
            self.lane.turned(self.shared.timeout, |lane| !lane.untried()).await;
        }
        self.lane.live.load_full().ok_or(CacheError::Disconnected)
    }

    /// The connection and its deadlines, loaded before anything is sent. One that will be trusted after its next look is
    /// looked at.
    async fn ready(&self) -> Result<(Arc<Live>, Deadlines), CacheError> {
        let live = self.live().await?;
        let deadlines = live.deadlines();
        if self.verified(deadlines).is_ok() || !live.hopeful(&self.shared) {
            return Ok((live, deadlines));
        }
        self.lane.wake.notify_one();
        self.lane.turned(self.shared.timeout.min(PATIENCE), |_| self.health().is_ok()).await;
        let live = self.live().await?;
        let deadlines = live.deadlines();
        Ok((live, deadlines))
    }

    /// Compares deadlines that were loaded before a command was sent with the time its reply is used. What can't be known
    /// to be current is good for nothing, unless the database itself does not answer: then the answer is false.
    fn verified(&self, deadlines: Deadlines) -> Result<bool, CacheError> {
        let now = now_ms();
        if deadlines.looked < self.shared.floor.load(Ordering::Acquire) {
            Err(CacheError::Untrusted)
        } else if now <= deadlines.trust {
            Ok(true)
        } else if now <= deadlines.known && self.shared.database_is_away() {
            Ok(false)
        } else {
            Err(CacheError::Untrusted)
        }
    }

    /// What leases found is only as good as it is when it is used.
    fn still(&self, mut leases: Vec<Lease>, deadlines: Deadlines, place: &Place<'_>) -> Result<Vec<Lease>, CacheError> {
        let verified = self.usable(deadlines, place)?;
        for lease in &mut leases {
            if let Lease::Hit(entry) | Lease::Fill { stale: Some(entry), .. } | Lease::Wait { stale: Some(entry) } =
                lease
            {
                entry.verified &= verified;
            }
        }
        Ok(leases)
    }

    /// The same for an entry that may be strict: then only what is known to be current is of any use.
    fn usable(&self, deadlines: Deadlines, place: &Place<'_>) -> Result<bool, CacheError> {
        let verified = self.verified(deadlines)?;
        if verified || !place.strict { Ok(verified) } else { Err(CacheError::Untrusted) }
    }

    async fn ask(&self, live: &Live, cmd: Cmd) -> Result<Value, CacheError> {
        match live.conn.clone().send_packed_command(&cmd).await {
            Ok(reply) => {
                self.lane.answered();
                match reply {
                    Value::ServerError(error) => Err(self.refused(error.code())),
                    value => Ok(value),
                }
            }
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// One round trip; replies come in the commands' order, errors among them.
    async fn ask_all(&self, live: &Live, pipe: &Pipeline) -> Result<Vec<Value>, CacheError> {
        let count = pipe.len();
        match live.conn.clone().send_packed_commands(pipe, 0, count).await {
            Ok(values) => {
                self.lane.answered();
                if values.len() == count { Ok(values) } else { Err(CacheError::Refused) }
            }
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Runs scripts. Where the server has forgotten them, none of them ran: they are loaded and sent once more.
    async fn scripts(&self, live: &Live, pipe: &Pipeline) -> Result<Vec<Value>, CacheError> {
        let unknown = |reply: &Value| matches!(reply, Value::ServerError(error) if error.code() == "NOSCRIPT");
        let mut replies = self.ask_all(live, pipe).await?;
        if replies.iter().any(unknown) {
            let mut load = Pipeline::new();
            script::Scripts::load(&mut load);
            self.ask_all(live, &load).await?;
            replies = self.ask_all(live, pipe).await?;
        }
        for reply in &replies {
            if let Value::ServerError(error) = reply {
                match self.refused(error.code()) {
                    // That is about one key alone.
                    CacheError::Elsewhere => {}
                    refused => return Err(refused),
                }
            }
        }
        Ok(replies)
    }

    fn failed(&self, error: &redis::RedisError) -> CacheError {
        if error.is_timeout() {
            self.lane.timed_out();
            return CacheError::TimedOut;
        }
        if error.is_unrecoverable_error() || error.is_connection_dropped() {
            // A multiplexed connection never recovers by itself: its supervisor makes another at once.
            self.lane.wake.notify_one();
            return CacheError::Disconnected;
        }
        tracing::debug!(%error, "the cache answered with an error");
        error.code().map_or(CacheError::Refused, |code| self.refused(code))
    }

    fn refused(&self, code: &str) -> CacheError {
        tracing::debug!(code, "the cache refused a command");
        if matches!(code, "READONLY" | "LOADING" | "MASTERDOWN") {
            self.lane.wake.notify_one();
        }
        match code {
            "MOVED" => {
                if let Some(cluster) = self.shared.cluster() {
                    cluster.look_again();
                }
                return CacheError::Elsewhere;
            }
            "ASK" => return CacheError::Elsewhere,
            _ => {}
        }
        CacheError::Refused
    }

    /// What became of keys that were to be dropped; what is not known to be gone is owed.
    fn told(
        &self,
        live: Result<Arc<Live>, CacheError>,
        outcome: redis::RedisResult<NotHere<'_>>,
        keys: &[&str],
        spare: bool,
    ) -> Result<(), CacheError> {
        let failure = match (live, outcome) {
            (Ok(_), Ok(not_here)) if not_here.is_empty() => return Ok(()),
            // Should it come back, it counts for nothing; but some lane may not have seen yet that it has left.
            (Ok(live), Ok(not_here)) if not_here.is_harmless(&live.control.load()) => {
                return Err(CacheError::Untrusted);
            }
            (Ok(_), Ok(not_here)) if not_here.moved.is_empty() => CacheError::Elsewhere,
            (Ok(_), Ok(_)) => self.refused("MOVED"),
            (Ok(_), Err(error)) => self.failed(&error),
            (Err(error), _) => error,
        };
        self.shared.owe(keys, spare);
        self.lane.wake.notify_one();
        Err(failure)
    }

    /// What an entry must carry to be of use; `None`: nothing here is, since the key may have been another node's.
    fn tag(live: &Live, place: &Place<'_>, groups: &[u64]) -> Option<u64> {
        let control = live.control.load();
        let tag = || entry::tag(place.shape, control.epoch, control.generation(place.resource), groups);
        control.holds(place.key).then(tag)
    }

    /// `groups`: the generations of the groups that the place depends on; `None` where one was lost.
    fn judge(
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
    async fn read_grouped(
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
        let verified = places.first().map_or(Ok(true), |first| self.usable(deadlines, first))?;
        let groups: Option<Vec<u64>> = values.drain(places.len()..).map(|reply| number(&reply)).collect();
        let judge = |(place, value)| self.judge(live, place, groups.as_deref(), value, verified);
        places.iter().zip(values).map(judge).collect()
    }

    /// The generations of a place's groups, made where there are none: before the database is read for it.
    async fn groups(&self, live: &Live, place: &Place<'_>) -> Result<Vec<u64>, CacheError> {
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

    /// Leases on entries that are this server's to keep.
    async fn lease_here(
        &self,
        live: &Live,
        places: &[Place<'_>],
        groups: &[u64],
        lock: Duration,
        verified: bool,
    ) -> Result<Vec<Lease>, CacheError> {
        if !live.set_nx_get {
            return self.lease_by_script(live, places, groups, lock, verified).await;
        }
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(live, place, groups)?.ok_or(CacheError::Elsewhere)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag, place.shape);
            pipe.cmd("SET").arg(place.key).arg(pending).arg("NX").arg("GET").arg("PX").arg(millis(lock));
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
            let places: Vec<Place<'_>> = unsettled.iter().map(|index| places[*index]).collect();
            let settled = self.lease_by_script(live, &places, groups, lock, verified).await?;
            for (index, lease) in unsettled.into_iter().zip(settled) {
                leases[index] = lease;
            }
        }
        Ok(leases)
    }

    /// The leases that a plain `SET NX GET` does not settle, by script, each with a fence of its own.
    async fn lease_by_script(
        &self,
        live: &Live,
        places: &[Place<'_>],
        groups: &[u64],
        lock: Duration,
        verified: bool,
    ) -> Result<Vec<Lease>, CacheError> {
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(live, place, groups)?.ok_or(CacheError::Elsewhere)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag, place.shape);
            pipe.add_command(self.shared.scripts.lease(place.key, &pending, millis(lock), place.refreshes));
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
        Ok(Self::tag(live, place, groups).map(|tag| Ticket { fence, tag, connection: live.number }))
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

/// A generation as it is kept.
fn number(reply: &Value) -> Option<u64> {
    match reply {
        Value::BulkString(text) => std::str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    }
}

/// Whole milliseconds, at least one: Redis refuses a life of zero.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 50)
}

impl Cache for RedisCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let (live, deadlines) = self.ready().await?;
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
        let verified = self.usable(deadlines, &place)?;
        let lookup = self.judge(&live, &place, Some(&[]), value, verified)?;
        self.keep_local(&live, &place, &lookup, noted);
        Ok(self.known_absent(&live, &place, lookup))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let (live, deadlines) = self.ready().await?;
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
        let (live, deadlines) = self.ready().await?;
        // A lease on a memory that can't be trusted would only make others wait.
        let Some(first) = places.first() else { return Ok(Vec::new()) };
        let verified = self.usable(deadlines, first)?;
        let groups = self.groups(&live, first).await?;
        let control = live.control.load_full();
        let (indices, here): (Vec<usize>, Vec<Place<'_>>) =
            places.iter().copied().enumerate().filter(|(_, place)| control.holds(place.key)).unzip();
        let mut leases = vec![Lease::Past; places.len()];
        for (index, lease) in indices.into_iter().zip(self.lease_here(&live, &here, &groups, lock, verified).await?) {
            leases[index] = lease;
        }
        if let Some(local) = &self.local {
            for (place, _) in places.iter().zip(&leases).filter(|(_, lease)| matches!(lease, Lease::Hit(_))) {
                local.outdated(place.key);
            }
        }
        self.still(leases, deadlines, first)
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        let live = self.live().await?;
        let mut pipe = Pipeline::with_capacity(held.len());
        for (place, ticket) in held {
            pipe.add_command(self.shared.scripts.renew(place.key, &ticket.fence.0, millis(lock)));
        }
        self.scripts(&live, &pipe).await.map(drop)
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let live = self.live().await?;
        let deadlines = live.deadlines();
        let now = live.cache_now();
        if fills.iter().any(|(_, ticket, _)| ticket.connection != live.number) {
            // Another memory may be at the other end by now, whose past the fence has come back from: what is stored
            // there proves nothing. The lock ends by itself.
            return Ok(vec![Filled::Gone; fills.len()]);
        }
        let caught_up_with = self.shared.max_staleness.map(|_| store::origin(&live.control.load().origin));
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
        if self.verified(deadlines)? { verdicts } else { Err(CacheError::Untrusted) }
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        let live = self.live().await?;
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
        let live = self.live().await;
        let outcome = match &live {
            Ok(live) => unlink::unlink(&self.shared, &mut live.conn.clone(), keys).await,
            Err(_) => Ok(NotHere::default()),
        };
        self.told(live, outcome, keys, false)
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        let live = self.live().await?;
        // A hold in a memory that nobody reads from holds nobody back.
        if !self.verified(live.deadlines())? {
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
        let live = self.live().await;
        let owner: &[u8] = owner.as_ref().map_or(&[], |owner| &owner.0);
        let outcome = match &live {
            Ok(live) => unlink::spare(&self.shared, &mut live.conn.clone(), keys, owner).await,
            Err(_) => Ok(NotHere::default()),
        };
        self.told(live, outcome, keys, true)
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.invalidate(keys).await?;
        if self.shared.max_staleness.is_none() {
            return Ok(());
        }
        let live = self.live().await?;
        let batch = serde_json::to_string(keys).map_err(|_| CacheError::Refused)?;
        let mut pipe = Pipeline::with_capacity(1);
        pipe.add_command(self.shared.scripts.tell([&self.shared.control_key, &self.shared.stream_key], &batch));
        self.scripts(&live, &pipe).await.map(drop)
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let live = self.live().await?;
        let mut cmd = redis::cmd("HSET");
        cmd.arg(&self.shared.control_key).arg(field::generation(resource)).arg(fastrand::u64(1..));
        self.ask(&live, cmd).await?;
        // This process knows the new generation before it answers; the others at their next look.
        self.shared.mistrust();
        Ok(())
    }

    fn answered_since(&self, _: &str, moment: Instant) -> bool {
        self.lane.answered_since(moment)
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let live = self.live().await?;
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
