//! What a reader asks for, and what it gets.

use std::time::Duration;

use tokio::time::Instant;

use crate::cache::entry::Entry;
use crate::store::StoreError;
use crate::telemetry::Outcome;

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Read the database and refill, whatever the cache holds.
    pub refresh: bool,
    /// Answer from the cache or not at all.
    pub only_if_cached: bool,
    /// No answer is of use after this.
    pub deadline: Instant,
}

/// Where the bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The cache.
    Cache,
    /// The database.
    Database,
}

/// Why the cache alone could not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// It was not there.
    Miss,
    /// It was past its TTL.
    Stale,
    /// The client insisted.
    Request,
    /// The cache can't be used, or not for this.
    Bypass,
}

/// How an answer came to be: `Cache-Status` in types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Where the bytes came from.
    pub source: Source,
    /// Why the cache alone could not answer; `None` for a hit.
    pub forward: Option<Forward>,
    /// It is in the cache now.
    pub stored: bool,
    /// Another request's load answered this one too.
    pub collapsed: bool,
    /// Time spent with the cache.
    pub cache: Duration,
    /// Time spent with the database, in this request or the one that it waited for.
    pub database: Duration,
}

impl Status {
    /// What this counts as.
    #[must_use]
    pub fn outcome(&self, entry: &Entry) -> Outcome {
        match (self.forward, self.source) {
            (None, _) if entry.local && entry.negative => Outcome::LocalNegative,
            (None, _) if entry.local => Outcome::LocalHit,
            (None, _) if entry.negative => Outcome::Negative,
            (None, _) => Outcome::Hit,
            (Some(Forward::Stale), Source::Cache) => Outcome::Stale,
            (Some(Forward::Miss | Forward::Stale), _) => Outcome::Miss,
            (Some(Forward::Request), _) => Outcome::Refresh,
            (Some(Forward::Bypass), _) => Outcome::Bypass,
        }
    }
}

/// For people: `hit`, `stale`, `miss, stored`, `refresh`, `bypass`.
impl std::fmt::Display for Status {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match (self.forward, self.source) {
            (None, _) => "hit",
            (Some(Forward::Stale), Source::Cache) => "stale",
            (Some(Forward::Miss | Forward::Stale), _) => "miss",
            (Some(Forward::Request), _) => "refresh",
            (Some(Forward::Bypass), _) => "bypass",
        })?;
        if self.stored {
            out.write_str(", stored")?;
        }
        if self.collapsed { out.write_str(", another's load") } else { Ok(()) }
    }
}

/// An entry and how it came to be answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The entry; it may say "not found".
    pub entry: Entry,
    /// How it came.
    pub status: Status,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The store said so.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is not in the cache, and the client wanted nothing else.
    #[error("it is not in the cache")]
    NotCached,
    /// The request's time is over.
    #[error("the request took too long")]
    TimedOut,
    /// Loads of it end without a result, again and again.
    #[error("loading it failed unexpectedly")]
    Failed,
}

impl ReadError {
    /// A label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Store(error) => error.kind(),
            Self::NotCached => "not_cached",
            Self::TimedOut => "timeout",
            Self::Failed => "failed",
        }
    }
}
