//! What a caller is told when there is no answer.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use crate::aside::ReadError;
use crate::cache::CacheError;
use crate::store::StoreError;
#[cfg(feature = "store")]
use crate::store::WriteError;
use crate::store::loader::Fault;

/// Why there is no answer. A cache that is away is no reason: reads go past it then.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// What was configured can't be used.
    Config(String),
    /// The loader failed, and nothing stale may be served. [`source`](StdError::source) is its own error, the same one for
    /// all who waited for that load; the next call tries again.
    Loader(Arc<dyn StdError + Send + Sync>),
    /// The loader panicked. The next call tries again.
    Panicked,
    /// The loader gave more or fewer values than it was asked for.
    Count {
        /// Keys it was given.
        asked: usize,
        /// Values it gave.
        came: usize,
    },
    /// The load or the call took longer than it may.
    TimedOut,
    /// The key has no text, or none from which it comes back.
    Key(String),
    /// A value can't be written as JSON, or what was just loaded can't be read as the type that was asked for.
    Value(Arc<serde_json::Error>),
    /// It is not in the cache, and nothing else was asked for.
    NotCached,
    /// The cache could not be told of an invalidation. It will be, before this process reads from it again; until then
    /// other processes may find what was there.
    InvalidationPending(CacheError),
    /// The database could not be read.
    Database(StoreError),
    /// There is no table or statement of this name, or it can't be served now; the sentence says why.
    NotServed(String),
    /// Nothing was written, or nobody knows whether.
    #[cfg(feature = "store")]
    Write(WriteError),
    /// Not every write could be told to the cache in this time: what is there may be stale until its TTL ends.
    Unsettled(Duration),
}

/// Of reads, writes and set-up.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl std::fmt::Display for Error {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Config(words) | Self::NotServed(words) => out.write_str(words),
            Self::Loader(error) => write!(out, "the loader failed: {error}"),
            Self::Panicked => out.write_str("the loader panicked"),
            Self::Count { asked, came } => write!(out, "the loader gave {came} values for {asked} keys"),
            Self::TimedOut => out.write_str("loading took too long"),
            Self::Key(words) => write!(out, "the key can't be used: {words}"),
            Self::Value(error) => write!(out, "the value is of another type: {error}"),
            Self::NotCached => out.write_str("it is not in the cache"),
            Self::InvalidationPending(error) => write!(out, "the cache was not told yet: {error}"),
            Self::Database(error) => write!(out, "{error}"),
            #[cfg(feature = "store")]
            Self::Write(error) => match error {
                WriteError::NotFound => out.write_str("there is no such row"),
                WriteError::PreconditionFailed => out.write_str("the row is not what it was said to be"),
                WriteError::Conflict { detail, .. } | WriteError::Violation { detail, .. } => out.write_str(detail),
                WriteError::Unknown(_) => {
                    out.write_str("the connection was lost while committing: it may have been written or not")
                }
                WriteError::Untold => out.write_str("the cache can't be told before the commit: nothing was written"),
                WriteError::Store(error) => write!(out, "{error}"),
            },
            Self::Unsettled(patience) => {
                write!(out, "the cache was not told of every write within {} s", patience.as_secs_f64())
            }
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Loader(error) => Some(error.as_ref()),
            Self::Value(error) => Some(error.as_ref()),
            Self::InvalidationPending(error) => Some(error),
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::Value(error.into())
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::TimedOut => Self::TimedOut,
            StoreError::Loader(error) => match error.0.downcast_ref::<Fault>() {
                Some(Fault::Panicked) => Self::Panicked,
                Some(Fault::Count { asked, came }) => Self::Count { asked: *asked, came: *came },
                None => match error.0.downcast_ref::<Self>() {
                    Some(own) => own.clone(),
                    None => Self::Loader(error.0),
                },
            },
            error => Self::Database(error),
        }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Store(error) => error.into(),
            ReadError::NotCached => Self::NotCached,
            ReadError::TimedOut => Self::TimedOut,
            ReadError::Failed => Self::Panicked,
        }
    }
}

#[cfg(feature = "store")]
impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        Self::Write(error)
    }
}
