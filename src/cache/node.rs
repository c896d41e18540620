//! A memory as those who keep it current see it: looked at, and brought a step further.

use std::future::Future;

use super::CacheError;
use super::control::{Control, Ids};
#[cfg(feature = "memcached")]
use super::memcached::MemcachedNode;
use super::memory::MemoryNode;
#[cfg(feature = "redis")]
use super::redis::RedisNode;
use super::slots::Holdings;

/// What a look found. A round that began with it must end on the same connection.
#[derive(Clone, Debug, Default)]
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "what only some memories have"))]
pub struct Looked {
    /// The control key.
    pub control: Control,
    /// The memory's clock, in milliseconds.
    pub now: u64,
    /// Which memory it is now; what it was when it last caught up is in the control key.
    pub ids: Ids,
    /// The hash slots that a node of a cluster has now.
    pub(super) holdings: Option<Holdings>,
    /// The connection that was looked over.
    pub(super) connection: u64,
    /// When the answer was there, in milliseconds of this process's clock.
    pub(super) seen: u64,
}

/// One step: what to invalidate, and what the memory has caught up with then.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// The point in the database's history, in the store's words.
    pub point: String,
    /// The database.
    pub origin: String,
    /// Cache keys to drop before.
    pub drop: Vec<String>,
    /// Cache keys to drop before, unless a writer holds them.
    pub spare: Vec<String>,
    /// Resources that get a new generation.
    pub renew: Vec<String>,
    /// Everything here becomes absent: what it missed is not known.
    pub anew: bool,
}

/// A memory that can be brought up to date.
pub trait Node: Send + Sync {
    /// Its control key, clock and identity, in one round trip.
    fn look(&self) -> impl Future<Output = Result<Looked, CacheError>> + Send;

    /// Drops what is to be dropped, then moves the watermark in one step, unless somebody else did so since the look, or
    /// the memory is another one: then the answer is false.
    fn advance(&self, looked: &Looked, step: &Step) -> impl Future<Output = Result<bool, CacheError>> + Send;

    /// Whether this key may be here, as of that look: in a cluster, most are elsewhere.
    fn concerns(&self, looked: &Looked, key: &str) -> bool {
        let _ = (looked, key);
        true
    }

    /// Tells readers whether the database answered: where it does not, what is here is served although nobody knows
    /// how old it is.
    fn database_answers(&self, yes: bool);
}

/// The memory of a running service.
#[derive(Debug)]
pub enum AnyNode {
    /// Redis or Valkey.
    #[cfg(feature = "redis")]
    Redis(Box<RedisNode>),
    /// Memcached.
    #[cfg(feature = "memcached")]
    Memcached(Box<MemcachedNode>),
    /// In this process.
    Memory(MemoryNode),
}

impl AnyNode {
    /// What it is called.
    #[must_use]
    pub fn address(&self) -> &str {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(node) => node.address(),
            #[cfg(feature = "memcached")]
            Self::Memcached(node) => node.address(),
            Self::Memory(_) => "memory",
        }
    }
}

impl Node for AnyNode {
    async fn look(&self) -> Result<Looked, CacheError> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(node) => node.look().await,
            #[cfg(feature = "memcached")]
            Self::Memcached(node) => node.look().await,
            Self::Memory(node) => node.look().await,
        }
    }

    async fn advance(&self, looked: &Looked, step: &Step) -> Result<bool, CacheError> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(node) => node.advance(looked, step).await,
            #[cfg(feature = "memcached")]
            Self::Memcached(node) => node.advance(looked, step).await,
            Self::Memory(node) => node.advance(looked, step).await,
        }
    }

    fn concerns(&self, looked: &Looked, key: &str) -> bool {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(node) => node.concerns(looked, key),
            #[cfg(feature = "memcached")]
            Self::Memcached(node) => node.concerns(looked, key),
            Self::Memory(node) => node.concerns(looked, key),
        }
    }

    fn database_answers(&self, yes: bool) {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(node) => node.database_answers(yes),
            #[cfg(feature = "memcached")]
            Self::Memcached(node) => node.database_answers(yes),
            Self::Memory(node) => node.database_answers(yes),
        }
    }
}
