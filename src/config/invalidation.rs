//! `invalidation:` how changes of other writers reach the cache.

use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "config")]
use super::forms;
use super::{Config, units};

/// How the cache learns of changes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Invalidation {
    /// Where changes are read from. Default `outbox`.
    pub mode: InvalidationMode,
    /// No unmarked hit is further behind the database than this; more than 0. Default `1s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub max_staleness: Duration,
}

impl Default for Invalidation {
    fn default() -> Self {
        Self { mode: InvalidationMode::Outbox, max_staleness: Duration::from_secs(1) }
    }
}

/// Where changes are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum InvalidationMode {
    /// Triggers that write changes into an outbox table.
    Outbox,
    /// Logical replication.
    Wal,
    /// The service's own writes and TTLs alone.
    None,
}

impl Config {
    /// How far behind the database a hit may be, where changes by others are to be seen; `None`: own writes and TTLs alone.
    #[must_use]
    pub fn watermark(&self) -> Option<Duration> {
        // SQLite tells nobody of changes.
        let told = self.invalidation.mode != InvalidationMode::None && self.database.url.scheme() != "sqlite";
        told.then_some(self.invalidation.max_staleness)
    }
}
