//! Redis and Valkey: a pipelined GET on the hot path, scripts only where a fence must be compared.
//!
//! Requests share one multiplexed connection per worker (a *lane*) and never check one out: see
//! `docs/adr/0001-lanes.md`. The pool makes and counts the connections; supervisors hold them.

mod lane;
mod script;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};

use self::lane::{Control, Lane, Live, Shared, now_ms};
use super::entry::{self, Entry, Fence, Held};
use super::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Place, Ticket};
use crate::config;

/// A handle on a Redis server, with a lane of its own in the runtime that made it.
#[derive(Clone)]
pub struct RedisCache {
    shared: Arc<Shared>,
    lane: Arc<Lane>,
}

impl std::fmt::Debug for RedisCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("RedisCache").field("health", &self.health()).finish_non_exhaustive()
    }
}

impl RedisCache {
    /// Prepares the connection that `config` describes and starts making it; must be called inside a runtime.
    ///
    /// # Errors
    ///
    /// A URL or certificate that can't be used. A server that is away is no error: the lane keeps trying.
    pub fn new(config: &config::Cache) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(config)?);
        Ok(Self { lane: Lane::open(&shared), shared })
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
        let live = self.lane.live.load_full().ok_or(CacheError::Disconnected)?;
        self.trusted(live.trust.load(Ordering::Acquire))
    }

    /// What the server said of itself, for `check`: `INFO` as text.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where it did not answer.
    pub async fn info(&self) -> Result<String, CacheError> {
        let live = self.live().await?;
        match self.ask(&live, redis::cmd("INFO")).await? {
            Value::BulkString(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Value::VerbatimString { text, .. } | Value::SimpleString(text) => Ok(text),
            _ => Err(CacheError::Refused),
        }
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
        match self.lane.live.load_full() {
            Some(live) => Ok(live),
            None => self.lane.opened(self.shared.timeout).await.ok_or(CacheError::Disconnected),
        }
    }

    /// Compares a deadline that was loaded before a command was sent with the time its reply is used.
    fn trusted(&self, deadline: u64) -> Result<(), CacheError> {
        if now_ms() <= deadline && deadline >= self.shared.floor.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(CacheError::Untrusted)
        }
    }

    async fn ask(&self, live: &Live, cmd: Cmd) -> Result<Value, CacheError> {
        match live.conn.clone().send_packed_command(&cmd).await {
            Ok(Value::ServerError(error)) => Err(self.refused(error.code())),
            Ok(value) => Ok(value),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// One round trip; replies come in the commands' order, errors among them.
    async fn ask_all(&self, live: &Live, pipe: &Pipeline) -> Result<Vec<Value>, CacheError> {
        let count = pipe.len();
        match live.conn.clone().send_packed_commands(pipe, 0, count).await {
            Ok(values) if values.len() == count => Ok(values),
            Ok(_) => Err(CacheError::Refused),
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
        match replies.iter().find_map(|reply| match reply {
            Value::ServerError(error) => Some(error.code()),
            _ => None,
        }) {
            Some(code) => Err(self.refused(code)),
            None => Ok(replies),
        }
    }

    fn failed(&self, error: &redis::RedisError) -> CacheError {
        if error.is_timeout() {
            return CacheError::TimedOut;
        }
        if error.is_unrecoverable_error() || error.is_connection_dropped() {
            // A multiplexed connection never recovers by itself: its supervisor makes another at once.
            self.lane.wake.notify_one();
            return CacheError::Disconnected;
        }
        tracing::debug!(%error, "the cache answered with an error");
        CacheError::Refused
    }

    fn refused(&self, code: &str) -> CacheError {
        tracing::debug!(code, "the cache refused a command");
        if matches!(code, "READONLY" | "LOADING" | "MASTERDOWN") {
            self.lane.wake.notify_one();
        }
        CacheError::Refused
    }

    fn tag(live: &Live, place: &Place<'_>) -> u64 {
        let control = live.control.load();
        entry::tag(place.shape, control.epoch, control.generation(place.resource))
    }

    fn judge(live: &Live, place: &Place<'_>, value: Value) -> Result<Lookup, CacheError> {
        let value = match value {
            Value::Nil => return Ok(Lookup::Absent),
            Value::BulkString(bytes) => Bytes::from(bytes),
            _ => return Err(CacheError::Refused),
        };
        Ok(match entry::decode(place.key, &value, live.cache_now()) {
            Some(Held::Valid { tag, entry, .. }) if tag == Self::tag(live, place) => {
                if entry.ttl_ms > 0 {
                    Lookup::Fresh(entry)
                } else {
                    Lookup::Soft(entry)
                }
            }
            Some(Held::Pending) => Lookup::Pending,
            _ => Lookup::Absent,
        })
    }

    /// The leases that a plain `SET NX GET` does not settle, by script, each with a fence of its own.
    async fn lease_by_script(
        &self,
        live: &Live,
        places: &[Place<'_>],
        lock: Duration,
    ) -> Result<Vec<Lease>, CacheError> {
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(live, place)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag);
            pipe.add_command(self.shared.scripts.lease(place.key, &pending, millis(lock)));
            tickets.push(ticket);
        }
        let replies = self.scripts(live, &pipe).await?;
        places
            .iter()
            .zip(tickets)
            .zip(replies)
            .map(|((place, ticket), reply)| verdict(place, ticket, reply, live.cache_now()))
            .collect()
    }

    fn ticket(live: &Live, place: &Place<'_>) -> Result<Ticket, CacheError> {
        let fence = Fence::new().map_err(|_| CacheError::Refused)?;
        Ok(Ticket { fence, tag: Self::tag(live, place) })
    }
}

/// Reads the answer of the lease script.
fn verdict(place: &Place<'_>, ticket: Ticket, reply: Value, now: u64) -> Result<Lease, CacheError> {
    let Value::Array(parts) = reply else { return Err(CacheError::Refused) };
    let mut parts = parts.into_iter();
    let Some(Value::BulkString(word)) = parts.next() else { return Err(CacheError::Refused) };
    let held = match parts.next() {
        Some(Value::BulkString(value)) => entry::decode(place.key, &Bytes::from(value), now),
        _ => None,
    };
    let held: Option<Entry> = match held {
        Some(Held::Valid { entry, .. }) => Some(entry),
        _ => None,
    };
    match (word.as_slice(), held) {
        (b"fill", stale) => Ok(Lease::Fill { ticket, stale }),
        (b"wait", stale) => Ok(Lease::Wait { stale }),
        (b"hit", Some(entry)) => Ok(Lease::Hit(entry)),
        (b"past", _) => Ok(Lease::Past),
        _ => Err(CacheError::Refused),
    }
}

/// Whole milliseconds, at least one: Redis refuses a life of zero.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 50)
}

