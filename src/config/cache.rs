//! `cache:` the memory in front of the database.

use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::Deserialize;

#[cfg(feature = "config")]
use super::forms;
use super::{SecretUrl, units};

/// The cache.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    /// `redis://`, `rediss://`, `valkey://`, `valkeys://`, `redis+sentinel://h1,h2,h3/NAME`, `redis+cluster://h1,h2,h3`,
    /// `rediss+cluster://h1,h2,h3`, `memcached://` or `memory:` (in this process alone). Also `CACHE_URL` or
    /// `REDIS_URL`, or composed of `CACHE_ENGINE CACHE_HOST CACHE_PORT`. Default `memory:`, where none of these says
    /// otherwise.
    #[cfg_attr(feature = "config", schemars(extend("default" = "memory:")))]
    pub url: SecretUrl,
    /// Stands before every key, for a server that several services share; in a cluster without braces. Default: nothing.
    pub key_prefix: String,
    /// The most that one cache operation may take, more than 0; past it the read goes to the database. Default `100ms`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub timeout: Duration,
    /// Larger entries are served and not cached; at least 1 byte. Default `1MiB`.
    #[serde(with = "units::size")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Size"))]
    pub max_entry: usize,
    /// Larger entries are packed (LZ4) on their way to Redis or Memcached; `max_entry` is about their size before. `0B`: none
    /// are. Default `0B`.
    #[serde(with = "units::size")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Size"))]
    pub compress_above: usize,
    /// The in-process tier, and the size of a `memory:` cache.
    pub local: Local,
    /// A file of certificates (PEM) to trust instead of the system's. Default: none.
    #[serde(deserialize_with = "units::some_text")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Text"))]
    pub ca_file: Option<PathBuf>,
}

/// The in-process tier.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Local {
    /// The most that it holds, at least 1 byte. Default `64MiB`.
    #[serde(with = "units::size")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Size"))]
    pub max_bytes: usize,
    /// The most that each resource's filter takes (`filter: true`), at least 1 byte. It takes half of that at most, so that it can answer
    /// while it is built anew, and 12 bits for each key. Default `64MiB`.
    #[serde(with = "units::size")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Size"))]
    pub filter_max_bytes: usize,
    /// A new replica reads what is hot at others from the cache before it is ready, for two seconds at most; with `redis://` or
    /// `valkey://`, for what has a `local_ttl` or `local_hot_ttl`. Default `false`.
    #[serde(deserialize_with = "units::flag")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Flag"))]
    pub warm_start: bool,
}

impl Default for Local {
    fn default() -> Self {
        Self { max_bytes: 64 << 20, filter_max_bytes: 64 << 20, warm_start: false }
    }
}

impl Cache {
    /// From how many bytes on payloads are packed; `None`: none are.
    #[must_use]
    pub fn packs_above(&self) -> Option<usize> {
        (self.compress_above > 0).then_some(self.compress_above)
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            url: SecretUrl::new("memory:"),
            key_prefix: String::new(),
            timeout: Duration::from_millis(100),
            max_entry: 1 << 20,
            compress_above: 0,
            local: Local::default(),
            ca_file: None,
        }
    }
}
