//! Redis and Valkey: a pipelined GET on the hot path, scripts only where a fence must be compared.
//!
//! Requests share one multiplexed connection per worker (a *lane*) and never check one out: see
//! `docs/adr/0001-lanes.md`. The pool makes and counts the connections; supervisors hold them.

pub mod cluster;

mod ask;
#[cfg(test)]
mod fake;
mod filter;
mod judge;
mod lane;
mod lease;
mod local;
mod look;
mod node;
#[cfg(feature = "server")]
mod note;
mod operations;
mod rights;
mod script;
mod sentinel;
mod shared;
mod tier;
mod trouble;
mod trust;
mod unlink;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

pub use self::filter::{FilterState, Sizes};
use self::local::Local;
pub use self::node::RedisNode;
use self::sentinel::Sentinels;
use self::shared::Shared;
pub use self::tier::Building;
use super::lane::Lane;
use super::{CacheError, Memory};
use crate::catalog::Mapping;
use crate::config;

/// A handle on a Redis server, with a lane of its own in the runtime that made it.
#[derive(Clone)]
pub struct RedisCache {
    shared: Arc<Shared>,
    lane: Arc<Lane<Shared>>,
    local: Option<Arc<Local>>,
}

impl std::fmt::Debug for RedisCache {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("RedisCache").field("health", &self.health()).finish_non_exhaustive()
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
        self.lane.settled(patience).await;
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
        self.lane.health()
    }

    /// What the server says of itself, for `check`: `INFO` as text, or why there is none in words. A lane that was not tried
    /// yet is waited for, for `patience` at most.
    pub(super) async fn info(&self, patience: Duration) -> Result<String, String> {
        self.lane.turned(patience, |lane| !lane.untried()).await;
        let asked = async {
            let live = self.lane.live().await?;
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
        self.shared.debts.owes()
    }

    /// The number of open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections()
    }
}
