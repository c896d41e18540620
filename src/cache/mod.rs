//! Where entries are kept: one trait, its verdicts, and the adapters behind it.
//!
//! A memory is told four things: *read* this entry, *lease* me the right to fill it, *fill* it, and
//! *invalidate* it. What makes this safe is the fence: a lease puts a fresh random token into the entry,
//! a fill is accepted only while that token is still there, and an invalidation, an eviction, an expiry
//! or a restart destroys it. So a value that was read from the database before a change can never be
//! stored after that change's invalidation, however long its filler slept.
//!
//! Adapters judge nothing else. Whether to load, wait or serve old data is decided in [`crate::aside`].

pub mod entry;

#[cfg_attr(
    not(any(feature = "redis", feature = "memcached")),
    allow(dead_code, reason = "what only shared memories need")
)]
pub mod control;
#[cfg(any(feature = "redis", feature = "memcached"))]
mod lane;
#[cfg_attr(
    not(any(feature = "redis", feature = "memcached")),
    allow(dead_code, reason = "what only shared memories need")
)]
pub mod node;
#[cfg(any(feature = "redis", feature = "memcached"))]
mod pack;
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "what only shared memories need"))]
mod slots;

#[cfg(feature = "memcached")]
pub mod memcached;
pub mod memory;
#[cfg(feature = "redis")]
pub mod redis;

mod any;

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub use any::AnyCache;
use entry::{Entry, Fence, Held};
pub use node::{AnyNode, Looked, Node, Step};

use crate::shield::State;

/// Where an entry is kept, and what its value must be the shape of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The cache key.
    pub key: &'a str,
    /// The resource whose generation the entry shares.
    pub resource: &'a str,
    /// The fingerprint of what decides the entry's bytes: another one is another entry.
    pub shape: u64,
    /// The cache keys of generations that the entry depends on too.
    pub groups: &'a [String],
    /// How long an in-process tier may hold it; zero: not at all.
    pub local_ttl: Duration,
    /// A filter in the process may say that there is no such row.
    pub filtered: bool,
    /// To a lease, the entry that was stored then counts as past its TTL though it is fresh: it is to be refreshed. In
    /// milliseconds of the cache's clock; zero: none is.
    pub refreshes: u64,
    /// Writers hold such entries while they commit; one that can't be known to be current is never used.
    pub strict: bool,
}

/// What a read found.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// An entry within its TTL.
    Fresh(Entry),
    /// An entry past its TTL, kept for when the database fails or while it is refreshed.
    Soft(Entry),
    /// Somebody is filling it.
    Pending,
    /// Nothing, or nothing that this version, shape and generation can use.
    Absent,
}

/// What became of the wish to fill an entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Lease {
    /// Fill it, with this ticket. `stale` is what is there until then.
    Fill {
        /// The right to fill.
        ticket: Ticket,
        /// The entry past its TTL that is being refreshed.
        stale: Option<Entry>,
    },
    /// Somebody else is filling it.
    Wait {
        /// The entry past its TTL that is being refreshed.
        stale: Option<Entry>,
    },
    /// It was filled meanwhile.
    Hit(Entry),
    /// Not to be filled now: it belongs to another shape of the same resource (a rolling update), or a writer holds
    /// it. Read the database and store nothing.
    Past,
}

/// The right to fill one entry. It is void as soon as the entry's fence is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The random token that the lease wrote.
    pub fence: Fence,
    /// The version, shape, epoch and generation under which the lease was given: a fill carries those of its lease.
    pub tag: u64,
    /// The connection that gave the lease: a fill over another one proves nothing.
    pub connection: u64,
}

/// What is to be stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Fill {
    /// The bytes as they are served; empty for "not found".
    pub payload: Bytes,
    /// The payload's fingerprint.
    pub etag: u128,
    /// This is a "not found".
    pub negative: bool,
    /// The list was cut by its limit.
    pub truncated: bool,
    /// Fresh for this long.
    pub ttl: Duration,
    /// Kept for this much longer.
    pub grace: Duration,
    /// What loading it took.
    pub cost: Duration,
    /// A fingerprint of the database that it was read from; a memory that caught up with another one refuses it.
    pub origin: u64,
}

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// It is stored.
    Stored,
    /// Refused: the entry was invalidated, and leased again or filled by another.
    Fenced,
    /// Refused: the entry was invalidated, evicted, or its lock ended.
    Gone,
    /// Refused: the memory takes nothing so large. What was there is gone.
    TooBig,
}

/// What a memory holds under a key, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspection {
    /// `absent`, `pending`, `held` (by a writer), `valid`, `expired` (past its TTL) or `unusable` (another version, shape or generation).
    pub state: &'static str,
    /// Seconds since it was stored.
    pub age: Option<f64>,
    /// Seconds until its TTL ends; negative past it.
    pub ttl: Option<f64>,
    /// Bytes held.
    pub size: usize,
    /// It says "not found".
    pub negative: bool,
}

