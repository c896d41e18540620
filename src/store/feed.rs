//! What changed in a database, whichever it is.

#[cfg(feature = "mysql")]
use super::mysql;
#[cfg(feature = "postgres")]
use super::postgres;
use super::{Owed, StoreError};

/// A connection of its own to what changed. A running service has one where its database tells.
#[derive(Debug)]
pub enum AnyFeed {
    /// PostgreSQL.
    #[cfg(feature = "postgres")]
    Postgres(postgres::Feed),
    /// MySQL or MariaDB.
    #[cfg(feature = "mysql")]
    Mysql(mysql::Feed),
}

impl AnyFeed {
    /// Which database the service's last connection found.
    #[must_use]
    pub fn origin(&self) -> String {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(feed) => feed.origin(),
            #[cfg(feature = "mysql")]
            Self::Mysql(feed) => feed.origin(),
        }
    }

    /// What changed since a point in the database's history, and where that leads. `origin`: in which database, and which
    /// of its lives, that is a point. `late`: changes of some tables are told a moment after they are visible.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: nothing is known then.
    #[cfg_attr(
        not(all(feature = "postgres", feature = "mysql")),
        allow(unused_variables, reason = "each engine needs one of them")
    )]
    pub async fn owed(&self, since: Option<&str>, origin: &str, late: bool) -> Result<Owed, StoreError> {
        match self {
            // Where a snapshot leads does not depend on where it begins; another origin is a new epoch in any case.
            #[cfg(feature = "postgres")]
            Self::Postgres(feed) => feed.owed(since, late).await,
            #[cfg(feature = "mysql")]
            Self::Mysql(feed) => feed.owed(since, origin).await,
        }
    }

    /// How far behind the decoder is, and what the server keeps for it, in bytes; `None` where nothing is decoded.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    #[cfg_attr(not(feature = "postgres"), allow(clippy::unused_async, reason = "nothing is decoded elsewhere"))]
    pub async fn decoder_lag(&self) -> Result<Option<(i64, i64)>, StoreError> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(feed) => feed.decoder_lag().await,
            #[cfg(feature = "mysql")]
            Self::Mysql(_) => Ok(None),
        }
    }

    /// Drops what nobody needs any more from the outbox.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; somebody will do it.
    pub async fn sweep(&self) -> Result<(), StoreError> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(feed) => feed.sweep().await,
            #[cfg(feature = "mysql")]
            Self::Mysql(feed) => feed.sweep().await,
        }
    }

    /// How many rows the outbox holds.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn rows(&self) -> Result<i64, StoreError> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(feed) => feed.rows().await,
            #[cfg(feature = "mysql")]
            Self::Mysql(feed) => feed.rows().await,
        }
    }
}
