//! A value, and how it came.

use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::aside::{Answer, Forward, Source, Status};

/// A value, and how it came.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
/// # let cache = cache_aside::CacheAside::builder().build().await?;
/// # let halves = cache.entries::<u32, u32>("halves").loader_each(async |id: u32| Ok::<_, std::io::Error>(Some(id / 2)));
/// assert_eq!(halves.fetch(&8).await?.status.to_string(), "miss, stored");
/// let again = halves.fetch(&8).await?;
/// assert_eq!((again.value, again.status.to_string().as_str()), (Some(4), "hit"));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fetched<T> {
    /// The value.
    pub value: T,
    /// Where it came from, and why.
    pub status: Status,
    /// How long ago it was stored; zero for what was just loaded.
    pub age: Duration,
    /// It is known to be as current as was promised. False only where the database that tells of changes does not answer.
    pub verified: bool,
    /// A list or result was cut by its limit.
    pub truncated: bool,
}

impl<T> Fetched<T> {
    /// Whether it came out of the cache, within its TTL.
    #[must_use]
    pub fn is_hit(&self) -> bool {
        self.status.forward.is_none()
    }

    /// Whether it is past its TTL: served because loading failed, or while it is loaded anew.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.status.forward == Some(Forward::Stale) && self.status.source == Source::Cache
    }

    /// What is known without asking anybody: no row can have such a key.
    #[cfg(feature = "store")]
    pub(super) fn impossible(value: T) -> Self {
        let (cache, database) = (Duration::ZERO, Duration::ZERO);
        let (source, forward) = (Source::Database, Some(Forward::Bypass));
        let status = Status { source, forward, stored: false, collapsed: false, cache, database };
        Self { value, status, age: Duration::ZERO, verified: true, truncated: false }
    }

    /// The same with another value.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Fetched<U> {
        let Self { value, status, age, verified, truncated } = self;
        Fetched { value: change(value), status, age, verified, truncated }
    }
}

impl<T: DeserializeOwned> Fetched<Option<T>> {
    /// Reads the value of an answer.
    pub(super) fn read(answer: &Answer) -> Result<Self, serde_json::Error> {
        let Answer { entry, status } = answer;
        let value = if entry.negative { None } else { Some(serde_json::from_slice(&entry.payload)?) };
        Ok(Self {
            value,
            status: *status,
            age: Duration::from_millis(entry.age_ms),
            verified: entry.verified,
            truncated: entry.truncated,
        })
    }
}
