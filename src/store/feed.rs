//! What changed in a database, whichever it is.

use super::{Owed, StoreError, mysql, postgres};

/// A connection of its own to what changed. A running service has one where its database tells.
#[derive(Debug)]
pub enum AnyFeed {
    /// PostgreSQL.
    Postgres(postgres::Feed),
    /// MySQL or MariaDB.
    Mysql(mysql::Feed),
}

impl AnyFeed {
    /// Which database the service's last connection found.
    #[must_use]
    pub fn origin(&self) -> String {
        match self {
            Self::Postgres(feed) => feed.origin(),
            Self::Mysql(feed) => feed.origin(),
        }
    }

    /// What changed since a point in the database's history, and where that leads. `late`: changes of some tables are told
    /// a moment after they are visible.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: nothing is known then.
    pub async fn owed(&self, since: Option<&str>, late: bool) -> Result<Owed, StoreError> {
        match self {
            Self::Postgres(feed) => feed.owed(since, late).await,
            Self::Mysql(feed) => feed.owed(since).await,
        }
    }

    /// How far behind the decoder is, and what the server keeps for it, in bytes; `None` where nothing is decoded.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn decoder_lag(&self) -> Result<Option<(i64, i64)>, StoreError> {
        match self {
            Self::Postgres(feed) => feed.decoder_lag().await,
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
            Self::Postgres(feed) => feed.sweep().await,
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
            Self::Postgres(feed) => feed.rows().await,
            Self::Mysql(feed) => feed.rows().await,
        }
    }
}
