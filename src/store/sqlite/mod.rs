//! SQLite, in a file or in memory: the embedded default.
//!
//! One connection writes, some read (in memory, one does both), each on the blocking pool. SQLite has five kinds
//! of values and no `row_to_json`: `value` writes the same JSON that PostgreSQL would, led by the declared types.

mod describe;
mod query;
mod value;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use deadpool_sqlite::{Config, Hook, HookError, Pool, Runtime};
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode};
use tokio::runtime::Handle;

use super::waiters::Place;
use super::{
    Batch, Captured, Connections, LastWord, Load, Page, Row, Rows, Store, StoreError, Waiters, Wanted, Write,
    WriteError, Written,
};
use crate::catalog::{Column, Image, Key, Kind, Param, Problem, Resource, Statements, Table, TableName};
use crate::config;

/// More readers than cores only wait for each other.
const READERS: usize = 4;

/// A SQLite database.
#[derive(Clone)]
pub struct SqliteStore {
    inner: Arc<Inner>,
}

struct Inner {
    readers: Pool,
    writer: Pool,
    waiting: AtomicUsize,
    queue: usize,
    statement_timeout: Duration,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("SqliteStore").field("connections", &self.connections()).finish_non_exhaustive()
    }
}

impl SqliteStore {
    /// Opens what a URL names: `sqlite:FILE`, `sqlite://FILE` or `sqlite::memory:`.
    ///
    /// # Errors
    ///
    /// A pool that can't be made. A file that can't be opened shows at the first use.
    pub fn new(config: &config::Database) -> anyhow::Result<Self> {
        let url = config.url.expose();
        let path = url.strip_prefix("sqlite:").unwrap_or(url);
        let path = path.strip_prefix("//").unwrap_or(path);
        let in_memory = path == ":memory:" || path.is_empty();
        let timeout = config.statement_timeout;
        let pool = |size: usize| -> anyhow::Result<Pool> {
            let setup = Hook::async_fn(move |connection: &mut deadpool_sync::SyncWrapper<Connection>, _| {
                Box::pin(async move {
                    let done = connection.interact(move |connection| set_up(connection, timeout)).await;
                    done.map_err(|error| HookError::message(error.to_string()))?.map_err(HookError::Backend)
                })
            });
            let path = if in_memory { ":memory:" } else { path };
            Ok(Config::new(path).builder(Runtime::Tokio1)?.max_size(size).post_create(setup).build()?)
        };
        let writer = pool(1)?;
        // Each connection to `:memory:` is a database of its own, so there is only one.
        let readers = if in_memory { writer.clone() } else { pool(READERS)? };
        Ok(Self {
            inner: Arc::new(Inner {
                readers,
                writer,
                waiting: AtomicUsize::new(0),
                queue: usize::try_from(config.queue)?,
                statement_timeout: timeout,
            }),
        })
    }

    /// Runs a script of statements, for set-up.
    ///
    /// # Errors
    ///
    /// What SQLite says.
    pub async fn execute(&self, script: &'static str) -> Result<(), StoreError> {
        self.with(&self.inner.writer, move |connection| connection.execute_batch(script).map_err(StoreError::from))
            .await
    }

