//! Whichever memory a service has, chosen once: what it is asked goes to that adapter.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use super::entry::Fence;
#[cfg(feature = "memcached")]
use super::memcached::MemcachedCache;
use super::memory::MemoryCache;
#[cfg(feature = "redis")]
use super::redis::{RedisCache, cluster::ClusterCache};
use super::{AnyNode, Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Memory, Place, Ticket};
use crate::catalog::Mapping;
use crate::shield::State;

/// The memory of a running service, chosen once from the URL's scheme.
#[derive(Clone, Debug)]
pub enum AnyCache {
    /// Redis or Valkey.
    #[cfg(feature = "redis")]
    Redis(RedisCache),
    /// Redis or Valkey, in a cluster.
    #[cfg(feature = "redis")]
    Cluster(ClusterCache),
    /// Memcached.
    #[cfg(feature = "memcached")]
    Memcached(MemcachedCache),
    /// In this process.
    Memory(MemoryCache),
}

impl AnyCache {
    /// A handle whose connection lives in the runtime that calls this, so that its replies wake no other thread.
    #[must_use]
    pub fn attach(&self) -> Self {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => Self::Redis(cache.attach()),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => Self::Cluster(cache.attach()),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => Self::Memcached(cache.attach()),
            Self::Memory(cache) => Self::Memory(cache.clone()),
        }
    }

    /// The engine's name in `Cache-Status`.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(_) | Self::Cluster(_) => "redis",
            #[cfg(feature = "memcached")]
            Self::Memcached(_) => "memcached",
            Self::Memory(_) => "memory",
        }
    }

    /// Open connections; none for a memory in this process.
    #[must_use]
    pub fn connections(&self) -> usize {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.connections(),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.connections(),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.connections(),
            Self::Memory(_) => 0,
        }
    }

    /// Whether invalidations that failed wait for delivery.
    #[must_use]
    pub fn owes(&self) -> bool {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.owes(),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.owes(),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.owes(),
            Self::Memory(_) => false,
        }
    }

    /// Whether it can be used now, in words.
    ///
    /// # Errors
    ///
    /// What keeps it from being used.
    pub fn health(&self) -> Result<(), CacheError> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.health(),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.health(),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.health(),
            Self::Memory(cache) => cache.health(),
        }
    }

    /// What brings the memories that it consists of up to date, each with a number that no other gets; none where nobody is
    /// to.
    #[must_use]
    pub fn nodes(&self) -> Vec<(u64, AnyNode)> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.node().map(|node| (0, AnyNode::Redis(Box::new(node)))).into_iter().collect(),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => {
                cache.nodes().into_iter().map(|(number, node)| (number, AnyNode::Redis(Box::new(node)))).collect()
            }
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => {
                cache.node().map(|node| (0, AnyNode::Memcached(Box::new(node)))).into_iter().collect()
            }
            Self::Memory(cache) => cache.node().map(|node| (0, AnyNode::Memory(node))).into_iter().collect(),
        }
    }

    /// Resolves when [`Self::nodes`] may be others than when this was called.
    #[must_use]
    pub fn changed(&self) -> BoxFuture<'_, ()> {
        match self {
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.changed(),
            #[cfg(feature = "redis")]
            Self::Redis(_) => Box::pin(std::future::pending()),
            #[cfg(feature = "memcached")]
            Self::Memcached(_) => Box::pin(std::future::pending()),
            Self::Memory(_) => Box::pin(std::future::pending()),
        }
    }

    /// The memories that it consists of.
    #[must_use]
    pub fn memories(&self) -> Vec<Memory> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => vec![cache.memory()],
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.memories(),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => vec![cache.memory()],
            Self::Memory(cache) => {
                let (health, staleness) = (cache.health(), cache.staleness());
                vec![Memory { address: "memory".into(), health, staleness, breaker: None }]
            }
        }
    }

    /// Whether this process holds the entry of a key itself.
    #[must_use]
    pub fn in_process(&self, key: &str) -> bool {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.in_process(key),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.in_process(key),
            #[cfg(feature = "memcached")]
            Self::Memcached(_) => false,
            Self::Memory(cache) => cache.in_process(key),
        }
    }

    /// The breakers, by what they are called in metrics: a server by its engine, the nodes of a cluster by their addresses. A
    /// cluster of which no node is known yet is one that can't be asked.
    #[must_use]
    pub fn breakers(&self, memories: &[Memory]) -> Vec<(String, State)> {
        let named = |name: &str, memory: &Memory| Some((name.to_owned(), memory.breaker?));
        match self {
            #[cfg(feature = "redis")]
            Self::Cluster(_) if memories.is_empty() => vec![(self.engine().to_owned(), State::Open)],
            #[cfg(feature = "redis")]
            Self::Cluster(_) => memories.iter().filter_map(|memory| named(&memory.address, memory)).collect(),
            _ => memories.iter().filter_map(|memory| named(self.engine(), memory)).collect(),
        }
    }

    /// What each server says of itself, by its address: `INFO` as text, or why there is none in words. Those that were not
    /// tried yet are waited for, for `patience` at most.
    #[cfg_attr(not(feature = "redis"), allow(clippy::unused_async, reason = "only servers are asked"))]
    pub async fn infos(&self, patience: Duration) -> Vec<(String, Result<String, String>)> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => vec![(cache.address().to_owned(), cache.info(patience).await)],
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.infos(patience).await,
            #[cfg(feature = "memcached")]
            Self::Memcached(_) => Vec::new(),
            Self::Memory(_) => {
                _ = patience;
                Vec::new()
            }
        }
    }

    /// How far behind the database what is here is at most, in milliseconds; `None` where nobody knows.
    #[must_use]
    pub fn staleness(&self) -> Option<u64> {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.staleness(),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.staleness(),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.staleness(),
            Self::Memory(cache) => cache.staleness(),
        }
    }

    /// Waits until there is a connection, for `patience` at most.
    #[cfg_attr(
        not(any(feature = "redis", feature = "memcached")),
        allow(clippy::unused_async, reason = "only servers are waited for")
    )]
    pub async fn connected(&self, patience: Duration) {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.connected(patience).await,
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.connected(patience).await,
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.connected(patience).await,
            // It is here.
            Self::Memory(_) => _ = patience,
        }
    }

    /// Declares what will be cached and which changes concern it, and waits until that is known there, for `patience` at
    /// most: until then nothing is read from it.
    pub async fn declare(&self, mappings: HashMap<String, Mapping>, patience: Duration) {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => {
                cache.declare(mappings);
                cache.settled(patience).await;
            }
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => {
                cache.declare(mappings);
                cache.settled(patience).await;
            }
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => {
                cache.declare(mappings);
                cache.settled(patience).await;
            }
            Self::Memory(cache) => {
                cache.declare(mappings);
                let waiting = async {
                    while cache.health().is_err() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                // Either way, what counts is how things are then.
                let _ = tokio::time::timeout(patience, waiting).await;
            }
        }
    }
}

