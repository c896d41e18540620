//! PostgreSQL: prepared statements over a pool, rows as the JSON that `row_to_json` writes.
//!
//! - `capture` installs and checks what tells of changes, `feed` reads them, `snapshot` compares moments
//! - `connect` makes connections in the engine's own runtime, so that no worker's end breaks them
//! - `describe` asks the system catalogues what a table is
//! - `pool` keeps connections, and makes more while somebody waits
//! - `query` runs statements that people wrote
//! - `replica` reads from a standby, where it provably shows enough
//! - `seats` count connections: so many are there at most, whatever becomes of whoever made them
//! - `sql` writes the statements of a resource
//! - `wal` fills the outbox from the log, where triggers are not wanted
//! - `write` runs the transaction of one write, and asks which column a refused value belongs to

mod capture;
mod connect;
mod describe;
mod feed;
mod pool;
mod query;
mod replica;
mod seats;
mod snapshot;
mod sql;
mod tls;
mod wal;
mod write;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::ClientWrapper;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, Type};

use self::connect::{CONNECT, Connector};
pub use self::feed::Feed;
use self::pool::{Checked, Pool};
use self::replica::Replica;
pub use self::wal::Decoder;
use super::probe::{Probe, QUESTION};
use super::{
    Batch, Captured, Connections, LastWord, Load, Page, Rows, Store, StoreError, Waiters, Wanted, Write, WriteError,
    Written,
};
use crate::catalog::{Image, Key, Param, Problem, Resource, Table, TableName};
use crate::config;

/// What the client waits past the server's own statement timeout before it gives the connection up.
const SLACK: Duration = Duration::from_millis(500);

/// The most that finding out what all tables are may take: two statements for each.
const DISCOVERY: Duration = Duration::from_mins(1);

/// A PostgreSQL server.
#[derive(Clone)]
pub struct PostgresStore {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Arc<Pool>,
    connector: Connector,
    statement_timeout: Duration,
    /// Changes are decoded from the log, not told by triggers.
    decodes: bool,
    /// A standby that fills may read from.
    replica: Option<Replica>,
    /// Outside the pool, so that a long queue is not taken for a dead database.
    probe: Mutex<Probe<tokio_postgres::Client>>,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("PostgresStore").field("connections", &self.connections()).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// Prepares the pool that `config` describes, without connecting yet. Connections will live in the runtime that
    /// calls this. `mode` says who tells of changes.
    ///
    /// # Errors
    ///
    /// A URL or certificate that can't be used.
    pub fn new(config: &config::Database, mode: config::InvalidationMode) -> anyhow::Result<Self> {
        let connector = Connector::new(config)?;
        let pool = Pool::new(connector.clone(), config)?;
        let replica = Replica::new(config).context("database.replica_url can't be used")?;
        let store = Self {
            inner: Arc::new(Inner {
                pool,
                connector,
                replica,
                statement_timeout: config.statement_timeout,
                decodes: mode == config::InvalidationMode::Wal,
                probe: Mutex::default(),
            }),
        };
        if store.inner.replica.is_some() {
            store.inner.connector.runtime().spawn(replica::watch(Arc::downgrade(&store.inner)));
        }
        Ok(store)
    }