    /// The connections now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        let status = self.inner.readers.status();
        Connections {
            in_use: status.size.saturating_sub(status.available),
            idle: status.available,
            waiting: self.inner.waiting.load(Ordering::Relaxed),
        }
    }

    /// Runs `work` on a connection of `pool`, after a wait in a queue that is bounded in length and time.
    async fn with<T, E>(
        &self,
        pool: &Pool,
        work: impl FnOnce(&mut Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + From<rusqlite::Error> + Send + 'static,
    {
        self.with_for(&Waiters::default(), pool, work).await
    }

    /// The same as long as anybody waits for it.
    async fn with_for<T, E>(
        &self,
        waiters: &Waiters,
        pool: &Pool,
        work: impl FnOnce(&mut Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + From<rusqlite::Error> + Send + 'static,
    {
        let limit = self.inner.statement_timeout;
        let waiting = async {
            // Whoever is served at once has a place for that moment too.
            let _place = Place::take(&self.inner.waiting, self.inner.queue + 1).ok_or(StoreError::Busy)?;
            match tokio::time::timeout(limit, pool.get()).await {
                Ok(connection) => connection.map_err(|refused| StoreError::Unavailable(refused.to_string())),
                Err(_) => Err(StoreError::Busy),
            }
        };
        let connection = waiters.or(waiting).await?;
        let done = connection
            .interact(move |connection| {
                let deadline = Instant::now() + limit;
                connection.progress_handler(10_000, Some(move || Instant::now() > deadline))?;
                let outcome = work(connection);
                connection.progress_handler(0, None::<fn() -> bool>)?;
                outcome
            })
            .await;
        done.map_err(|ended| StoreError::Refused(ended.to_string()))?
    }
}

fn set_up(connection: &mut Connection, timeout: Duration) -> rusqlite::Result<()> {
    connection.busy_timeout(timeout)?;
    connection.set_prepared_statement_cache_capacity(64);
    // Readers don't wait for the writer. In memory it is refused silently.
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.execute_batch("PRAGMA foreign_keys = ON; PRAGMA synchronous = NORMAL;")
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) => Self::TimedOut,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            Some(ErrorCode::DiskFull | ErrorCode::OutOfMemory) => Self::Exhausted(error.to_string()),
            Some(
                ErrorCode::CannotOpen
                | ErrorCode::SystemIoFailure
                | ErrorCode::NotADatabase
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::ReadOnly,
            ) => Self::Unavailable(error.to_string()),
            _ if error.to_string().contains("no such") => Self::Changed(error.to_string()),
            _ => Self::Refused(error.to_string()),
        }
    }
}

/// Quotes an identifier.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What every statement selects: the shown columns, then the key's, then the lists'.
fn selected(resource: &Resource) -> String {
    let lists = resource.lists.iter().map(|list| &resource.table.columns[list.column]);
    let columns = resource.shown_columns().chain(resource.key_columns()).chain(lists);
    columns.map(|column| quote(&column.name)).collect::<Vec<_>>().join(", ")
}

/// The condition that finds a row by its key.
fn by_key(resource: &Resource) -> String {
    let one = |column: &Column| format!("{} = ?", quote(&column.name));
    resource.key_columns().map(one).collect::<Vec<_>>().join(" AND ")
}

fn statements(resource: &Resource) -> Statements {
    let (selected, from) = (selected(resource), quote(&resource.table.name));
    let row = format!("SELECT {selected} FROM {from} WHERE {} LIMIT 1", by_key(resource));
    let lists = resource.lists.iter().map(|list| {
        let by = |order: &crate::catalog::Order| {
            let way = if order.descending { " DESC" } else { "" };
            format!("{}{way}", quote(&resource.table.columns[order.column].name))
        };
        format!(
            "SELECT {selected} FROM {from} WHERE {} = ? ORDER BY {} LIMIT {}",
            quote(&resource.table.columns[list.column].name),
            list.order.iter().map(by).collect::<Vec<_>>().join(", "),
            list.limit + 1
        )
    });
    let lists = lists.collect();
    let (first_keys, next_keys) = pages(resource);
    // There is no round trip to save: a batch runs the row's statement for each key.
    Statements { row, rows: String::new(), lists, first_keys, next_keys }
}