macro_rules! each {
    ($self:ident, $cache:ident => $call:expr) => {
        match $self {
            #[cfg(feature = "redis")]
            AnyCache::Redis($cache) => $call.await,
            #[cfg(feature = "redis")]
            AnyCache::Cluster($cache) => $call.await,
            #[cfg(feature = "memcached")]
            AnyCache::Memcached($cache) => $call.await,
            AnyCache::Memory($cache) => $call.await,
        }
    };
}

impl Cache for AnyCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        each!(self, cache => cache.read(place))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        each!(self, cache => cache.read_many(places))
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        each!(self, cache => cache.lease(places, lock))
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        each!(self, cache => cache.renew(held, lock))
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        each!(self, cache => cache.fill(fills))
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        each!(self, cache => cache.release(held))
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        each!(self, cache => cache.invalidate(keys))
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        each!(self, cache => cache.hold(keys, owner, time))
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        each!(self, cache => cache.invalidate_unless_held(keys, owner))
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        each!(self, cache => cache.invalidate_everywhere(keys))
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        each!(self, cache => cache.purge(resource))
    }

    fn answered_since(&self, key: &str, moment: Instant) -> bool {
        match self {
            #[cfg(feature = "redis")]
            Self::Redis(cache) => cache.answered_since(key, moment),
            #[cfg(feature = "redis")]
            Self::Cluster(cache) => cache.answered_since(key, moment),
            #[cfg(feature = "memcached")]
            Self::Memcached(cache) => cache.answered_since(key, moment),
            Self::Memory(cache) => cache.answered_since(key, moment),
        }
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        each!(self, cache => cache.inspect(place))
    }
}
