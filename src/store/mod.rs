//! Where the truth is: one trait, its errors, and the databases behind it.
//!
//! A store describes its tables to the catalog, reads rows and lists as JSON text that the database itself wrote, and
//! writes. Its errors say what a caller can do; what the database said of a value is turned into columns' names here,
//! so that no SQL leaves this room.

#[cfg(feature = "mysql")]
pub mod mysql;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlite")]
pub mod sqlite;

pub mod loader;

mod changes;
#[cfg(feature = "rounds")]
mod feed;
mod keys;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod probe;
#[cfg(any(feature = "mysql", feature = "sqlite"))]
mod spelling;
mod waiters;
mod write;

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
#[cfg(feature = "rounds")]
use std::time::Duration;

use bytes::Bytes;

use crate::catalog::{Image, Key, Param, Problem, Resource, Table, TableName};
pub use changes::{Captured, Change, Owed, Wanted};
#[cfg(feature = "rounds")]
pub use feed::AnyFeed;
pub use keys::Keys;
pub use waiters::Waiters;
pub use write::{Body, Judge, LastWord, Precondition, Write, WriteError, Written, merge_patch};

/// One row, as the database wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// A JSON object of the resource's columns.
    pub json: Bytes,
    /// The database spells the key as it was asked for. Where it doesn't (`1.0` for `1.00`, `Foo` for `foo`), the row must
    /// not be cached under the asked text.
    pub spelled_as_asked: bool,
}

/// The rows of some keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In the order of the keys.
    pub rows: Vec<Option<Row>>,
    /// A fingerprint of the database and of which of its lives the rows were read in; zero: not known. A cache that caught
    /// up with another one must not hold them.
    pub origin: u64,
}

/// Keys of a resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// In their order.
    pub keys: Vec<Key>,
    /// As in [`Batch`].
    pub origin: u64,
}

/// A result has no more rows than this, and no more bytes but for its last row: it is cut there.
pub const RESULT_ROWS: usize = 10_000;
/// See [`RESULT_ROWS`].
pub const RESULT_BYTES: usize = 16 << 20;

/// The rows of a list or a statement's result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// As in [`Batch`].
    pub origin: u64,
    /// A JSON array of objects.
    pub json: Bytes,
    /// There were more rows than the limit.
    pub truncated: bool,
}

/// Why a store could not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The database can't be reached, is starting, or is shutting down.
    #[error("the database can't be reached: {0}")]
    Unavailable(String),
    /// Too many requests wait for a connection already.
    #[error("too many requests wait for a database connection")]
    Busy,
    /// The statement ran into its timeout; the database has stopped working on it.
    #[error("the database took too long")]
    TimedOut,
    /// The database has run out of memory or disk for it: to ask again at once only makes that worse.
    #[error("the database has run out of something: {0}")]
    Exhausted(String),
    /// The database can't read a key or value as one of the column's type.
    #[error("the database can't read the value: {0}")]
    BadValue(String),
    /// The database can't run the statement, or may not: its own words.
    #[error("the statement can't be run: {0}")]
    BadStatement(String),
    /// A table or column that was there is not there any more: the catalog must look again.
    #[error("the table has changed: {0}")]
    Changed(String),
    /// Anything else that the database refused.
    #[error("the database refused: {0}")]
    Refused(String),
    /// A loader failed, in words of its own.
    #[error(transparent)]
    Loader(LoaderError),
    /// Nobody waited for it any more before it was begun.
    #[error("nobody waited for it any more")]
    Abandoned,
}

/// What a loader failed with. One failure answers all who waited for that load, so it is shared.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the loader failed: {0}")]
pub struct LoaderError(pub Arc<dyn Error + Send + Sync>);

impl PartialEq for LoaderError {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LoaderError {}

impl StoreError {
    /// A label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Busy => "queue_full",
            Self::TimedOut => "timeout",
            Self::Exhausted(_) => "exhausted",
            Self::BadValue(_) => "bad_value",
            Self::BadStatement(_) => "bad_statement",
            Self::Changed(_) => "schema_changed",
            Self::Refused(_) => "refused",
            Self::Loader(_) => "loader",
            Self::Abandoned => "abandoned",
        }
    }

    /// Whether the database itself is in trouble, rather than this one statement: the moment to serve what is stale.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Busy | Self::TimedOut | Self::Exhausted(_) | Self::Loader(_))
    }
}

