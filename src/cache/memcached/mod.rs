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
mod fill;
mod key;
mod lane;
mod locks;
mod look;
mod node;
mod operations;
mod read;
mod shared;
mod steps;
mod trust;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub use self::node::MemcachedNode;
use self::shared::Shared;
use super::lane::Lane;
use super::{CacheError, Memory};
use crate::catalog::Mapping;
use crate::config;

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
}
