//! MySQL and MariaDB: prepared statements in the binary protocol, rows written as JSON here.
//!
//! - `bind` turns texts and bodies into values, `temporal` those that are dates and times
//! - `capture` installs and checks the triggers that tell of changes, `feed` reads them, `point` says how far
//! - `connect` makes connections in the engine's own runtime, so that no worker's end breaks them
//! - `describe` asks the information schema what a table is
//! - `pool` keeps connections, and gives up those on which something is still under way
//! - `query` runs statements that people wrote
//! - `refusal` says what an error of the server means
//! - `sql` writes the statements of a resource
//! - `value` turns values into JSON, each in the `form` of its column
//! - `write` runs the transaction of one write

mod bind;
mod capture;
mod connect;
mod describe;
mod feed;
mod form;
mod point;
mod pool;
mod query;
mod refusal;
mod sql;
mod temporal;
mod value;
mod write;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Params, Row, Value};
use tokio::sync::Mutex;

use self::connect::Connector;
pub use self::feed::Feed;
use self::pool::{Checked, Pool};
use self::refusal::{Failure, meaning, out_of_reach, unanswered};
use super::probe::{Probe, QUESTION};
use super::{
    Batch, Captured, Connections, LastWord, Load, Page, Rows, Store, StoreError, Waiters, Wanted, Write, WriteError,
    Written,
};
use crate::catalog::{Image, Key, Param, Problem, Resource, Table, TableName};
use crate::config;

/// What the client waits past the server's own statement timeout before it gives the connection up.
const SLACK: Duration = Duration::from_millis(500);

/// The most that making a connection may take.
const CONNECT: Duration = Duration::from_secs(5);

/// Keys that are asked for one by one in one statement.
const ONE_BY_ONE: usize = 64;

/// A MySQL or MariaDB server.
#[derive(Clone)]
pub struct MysqlStore {
    inner: Arc<Inner>,
}

struct Inner {
    connector: Arc<Connector>,
    pool: Arc<Pool>,
    statement_timeout: Duration,
    /// Outside the pool, so that a long queue is not taken for a dead database.
    probe: Mutex<Probe<Conn>>,
    /// What was last found of the triggers: all resources are looked at together.
    installed: Mutex<Option<capture::Seen>>,
}

impl std::fmt::Debug for MysqlStore {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("MysqlStore").field("connections", &self.connections()).finish_non_exhaustive()
    }
}

impl MysqlStore {
    /// Prepares the pool that `config` describes, without connecting yet. Connections will live in the runtime that
    /// calls this.
    ///
    /// # Errors
    ///
    /// A URL or certificate that can't be used.
    pub fn new(config: &config::Database) -> anyhow::Result<Self> {
        let connector = Arc::new(Connector::new(config)?);
        let pool = Pool::new(Arc::clone(&connector), config)?;
        Ok(Self {
            inner: Arc::new(Inner {
                connector,
                pool,
                statement_timeout: config.statement_timeout,
                probe: Mutex::default(),
                installed: Mutex::new(None),
            }),
        })
    }

    /// The connections now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.inner.pool.connections()
    }

    /// The version of the server, for `check`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where it can't be asked.
    pub async fn version(&self) -> Result<String, StoreError> {
        let (rows, _) = self.fetch("SELECT VERSION()", Vec::new()).await?;
        rows.first().and_then(|row| row.get(0)).ok_or_else(|| StoreError::Refused("no version".into()))
    }

    /// The database that the URL names: tables in it need no prefix.
    #[must_use]
    pub fn database(&self) -> Option<&str> {
        self.inner.connector.database()
    }

    /// Runs one prepared statement, and says which database answered. A connection that proves dead is replaced once, by one
    /// that is known to be alive: reading twice is safe.
    async fn fetch(&self, sql: &str, params: Vec<Value>) -> Result<(Vec<Row>, u64), StoreError> {
        self.fetch_for(&Waiters::default(), sql, params).await
    }

    /// The same as long as anybody waits for it.
    async fn fetch_for(&self, waiters: &Waiters, sql: &str, params: Vec<Value>) -> Result<(Vec<Row>, u64), StoreError> {
        let mut retried = false;
        loop {
            let mut checked = waiters.or(self.checkout(retried)).await?;
            let origin = checked.origin();
            let params = if params.is_empty() { Params::Empty } else { Params::Positional(params.clone()) };
            let asked = tokio::time::timeout(self.limit(), checked.begin()?.exec(sql, params)).await;
            match checked.end(asked) {
                Ok(rows) => return Ok((rows, origin)),
                Err(failed) if failed.was_lost() && !retried => retried = true,
                // It forgets statements when a table was altered.
                Err(Failure::Server(refusal)) if matches!(refusal.code, 1243 | 1615) && !retried => {
                    checked.forget();
                    retried = true;
                }
                Err(failed) => return Err(failed.into()),
            }
        }
    }

    /// A connection; one that is known to be alive `again`, after another one proved dead.
    async fn checkout(&self, again: bool) -> Result<Checked<'_>, StoreError> {
        if again { self.inner.pool.checkout_alive().await } else { self.inner.pool.checkout().await }
    }

    /// How long the client waits for one statement.
    fn limit(&self) -> Duration {
        self.inner.statement_timeout + SLACK
    }
}

/// Ends a connection at once, whatever is under way on it: the driver by itself would wait for an answer.
fn close(conn: Conn) {
    drop(conn.disconnect().now_or_never());
}