/// What a miss needs: where the rows of keys, of lists and of statements are loaded from. What nobody waits for any more is
/// given up with [`StoreError::Abandoned`] as long as its statement was not sent.
pub trait Load: Send + Sync {
    /// The rows of these keys, in their order, with one statement.
    fn rows(
        &self,
        resource: &Resource,
        keys: &[&Key],
        waiters: &Waiters,
    ) -> impl Future<Output = Result<Batch, StoreError>> + Send;

    /// A declared list for one value.
    fn list(
        &self,
        resource: &Resource,
        index: usize,
        value: &str,
        waiters: &Waiters,
    ) -> impl Future<Output = Result<Rows, StoreError>> + Send;

    /// The rows that a resource's statement gives for these parameters, in their order; cut where they are too many.
    fn query(
        &self,
        resource: &Resource,
        params: &[Param],
        waiters: &Waiters,
    ) -> impl Future<Output = Result<Rows, StoreError>> + Send;

    /// Whether requests wait for a connection now: whatever can wait should.
    fn is_pressed(&self) -> bool;
}

/// A database of rows.
pub trait Store: Load {
    /// The table or view of this name; `None` where there is none.
    fn describe(&self, name: &TableName) -> impl Future<Output = Result<Option<Table>, StoreError>> + Send;

    /// Every table that a connection without further ado sees.
    fn tables(&self) -> impl Future<Output = Result<Vec<Table>, StoreError>> + Send;

    /// Writes the resource's statements and tries them on the database.
    fn prepare(&self, resource: Resource) -> impl Future<Output = Result<(Resource, Vec<Problem>), StoreError>> + Send;

    /// Runs one write in a transaction of its own. What it did is shown to `last` before it is committed. Once begun it ends,
    /// whoever waits for it.
    fn write(
        &self,
        resource: &Resource,
        write: Write,
        last: &LastWord,
        waiters: &Waiters,
    ) -> impl Future<Output = Result<Written, WriteError>> + Send;

    /// The keys of a page of at most so many rows, in the order of the key: of the first, or of those after a key. Read
    /// from the primary. An empty page is the end; where rows share a key, it may come again in a page.
    ///
    /// [`Keys`] walks through all of them.
    fn keys(
        &self,
        resource: &Resource,
        after: Option<&Key>,
        most: usize,
    ) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// How far changes of these tables by anybody are captured, in their order.
    fn captured(&self, wanted: &[Wanted]) -> impl Future<Output = Result<Vec<Captured>, StoreError>> + Send;

    /// Tells everybody who caches this database what a person has dropped, where there is a way to.
    fn announce(&self, dropped: &[Image]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Whether the database answers, asked beside the queue of requests. [`StoreError::Refused`]: it does, but gives us no
    /// connection.
    fn ping(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// How many connections there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Working on a statement.
    pub in_use: usize,
    /// Open and free.
    pub idle: usize,
    /// Requests that wait for one.
    pub waiting: usize,
}

/// The database of a running service, chosen once from the URL's scheme.
#[cfg(feature = "store")]
#[derive(Clone, Debug)]
pub enum AnyStore {
    /// PostgreSQL.
    #[cfg(feature = "postgres")]
    Postgres(postgres::PostgresStore),
    /// MySQL or MariaDB.
    #[cfg(feature = "mysql")]
    Mysql(mysql::MysqlStore),
    /// SQLite, in a file or in memory.
    #[cfg(feature = "sqlite")]
    Sqlite(sqlite::SqliteStore),
}

#[cfg(feature = "store")]
macro_rules! each {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            #[cfg(feature = "postgres")]
            AnyStore::Postgres($store) => $call.await,
            #[cfg(feature = "mysql")]
            AnyStore::Mysql($store) => $call.await,
            #[cfg(feature = "sqlite")]
            AnyStore::Sqlite($store) => $call.await,
        }
    };
}