    /// The connections now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.inner.pool.connections()
    }

    /// What is read most, and would be read here if nothing were in the cache any more: idle connections prepare for it.
    pub fn expect<'a>(&self, resources: impl Iterator<Item = &'a Resource>) {
        self.inner.pool.expect(resources);
    }

    /// The version of the server, for `check`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where it can't be asked.
    pub async fn version(&self) -> Result<String, StoreError> {
        let rows = self.ask(async |client| client.query_typed("SHOW server_version", &[]).await).await?;
        let version = rows.first().and_then(|row| row.try_get(0).ok());
        version.ok_or_else(|| StoreError::Refused("no version".into()))
    }

    /// What an operator should know of how the log is decoded.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where it can't be asked.
    pub async fn decoding(&self) -> Result<Vec<Result<String, Problem>>, StoreError> {
        let decodes = self.inner.decodes;
        self.ask(async |client| {
            match if decodes { wal::state(client).await } else { wal::left_over(client).await } {
                // The resources say so.
                Err(failed) if capture::absent(&failed).is_some() => Ok(Vec::new()),
                other => other,
            }
        })
        .await
    }

    /// A connection, after a wait in a queue that is bounded in length and time.
    async fn checkout(&self) -> Result<Checked<'_>, StoreError> {
        self.inner.pool.checkout().await
    }

    /// Asks something that no reader waits for. A database that hangs keeps it no longer than a statement.
    async fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&ClientWrapper) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        self.ask_for(self.inner.statement_timeout + SLACK, question).await
    }

    /// The same for what takes several statements.
    async fn ask_for<T>(
        &self,
        patience: Duration,
        question: impl AsyncFnOnce(&ClientWrapper) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        let checked = self.checkout().await?;
        let asked = tokio::time::timeout(patience, question(checked.client()?)).await;
        let Ok(answer) = asked else {
            self.abandon(checked);
            return Err(StoreError::TimedOut);
        };
        answer.map_err(error)
    }

    /// The rows of one prepared statement for a resource, and which database they are from.
    async fn read(
        &self,
        resource: &Resource,
        sql: &str,
        params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
        waiters: &Waiters,
    ) -> Result<(Vec<tokio_postgres::Row>, u64), StoreError> {
        let there =
            async |client: &ClientWrapper, statement: &tokio_postgres::Statement| client.query(statement, params).await;
        match self.at_replica(resource, sql, waiters, there).await? {
            Some(found) => Ok(found),
            None => self.query(sql, params, waiters).await,
        }
    }

    /// Runs one prepared statement, and says which database answered. A connection that proves dead is replaced once: reading twice is safe.
    async fn query(
        &self,
        sql: &str,
        params: &[&(dyn tokio_postgres::types::ToSql + Sync)],
        waiters: &Waiters,
    ) -> Result<(Vec<tokio_postgres::Row>, u64), StoreError> {
        let mut retried = false;
        loop {
            let checked = waiters.or(self.checkout()).await?;
            let (client, origin) = (checked.client()?, checked.life.fingerprint);
            let run = async {
                let statement = client.prepare_cached(sql).await?;
                client.query(&statement, params).await
            };
            match tokio::time::timeout(self.inner.statement_timeout + SLACK, run).await {
                Ok(Ok(rows)) => return Ok((rows, origin)),
                Ok(Err(_)) if client.is_closed() && !retried => retried = true,
                // The server ends connections before it goes; the driver may not have seen the end yet.
                Ok(Err(failed))
                    if !retried && failed.code().is_some_and(|code| matches!(code.code(), "57P01" | "57P02")) =>
                {
                    drop(checked.lose());
                    retried = true;
                }
                Ok(Err(failed)) => {
                    if failed.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED) && !retried {
                        // "cached plan must not change result type": the table was altered.
                        client.statement_cache.clear();
                        retried = true;
                        continue;
                    }
                    return Err(error(failed));
                }
                Err(_) => {
                    self.abandon(checked);
                    return Err(StoreError::TimedOut);
                }
            }
        }
    }

    /// Gives up a connection on which a statement still runs: off the pool, and the statement is cancelled. Until then its
    /// seat is not another's.
    fn abandon(&self, checked: Checked<'_>) {
        if let Ok(lost) = checked.lose() {
            self.inner.pool.cancel(lost);
        }
    }
}