/// Pages of keys: the last parameter is how many, what comes before is the key to begin after. A column takes values of any
/// kind; those that no key finds are left out, and the rest is in the order in which a bound key is compared.
fn pages(resource: &Resource) -> (String, String) {
    let names: Vec<String> = resource.key_columns().map(|column| quote(&column.name)).collect();
    let there = |(name, column): (&String, &Column)| match column.kind {
        Kind::Integer { .. } => format!("typeof({name}) = 'integer'"),
        Kind::Boolean => format!("typeof({name}) = 'integer' AND {name} IN (0, 1)"),
        Kind::Bytes => format!("typeof({name}) = 'blob'"),
        Kind::Number => format!("typeof({name}) IN ('integer', 'real')"),
        _ => format!("typeof({name}) NOT IN ('null', 'blob')"),
    };
    let there: Vec<String> = names.iter().zip(resource.key_columns()).map(there).collect();
    let (marks, names) = (vec!["?"; names.len()].join(", "), names.join(", "));
    let select = format!("SELECT {names} FROM {} WHERE {}", quote(&resource.table.name), there.join(" AND "));
    let end = format!("ORDER BY {names} LIMIT ?");
    (format!("{select} {end}"), format!("{select} AND ({names}) > ({marks}) {end}"))
}

/// Reads a page of keys.
fn keys(connection: &Connection, resource: &Resource, after: Option<&Key>, most: usize) -> Result<Page, StoreError> {
    let statements = &resource.statements;
    let sql = if after.is_some() { &statements.next_keys } else { &statements.first_keys };
    let mut statement = connection.prepare_cached(sql)?;
    let begin = after.into_iter().flat_map(|key| resource.key_columns().zip(key.parts()));
    let mut params: Vec<Value> = begin.map(|(column, part)| value::bind(column, part)).collect();
    params.push(Value::Integer(i64::try_from(most).unwrap_or(i64::MAX)));
    let mut rows = statement.query(rusqlite::params_from_iter(params))?;
    let mut keys = Vec::new();
    while let Some(row) = rows.next()? {
        let text = |(index, column): (usize, &Column)| Ok(value::text(row.get_ref(index)?, column).unwrap_or_default());
        let parts = resource.key_columns().enumerate().map(text).collect::<rusqlite::Result<_>>()?;
        keys.push(Key::from_database(parts));
    }
    Ok(Page { keys, origin: 0 })
}

/// What is read of a row.
struct Found {
    json: Bytes,
    key: Vec<String>,
    lists: Vec<(usize, String)>,
}

fn read_row(resource: &Resource, row: &rusqlite::Row<'_>) -> rusqlite::Result<Found> {
    let shown = resource.columns.len();
    let keys = resource.key.len();
    let mut json = Vec::with_capacity(128);
    for (index, column) in resource.shown_columns().enumerate() {
        json.push(if index == 0 { b'{' } else { b',' });
        value::name(&mut json, &column.name);
        value::write(&mut json, row.get_ref(index)?, column);
    }
    json.push(b'}');
    let mut key = Vec::with_capacity(keys);
    for (index, column) in resource.key_columns().enumerate() {
        key.push(value::text(row.get_ref(shown + index)?, column).unwrap_or_default());
    }
    let mut lists = Vec::new();
    for (index, list) in resource.lists.iter().enumerate() {
        let column = &resource.table.columns[list.column];
        lists.extend(value::text(row.get_ref(shown + keys + index)?, column).map(|value| (index, value)));
    }
    Ok(Found { json: json.into(), key, lists })
}

fn find(connection: &Connection, resource: &Resource, key: &Key) -> rusqlite::Result<Option<Found>> {
    let mut statement = connection.prepare_cached(&resource.statements.row)?;
    let params = resource.key_columns().zip(key.parts()).map(|(column, part)| value::bind(column, part));
    let mut rows = statement.query(rusqlite::params_from_iter(params))?;
    rows.next()?.map(|row| read_row(resource, row)).transpose()
}

impl Load for SqliteStore {
    async fn rows(&self, resource: &Resource, keys: &[&Key], waiters: &Waiters) -> Result<Batch, StoreError> {
        let (resource, keys) = (resource.clone(), keys.iter().map(|key| (*key).clone()).collect::<Vec<_>>());
        self.with_for(waiters, &self.inner.readers, move |connection| {
            // All of a batch from one state of the database.
            let snapshot = connection.transaction()?;
            let mut rows = Vec::with_capacity(keys.len());
            for key in &keys {
                let found = find(&snapshot, &resource, key)?;
                rows.push(
                    found.map(|found| Row { json: found.json, spelled_as_asked: found.key.as_slice() == key.parts() }),
                );
            }
            snapshot.finish()?;
            Ok(Batch { rows, origin: 0 })
        })
        .await
    }