impl Cache for RedisCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let live = self.live().await?;
        let deadline = live.trust.load(Ordering::Acquire);
        let mut get = Cmd::with_capacity(2, 16 + place.key.len());
        get.arg("GET").arg(place.key);
        let value = self.ask(&live, get).await?;
        self.trusted(deadline)?;
        Self::judge(&live, &place, value)
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let live = self.live().await?;
        let deadline = live.trust.load(Ordering::Acquire);
        let mut pipe = Pipeline::with_capacity(places.len());
        for place in places {
            pipe.cmd("GET").arg(place.key);
        }
        let values = self.ask_all(&live, &pipe).await?;
        self.trusted(deadline)?;
        places.iter().zip(values).map(|(place, value)| Self::judge(&live, place, value)).collect()
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let live = self.live().await?;
        let deadline = live.trust.load(Ordering::Acquire);
        // A lease on a memory that can't be trusted would only make others wait.
        self.trusted(deadline)?;
        if !live.set_nx_get {
            let leases = self.lease_by_script(&live, places, lock).await?;
            self.trusted(deadline)?;
            return Ok(leases);
        }
        let mut pipe = Pipeline::with_capacity(places.len());
        let mut tickets = Vec::with_capacity(places.len());
        for place in places {
            let ticket = Self::ticket(&live, place)?;
            let pending = entry::pending(place.key, ticket.fence, ticket.tag);
            pipe.cmd("SET").arg(place.key).arg(pending).arg("NX").arg("GET").arg("PX").arg(millis(lock));
            tickets.push(ticket);
        }
        let mut leases = Vec::with_capacity(places.len());
        let mut unsettled = Vec::new();
        let replies = self.ask_all(&live, &pipe).await?;
        for (index, ((place, ticket), reply)) in places.iter().zip(tickets).zip(replies).enumerate() {
            leases.push(match reply {
                Value::Nil => Lease::Fill { ticket, stale: None },
                Value::ServerError(error) => return Err(self.refused(error.code())),
                found => match Self::judge(&live, place, found)? {
                    Lookup::Fresh(entry) => Lease::Hit(entry),
                    Lookup::Pending => Lease::Wait { stale: None },
                    Lookup::Soft(_) | Lookup::Absent => {
                        unsettled.push(index);
                        Lease::Past
                    }
                },
            });
        }
        if !unsettled.is_empty() {
            let places: Vec<Place<'_>> = unsettled.iter().map(|index| places[*index]).collect();
            for (index, lease) in unsettled.into_iter().zip(self.lease_by_script(&live, &places, lock).await?) {
                leases[index] = lease;
            }
        }
        self.trusted(deadline)?;
        Ok(leases)
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
        let deadline = live.trust.load(Ordering::Acquire);
        let now = live.cache_now();
        let mut pipe = Pipeline::with_capacity(fills.len());
        for (place, ticket, fill) in fills {
            let value = entry::valid(place.key, ticket.tag, fill, now);
            let life = millis(fill.ttl.saturating_add(fill.grace));
            pipe.add_command(self.shared.scripts.fill(place.key, &ticket.fence.0, &value, life));
        }
        let replies = self.scripts(&live, &pipe).await?;
        let read = |reply: Value| match reply {
            Value::BulkString(word) if word == b"stored" => Ok(Filled::Stored),
            Value::BulkString(word) if word == b"fenced" => Ok(Filled::Fenced),
            Value::BulkString(word) if word == b"gone" => Ok(Filled::Gone),
            _ => Err(CacheError::Refused),
        };
        let verdicts = replies.into_iter().map(read).collect();
        // "Stored" means that nothing was invalidated meanwhile; while this process owes invalidations that is not known.
        self.trusted(deadline)?;
        verdicts
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
        let outcome = async {
            let live = self.live().await?;
            let mut cmd = redis::cmd("UNLINK");
            cmd.arg(keys);
            self.ask(&live, cmd).await.map(drop)
        };
        let outcome = outcome.await;
        if outcome.is_err() {
            self.shared.owe(keys);
            self.lane.wake.notify_one();
        }
        outcome
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let live = self.live().await?;
        let mut cmd = redis::cmd("HSET");
        cmd.arg(&self.shared.control_key).arg(Control::field(resource)).arg(fastrand::u64(1..));
        self.ask(&live, cmd).await?;
        // This process knows the new generation before it answers; the others at their next look.
        self.shared.mistrust();
        self.lane.wake.notify_one();
        Ok(())
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let live = self.live().await?;
        let mut get = redis::cmd("GET");
        get.arg(place.key);
        let value = self.ask(&live, get).await?;
        let size = if let Value::BulkString(bytes) = &value { bytes.len() } else { 0 };
        let held = match value {
            Value::BulkString(bytes) => entry::decode(place.key, &Bytes::from(bytes), live.cache_now()),
            _ => None,
        };
        Ok(Inspection::of(held, size, Self::tag(&live, &place)))
    }
}