/// What an error of the driver means to a caller.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn error(error: tokio_postgres::Error) -> StoreError {
    let Some(refusal) = error.as_db_error() else {
        // The driver's text holds no statement and no password.
        return StoreError::Unavailable(error.to_string());
    };
    let said = format!("{} ({})", refusal.message(), refusal.code().code());
    match refusal.code().code() {
        "57014" => StoreError::TimedOut,
        "42P01" | "42703" | "3F000" | "42704" => StoreError::Changed(said),
        "53300" | "57P01" | "57P02" | "57P03" | "57P05" | "25006" => StoreError::Unavailable(said),
        code if code.starts_with("08") || code == "55P03" => StoreError::Unavailable(said),
        // Out of disk or memory; too many connections were above.
        code if code.starts_with("53") => StoreError::Exhausted(said),
        // The statement was prepared and ran before: only the value can be at fault (an `ltree` key, a deep document).
        code if code.starts_with("22") || code.starts_with("54") || code == "42601" => {
            StoreError::BadValue(refusal.message().to_owned())
        }
        _ => StoreError::Refused(said),
    }
}

/// Why there is no connection: whatever the server said, the database is out of reach for us.
fn unreachable(error: &tokio_postgres::Error) -> StoreError {
    let refusal = error.as_db_error().map(|refusal| format!("{} ({})", refusal.message(), refusal.code().code()));
    StoreError::Unavailable(refusal.unwrap_or_else(|| error.to_string()))
}

/// Why the question whether it answers failed. Whoever refuses (too many connections, a password that was changed) does
/// answer: those who have a connection are served.
fn unanswered(failed: &tokio_postgres::Error) -> StoreError {
    match failed.as_db_error() {
        Some(refusal) if !refusal.code().code().starts_with("57P0") && !refusal.code().code().starts_with("08") => {
            StoreError::Refused(format!("{} ({})", refusal.message(), refusal.code().code()))
        }
        _ => unreachable(failed),
    }
}

/// The text of a value, without a copy on the way to the cache.
struct Text(Bytes);

impl<'a> FromSql<'a> for Text {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(Bytes::copy_from_slice(raw)))
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TEXT
    }
}

impl Load for PostgresStore {
    async fn rows(&self, resource: &Resource, keys: &[&Key], waiters: &Waiters) -> Result<Batch, StoreError> {
        if let [key] = keys {
            let params: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
                key.parts().iter().map(|part| part as _).collect();
            let (found, origin) = self.read(resource, &resource.statements.row, &params, waiters).await?;
            let row = found.first().map(|row| sql::row(row, key)).transpose().map_err(error)?;
            return Ok(Batch { rows: vec![row], origin });
        }
        let columns: Vec<Vec<&str>> =
            (0..resource.key.len()).map(|part| keys.iter().map(|key| key.parts()[part].as_str()).collect()).collect();
        let params: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            columns.iter().map(|column| column as _).collect();
        let (found, origin) = self.read(resource, &resource.statements.rows, &params, waiters).await?;
        Ok(Batch { rows: sql::in_order(resource, keys, &found).map_err(error)?, origin })
    }

    async fn list(
        &self,
        resource: &Resource,
        index: usize,
        value: &str,
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        let (found, origin) = self.read(resource, &resource.statements.lists[index], &[&value], waiters).await?;
        let limit = resource.lists[index].limit;
        let mut json = BytesMut::from(&b"["[..]);
        for (position, row) in found.iter().take(limit).enumerate() {
            if position > 0 {
                json.put_u8(b',');
            }
            json.put_slice(&row.try_get::<_, Text>(0).map_err(error)?.0);
        }
        json.put_u8(b']');
        Ok(Rows { json: json.freeze(), truncated: found.len() > limit, origin })
    }

    async fn query(&self, resource: &Resource, params: &[Param], waiters: &Waiters) -> Result<Rows, StoreError> {
        self.result(resource, params, waiters).await
    }

    fn is_pressed(&self) -> bool {
        self.connections().waiting > 0
    }
}

impl Store for PostgresStore {
    async fn describe(&self, name: &TableName) -> Result<Option<Table>, StoreError> {
        self.ask(async |client| describe::table(client, name).await).await
    }