impl Inspection {
    /// What a held value says, to a reader who would use only entries of this `tag`.
    #[must_use]
    pub fn of(held: Option<Held>, size: usize, wanted: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "seconds for people; no entry lives long enough to matter")]
        let seconds = |milliseconds: i64| milliseconds as f64 / 1000.0;
        let bare = |state| Self { state, age: None, ttl: None, size, negative: false };
        match held {
            None if size == 0 => bare("absent"),
            None => bare("unusable"),
            Some(Held::Pending) => bare("pending"),
            Some(Held::Reserved) => bare("held"),
            Some(Held::Valid { tag, .. }) if tag != wanted => bare("unusable"),
            Some(Held::Valid { entry, .. }) => Self {
                state: if entry.ttl_ms > 0 { "valid" } else { "expired" },
                age: Some(seconds(i64::try_from(entry.age_ms).unwrap_or(i64::MAX))),
                ttl: Some(seconds(entry.ttl_ms)),
                size,
                negative: entry.negative,
            },
        }
    }
}

/// Why a memory could not be asked. The heart counts it and does without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// No connection that can be used now.
    #[error("no connection to the cache that answers")]
    Disconnected,
    /// No answer in time.
    #[error("the cache did not answer in time")]
    TimedOut,
    /// Connected, but it is not known whether what it holds is current.
    #[error("the cache can't be trusted at the moment")]
    Untrusted,
    /// Another node of the cluster has it, or may have it.
    #[error("another node of the cluster has the key")]
    Elsewhere,
    /// It answered with an error (out of memory, read only, loading), or with nonsense.
    #[error("the cache refused the command")]
    Refused,
}

impl CacheError {
    /// A label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::TimedOut => "timeout",
            Self::Untrusted => "untrusted",
            Self::Elsewhere => "elsewhere",
            Self::Refused => "refused",
        }
    }
}

/// A memory for entries. Each method is one round trip, whatever the number of entries, and ends within
/// the configured timeout.
pub trait Cache: Send + Sync {
    /// Looks at one entry: the hot path.
    fn read(&self, place: Place<'_>) -> impl Future<Output = Result<Lookup, CacheError>> + Send;

    /// Looks at many entries, answering in their order.
    fn read_many(&self, places: &[Place<'_>]) -> impl Future<Output = Result<Vec<Lookup>, CacheError>> + Send;

    /// Asks for the right to fill entries. The lock of each ends after `lock` unless it is renewed.
    fn lease(
        &self,
        places: &[Place<'_>],
        lock: Duration,
    ) -> impl Future<Output = Result<Vec<Lease>, CacheError>> + Send;

    /// Makes the locks of live tickets last for `lock` from now.
    fn renew(
        &self,
        held: &[(Place<'_>, Ticket)],
        lock: Duration,
    ) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Stores values under tickets that are still good.
    fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)])
    -> impl Future<Output = Result<Vec<Filled>, CacheError>> + Send;

    /// Gives tickets back unused, so that nobody waits for them.
    fn release(&self, held: &[(Place<'_>, Ticket)]) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Destroys entries together with the fences of fills under way. Idempotent.
    ///
    /// Where it fails, the adapter owes these invalidations: it delivers them before it lets anything that it holds be
    /// read again by this process.
    fn invalidate(&self, keys: &[&str]) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Puts a hold in place of whatever is there: nobody fills these entries until their `owner` gives them up, or for
    /// `time`. A later writer's hold takes the place of an earlier one's.
    fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Like [`Self::invalidate`], but leaves holds alone, save those of this `owner`.
    fn invalidate_unless_held(
        &self,
        keys: &[&str],
        owner: Option<Fence>,
    ) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// The same as [`Self::invalidate`], and it is told to the in-process tiers of all processes, where it takes effect within their next looks.
    fn invalidate_everywhere(&self, keys: &[&str]) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Makes all entries of a resource absent, by giving it a new generation.
    fn purge(&self, resource: &str) -> impl Future<Output = Result<(), CacheError>> + Send;

    /// Whether anything was answered since `moment` by whoever has this key: then a reply that did not come in time was late
    /// on its way, and the memory does not hang.
    fn answered_since(&self, _key: &str, _moment: Instant) -> bool {
        true
    }

    /// What is there.
    fn inspect(&self, place: Place<'_>) -> impl Future<Output = Result<Inspection, CacheError>> + Send;
}

/// How one memory is that a cache consists of.
#[derive(Clone, Debug)]
pub struct Memory {
    /// What it is called in metrics.
    pub address: String,
    /// Whether it can be used now.
    pub health: Result<(), CacheError>,
    /// How far behind the database it is at most, in milliseconds; `None` where nobody knows.
    pub staleness: Option<u64>,
    /// Whether it is asked; `None` for a memory in this process.
    pub breaker: Option<State>,
}