    async fn list(
        &self,
        resource: &Resource,
        index: usize,
        asked: &str,
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        let (resource, asked) = (resource.clone(), asked.to_owned());
        self.with_for(waiters, &self.inner.readers, move |connection| {
            let list = &resource.lists[index];
            let mut statement = connection.prepare_cached(&resource.statements.lists[index])?;
            let param = value::bind(&resource.table.columns[list.column], &asked);
            let mut rows = statement.query([param])?;
            let mut json = vec![b'['];
            let mut count = 0;
            while let Some(row) = rows.next()? {
                if count == list.limit {
                    json.push(b']');
                    return Ok(Rows { json: json.into(), truncated: true, origin: 0 });
                }
                if count > 0 {
                    json.push(b',');
                }
                json.extend_from_slice(&read_row(&resource, row)?.json);
                count += 1;
            }
            json.push(b']');
            Ok(Rows { json: json.into(), truncated: false, origin: 0 })
        })
        .await
    }

    async fn query(&self, resource: &Resource, params: &[Param], waiters: &Waiters) -> Result<Rows, StoreError> {
        let (resource, params) = (resource.clone(), params.to_vec());
        self.with_for(waiters, &self.inner.readers, move |connection| query::run(connection, &resource, &params)).await
    }

    fn is_pressed(&self) -> bool {
        self.connections().waiting > 0
    }
}

impl Store for SqliteStore {
    async fn describe(&self, name: &TableName) -> Result<Option<Table>, StoreError> {
        let name = name.clone();
        self.with(&self.inner.readers, move |connection| describe::table(connection, &name)).await
    }

    async fn tables(&self) -> Result<Vec<Table>, StoreError> {
        self.with(&self.inner.readers, |connection| describe::tables(connection)).await
    }

    async fn prepare(&self, mut resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        if resource.parameters.is_some() {
            let tried = resource.clone();
            let wrong = self.with(&self.inner.readers, move |connection| query::check(connection, &tried)).await?;
            return Ok((resource, wrong.map(Problem::fatal).into_iter().collect()));
        }
        resource.statements = statements(&resource);
        let tried = resource.clone();
        self.with(&self.inner.readers, move |connection| {
            let statements = &tried.statements;
            for sql in std::iter::once(&statements.row).chain(&statements.lists) {
                connection.prepare_cached(sql)?;
            }
            Ok::<_, StoreError>(())
        })
        .await?;
        Ok((resource, Vec::new()))
    }

    async fn write(
        &self,
        resource: &Resource,
        write: Write,
        last: &LastWord,
        waiters: &Waiters,
    ) -> Result<Written, WriteError> {
        let (resource, last, runtime) = (resource.clone(), last.clone(), Handle::current());
        // On a thread of its own, which may wait.
        let ask = move |written: &Written| runtime.block_on(last.given(written));
        self.with_for(waiters, &self.inner.writer, move |connection| write::run(connection, &resource, &write, ask))
            .await
    }

    async fn keys(&self, resource: &Resource, after: Option<&Key>, most: usize) -> Result<Page, StoreError> {
        let (resource, after) = (resource.clone(), after.cloned());
        self.with(&self.inner.readers, move |connection| keys(connection, &resource, after.as_ref(), most)).await
    }

    async fn captured(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        let words = "SQLite tells nobody of changes: those by other programs are seen when the TTL ends";
        Ok(wanted.iter().map(|_| Captured::Never(words.into())).collect())
    }

    async fn announce(&self, _: &[Image]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.with(&self.inner.readers, |connection| {
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())).map_err(StoreError::from)
        })
        .await
    }
}