    async fn tables(&self) -> Result<Vec<Table>, StoreError> {
        self.ask_for(DISCOVERY, async |client| describe::tables(client).await).await
    }

    async fn prepare(&self, mut resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        if resource.parameters.is_some() {
            return self.prepare_statement(resource).await;
        }
        resource.statements = sql::statements(&resource);
        let mut problems = Vec::new();
        let lists = resource.lists.iter().zip(&resource.statements.lists);
        let lists = lists
            .map(|(list, sql)| (sql, 1, format!("list {} can't be read", resource.table.columns[list.column].name)));
        let (row, rows) = (&resource.statements.row, &resource.statements.rows);
        let keys = resource.key.len();
        let tries = [(row, keys, "a row can't be read".to_owned()), (rows, 0, "rows can't be read".to_owned())];
        for (sql, nulls, what) in tries.into_iter().chain(lists) {
            let tried = self.ask(async |client| {
                let statement = client.prepare_cached(sql).await?;
                // NULL finds nothing and costs nothing, but it takes the privileges that reading takes.
                let null: Option<&str> = None;
                let params: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = (0..nulls).map(|_| &null as _).collect();
                if nulls > 0 {
                    client.query(&statement, &params).await?;
                }
                Ok(())
            });
            match tried.await {
                Ok(()) => {}
                Err(outage) if outage.is_outage() => return Err(outage),
                Err(refused) => problems.push(Problem::fatal(format!("{what}: {refused}"))),
            }
        }
        Ok((resource, problems))
    }

    async fn write(
        &self,
        resource: &Resource,
        write: Write,
        last: &LastWord,
        waiters: &Waiters,
    ) -> Result<Written, WriteError> {
        write::run(self, resource, write, last, waiters).await
    }

    async fn keys(&self, resource: &Resource, after: Option<&Key>, most: usize) -> Result<Page, StoreError> {
        let statements = &resource.statements;
        let sql = if after.is_some() { &statements.next_keys } else { &statements.first_keys };
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut params: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = vec![&most];
        params.extend(
            after.into_iter().flat_map(Key::parts).map(|part| part as &(dyn tokio_postgres::types::ToSql + Sync)),
        );
        let (found, origin) = self.query(sql, &params, &Waiters::default()).await?;
        Ok(Page { keys: sql::keys(resource, &found).map_err(error)?, origin })
    }

    async fn captured(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        self.captures(wanted).await
    }

    async fn announce(&self, dropped: &[Image]) -> Result<(), StoreError> {
        const ANNOUNCE: &str = "SELECT cache_aside.announce(d) FROM jsonb_array_elements($1::jsonb) d";
        // Texts by text always are JSON.
        let dropped = serde_json::to_string(dropped).unwrap_or_default();
        self.ask(async |client| match client.query_typed(ANNOUNCE, &[(&dropped, Type::TEXT)]).await {
            Ok(_) => Ok(()),
            // Where nothing is captured, nobody listens.
            Err(failed) if capture::absent(&failed).is_some() => Ok(()),
            Err(failed) => Err(failed),
        })
        .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let mut probe = self.inner.probe.lock().await;
        if let Some(client) = probe.take().filter(|client| !client.is_closed()) {
            let asked = tokio::time::timeout(QUESTION, client.simple_query("SELECT 1")).await;
            asked.map_err(|_| StoreError::TimedOut)?.map_err(|failed| unanswered(&failed))?;
            probe.keep(client);
            return Ok(());
        }
        let connector = self.inner.connector.clone();
        let runtime = connector.runtime().clone();
        let making = async move {
            let opened = tokio::time::timeout(CONNECT, connector.open()).await;
            opened.map_err(|_| StoreError::TimedOut)?.map_err(|failed| unanswered(&failed))
        };
        probe.make(&runtime, making).await
    }
}