#[cfg(feature = "store")]
impl AnyStore {
    /// What `db.system.name` calls it.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(_) => "postgresql",
            #[cfg(feature = "mysql")]
            Self::Mysql(_) => "mysql",
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => "sqlite",
        }
    }

    /// Its connections now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.connections(),
            #[cfg(feature = "mysql")]
            Self::Mysql(store) => store.connections(),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(store) => store.connections(),
        }
    }

    /// What is read most, the most first: a store whose connections are slow at first has them prepare for it.
    pub fn expect<'a>(&self, resources: impl Iterator<Item = &'a Resource>) {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.expect(resources),
            #[cfg(feature = "mysql")]
            Self::Mysql(_) => drop(resources),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => drop(resources),
        }
    }

    /// How many loads went to a replica since this was asked last, and why others did not.
    #[must_use]
    pub fn replica_reads(&self) -> Vec<(&'static str, u64)> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.replica_reads().collect(),
            #[cfg(feature = "mysql")]
            Self::Mysql(_) => Vec::new(),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => Vec::new(),
        }
    }

    /// Its feed of changes, where it tells of any; a question that takes longer than `patience` has failed.
    #[cfg(feature = "rounds")]
    #[must_use]
    pub fn feed(&self, patience: Duration) -> Option<AnyFeed> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => Some(AnyFeed::Postgres(postgres::Feed::new(store.clone(), patience))),
            #[cfg(feature = "mysql")]
            Self::Mysql(store) => Some(AnyFeed::Mysql(mysql::Feed::new(store.clone(), patience))),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => None,
        }
    }

    /// The schema whose tables need no prefix, where that is known.
    #[must_use]
    pub fn own_schema(&self) -> Option<&str> {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres(_) => Some("public"),
            #[cfg(feature = "mysql")]
            Self::Mysql(store) => store.database(),
            #[cfg(feature = "sqlite")]
            Self::Sqlite(_) => None,
        }
    }
}

/// A fingerprint of a database and of which of its lives this is; zero where that is not known.
#[must_use]
pub fn origin(text: &str) -> u64 {
    if text.is_empty() { 0 } else { xxhash_rust::xxh3::xxh3_64(text.as_bytes()).max(1) }
}

#[cfg(feature = "store")]
impl Load for AnyStore {
    async fn rows(&self, resource: &Resource, keys: &[&Key], waiters: &Waiters) -> Result<Batch, StoreError> {
        each!(self, store => store.rows(resource, keys, waiters))
    }

    async fn list(
        &self,
        resource: &Resource,
        index: usize,
        value: &str,
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        each!(self, store => store.list(resource, index, value, waiters))
    }

    async fn query(&self, resource: &Resource, params: &[Param], waiters: &Waiters) -> Result<Rows, StoreError> {
        each!(self, store => store.query(resource, params, waiters))
    }

    fn is_pressed(&self) -> bool {
        self.connections().waiting > 0
    }
}

#[cfg(feature = "store")]
impl Store for AnyStore {
    async fn describe(&self, name: &TableName) -> Result<Option<Table>, StoreError> {
        each!(self, store => store.describe(name))
    }

    async fn tables(&self) -> Result<Vec<Table>, StoreError> {
        each!(self, store => store.tables())
    }

    async fn prepare(&self, resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        each!(self, store => store.prepare(resource))
    }

    async fn write(
        &self,
        resource: &Resource,
        write: Write,
        last: &LastWord,
        waiters: &Waiters,
    ) -> Result<Written, WriteError> {
        each!(self, store => store.write(resource, write, last, waiters))
    }

    async fn keys(&self, resource: &Resource, after: Option<&Key>, most: usize) -> Result<Page, StoreError> {
        each!(self, store => store.keys(resource, after, most))
    }

    async fn captured(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        each!(self, store => store.captured(wanted))
    }

    async fn announce(&self, dropped: &[Image]) -> Result<(), StoreError> {
        each!(self, store => store.announce(dropped))
    }

    async fn ping(&self) -> Result<(), StoreError> {
        each!(self, store => store.ping())
    }
}