impl Load for MysqlStore {
    async fn rows(&self, resource: &Resource, keys: &[&Key], waiters: &Waiters) -> Result<Batch, StoreError> {
        if let [key] = keys {
            let (rows, origin) = self.fetch_for(waiters, &resource.statements.row, sql::bound(resource, key)?).await?;
            let row = rows.first().map(|row| sql::found(resource, row).asked_as(key));
            return Ok(Batch { rows: vec![row], origin });
        }
        // So that there are few statements to keep prepared, the last key is asked for several times.
        let count = keys.len().next_power_of_two();
        let mut params = Vec::with_capacity(count * resource.key.len());
        for key in keys.iter().chain(std::iter::repeat_n(&keys[keys.len() - 1], count - keys.len())) {
            params.extend(sql::bound(resource, key)?);
        }
        let (found, origin) = self.fetch_for(waiters, &sql::rows(resource, count), params).await?;
        let mut rows = sql::in_order(resource, keys, &found);
        if resource.exact_key() {
            return Ok(Batch { rows, origin });
        }
        let missing: Vec<usize> = (0..keys.len()).filter(|index| rows[*index].is_none()).collect();
        for some in missing.chunks(ONE_BY_ONE) {
            let count = some.len().next_power_of_two();
            let mut params = Vec::new();
            for index in some.iter().chain(std::iter::repeat_n(&some[some.len() - 1], count - some.len())) {
                params.extend(sql::bound(resource, keys[*index])?);
            }
            let (found, later) = self.fetch_for(waiters, &sql::one_by_one(resource, count), params).await?;
            if later != origin {
                return Err(StoreError::Unavailable("the database was replaced meanwhile".into()));
            }
            for row in found {
                let place: Option<usize> = row.get(row.len() - 1);
                if let Some(index) = place.and_then(|place| some.get(place)) {
                    rows[*index] = Some(sql::found(resource, &row).asked_as(keys[*index]));
                }
            }
        }
        Ok(Batch { rows, origin })
    }

    async fn list(
        &self,
        resource: &Resource,
        index: usize,
        value: &str,
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        let list = &resource.lists[index];
        let bound = bind::compared(&resource.table.columns[list.column], value)?;
        let (found, origin) = self.fetch_for(waiters, &resource.statements.lists[index], vec![bound]).await?;
        let mut json = vec![b'['];
        for (position, row) in found.iter().take(list.limit).enumerate() {
            if position > 0 {
                json.push(b',');
            }
            json.extend_from_slice(&sql::found(resource, row).json);
        }
        json.push(b']');
        Ok(Rows { json: json.into(), truncated: found.len() > list.limit, origin })
    }

    async fn query(&self, resource: &Resource, params: &[Param], waiters: &Waiters) -> Result<Rows, StoreError> {
        self.result(resource, params, waiters).await
    }

    fn is_pressed(&self) -> bool {
        self.connections().waiting > 0
    }
}

impl Store for MysqlStore {
    async fn describe(&self, name: &TableName) -> Result<Option<Table>, StoreError> {
        describe::table(self, name).await
    }

    async fn tables(&self) -> Result<Vec<Table>, StoreError> {
        describe::tables(self).await
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
        let row = (&resource.statements.row, resource.key.len(), "a row can't be read".to_owned());
        for (sql, nulls, what) in std::iter::once(row).chain(lists) {
            // NULL finds nothing and costs nothing, but it takes the privileges that reading takes.
            match self.fetch(sql, vec![Value::NULL; nulls]).await {
                Ok(_) => {}
                Err(outage) if outage.is_outage() => return Err(outage),
                Err(refused) => problems.push(Problem::fatal(format!("{what}: {refused}"))),
            }
        }
        for column in resource.key_columns().filter(|column| column.json) {
            problems.push(Problem::fatal(format!("a row can't be read: {} holds documents", column.name)));
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
        let (sql, mut params) = match after {
            Some(key) => (&resource.statements.next_keys, sql::after(resource, key)?),
            None => (&resource.statements.first_keys, Vec::new()),
        };
        params.push(Value::UInt(most as u64));
        let (found, origin) = self.fetch(sql, params).await?;
        Ok(Page { keys: found.iter().map(|row| sql::key(resource, row)).collect(), origin })
    }

    async fn captured(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        self.captures(wanted).await
    }

    async fn announce(&self, dropped: &[Image]) -> Result<(), StoreError> {
        for image in dropped {
            // Texts by text always are JSON.
            let image = serde_json::to_string(image).unwrap_or_default();
            let announced = self.fetch(capture::ANNOUNCE, vec![Value::Bytes(image.into_bytes())]).await;
            match announced {
                // Where nothing is captured, nobody listens.
                Err(StoreError::Changed(_)) => return Ok(()),
                announced => announced?,
            };
        }
        Ok(())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let mut probe = self.inner.probe.lock().await;
        if let Some(mut conn) = probe.take().filter(|conn| !conn.is_disconnected()) {
            let asked = tokio::time::timeout(QUESTION, conn.query_drop("SELECT 1")).await;
            if let Ok(Ok(())) = asked {
                probe.keep(conn);
                return Ok(());
            }
            close(conn);
            return asked.map_or(Err(StoreError::TimedOut), |failed| failed.map_err(|failed| unanswered(&failed)));
        }
        let connector = Arc::clone(&self.inner.connector);
        let making = async move { connector.open().await.map(|made| made.conn) };
        probe.make(self.inner.connector.runtime(), making).await
    }
}
