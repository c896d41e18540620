//! WAL mode: the outbox is filled by a logical decoder instead of triggers.
//!
//! ```text
//! slot      everything committed since it was made comes out of it, once confirmed never again; one reader at a time
//! stream    one transaction after the other, each whole, in the order of their commits
//! outbox    their changes, under their own transactions' ids: what a snapshot shows is as with triggers
//! confirm   only now may the server forget them
//! ```
//!
//! Every process with this mode tries; the slot lets one in. If that one dies, or says nothing for a moment, the server frees
//! the slot, and another goes on from what was confirmed: what was told twice is invalidated twice. The outbox's rows need
//! not survive a crash of the server: after one, every cache begins anew.
//!
//! A round must not claim what the decoder has yet to tell: see [`passed`].

mod images;
mod pgoutput;
mod stream;

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use self::images::{Batch, Table};
use self::pgoutput::{Message, RelationColumn};
use self::stream::{Broken, Received, Stream};
use super::capture::{self, PUBLICATION};
use super::connect::CONNECT;
use super::{PostgresStore, error};
use crate::catalog::{Image, Problem};
use crate::store::StoreError;
use crate::telemetry::Metrics;

/// The server frees the slot of a reader it has not heard from for so long; more after it did so without any progress, for
/// there are transactions that keep an old server from listening.
const PATIENCE: Duration = Duration::from_millis(500);
const MOST_PATIENCE: Duration = Duration::from_mins(1);

/// How often the reader is heard from.
const HEARTBEAT: Duration = Duration::from_millis(100);

/// A server from which nothing came for so long is asked to say something.
const QUIET: Duration = Duration::from_secs(1);

/// One that says nothing for so long past its own patience is not there any more. The network need not say so for a quarter of
/// an hour.
const SILENT: Duration = Duration::from_secs(5);

/// Between two looks whether the slot is free.
const PAUSE: Duration = Duration::from_millis(100);

/// Changes that gather before they are written, while more are there.
const GATHERED: usize = 1_000;

/// What is known of a table is asked anew after so long: more of its columns may be wanted.
const KNOWN: Duration = Duration::from_secs(10);

/// Writing one batch takes no longer, or something is wrong.
const MOST_WRITING: Duration = Duration::from_secs(5);

/// Between two slots that were made because one was lost.
const ANEW: Duration = Duration::from_secs(5);

/// The slot that is in use, whether it can be read, whether it is, and where.
const SLOT: &str = "
    SELECT a.slot, s.slot_name IS NOT NULL AND coalesce(s.wal_status, '') <> 'lost', coalesce(s.active, false),
           d.oid::text, EXISTS (SELECT FROM pg_publication p WHERE p.pubname = $1), pg_is_in_recovery()
    FROM cache_aside.about a JOIN pg_database d ON d.datname = current_database()
    LEFT JOIN pg_replication_slots s ON s.slot_name = a.slot AND s.database = d.datname";

/// Whether the slot has been read and confirmed as far as a position, and whether the log is on disk so far.
const PASSED: &str = "
    SELECT coalesce(s.confirmed_flush_lsn >= $1::text::pg_lsn, false), pg_current_wal_flush_lsn() >= $1::text::pg_lsn
    FROM cache_aside.about a LEFT JOIN pg_replication_slots s ON s.slot_name = a.slot";

/// What the decoder has not told yet, and what the server keeps for it, in bytes.
const LAG: &str = "
    SELECT (pg_current_wal_insert_lsn() - s.confirmed_flush_lsn)::bigint,
           (pg_current_wal_insert_lsn() - s.restart_lsn)::bigint
    FROM cache_aside.about a JOIN pg_replication_slots s ON s.slot_name = a.slot
    WHERE NOT pg_is_in_recovery()";

/// Waits until everything that was committed before `position` is in the outbox; false if it isn't within `patience`.
///
/// A position asked for after a snapshot was taken lies behind everything that the snapshot shows.
pub(super) async fn passed(client: &Client, position: &str, patience: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    let mut pushed = false;
    loop {
        let rows = client.query_typed(PASSED, &[(&position, Type::TEXT)]).await?;
        let (told, on_disk): (bool, bool) = match rows.first() {
            Some(row) => (row.try_get(0)?, row.try_get(1)?),
            None => (false, true),
        };
        if told {
            return Ok(true);
        }
        if Instant::now() + pause > deadline {
            return Ok(false);
        }
        // A decoder sees only what is on disk, and with synchronous_commit = off that takes its time. A message of our own,
        // committed, takes everything before it along.
        if !on_disk && !pushed && pause > Duration::from_millis(4) {
            pushed = true;
            client
                // Sent as one, they are one transaction, which ends even if it fails.
                .batch_execute(
                    "SET LOCAL synchronous_commit = local; SELECT pg_logical_emit_message(true, 'cache_aside', '')",
                )
                .await?;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// How far behind the decoder is, and what the server keeps for it, both in bytes; `None` without a slot.
pub(super) async fn lag(client: &Client) -> Result<Option<(i64, i64)>, Error> {
    let rows = client.query_typed(LAG, &[]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some((row.try_get::<_, Option<i64>>(0)?.unwrap_or(0), row.try_get::<_, Option<i64>>(1)?.unwrap_or(0))))
}

/// What an operator should know of the slot.
const STATE: &str = "
    SELECT a.slot, s.slot_name IS NOT NULL AND coalesce(s.wal_status, '') <> 'lost', coalesce(s.active, false),
           pg_size_pretty(pg_current_wal_insert_lsn() - s.restart_lsn),
           current_setting('max_slot_wal_keep_size', true) = '-1',
           r.rolreplication OR r.rolsuper, r.rolname::text
    FROM cache_aside.about a JOIN pg_roles r ON r.rolname = current_user
    LEFT JOIN pg_replication_slots s ON s.slot_name = a.slot";

/// What an operator should know of the decoding.
pub(super) async fn state(client: &Client) -> Result<Vec<Result<String, Problem>>, Error> {
    let rows = client.query_typed(STATE, &[]).await?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let mut said = Vec::new();
    let (may, role): (bool, String) = (row.try_get(5)?, row.try_get(6)?);
    if !may {
        let words = format!("role {role} may not decode the log: ALTER ROLE {role} REPLICATION");
        said.push(Err(Problem::fatal(words)));
    }
    let (slot, usable, active): (Option<String>, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let kept: Option<String> = row.try_get(3)?;
    said.push(Ok(match slot {
        Some(slot) if usable => {
            let reader = if active { "is read by a service" } else { "is read by nobody" };
            format!("the replication slot {slot} {reader}; the server keeps {} for it", kept.unwrap_or_default())
        }
        _ => "there is no replication slot: the first service that runs makes one".into(),
    }));
    if row.try_get::<_, Option<bool>>(4)?.unwrap_or_default() {
        let words =
            "max_slot_wal_keep_size is not set: without a running service the log fills the server's disk; set it";
        said.push(Err(Problem::warning(words)));
    }
    Ok(said)
}

/// A slot that somebody used before, and that keeps the log for nobody: this configuration doesn't decode.
pub(super) async fn left_over(client: &Client) -> Result<Vec<Result<String, Problem>>, Error> {
    let rows = client.query_typed(STATE, &[]).await?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let (slot, usable, active): (Option<String>, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let kept: Option<String> = row.try_get(3)?;
    Ok(slot.filter(|_| usable && !active).map_or_else(Vec::new, |slot| {
        vec![Err(Problem::warning(format!(
            "the replication slot {slot} is read by nobody, and the server keeps {} for it; if no service with \
             invalidation.mode wal is to come back: SELECT pg_drop_replication_slot('{slot}')",
            kept.unwrap_or_default()
        )))]
    }))
}

/// Why nothing is decoded here.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Stream(#[from] Broken),
    #[error("there is no publication {PUBLICATION}; run cache-aside migrate")]
    NotInstalled,
}

impl From<Error> for Trouble {
    fn from(failed: Error) -> Self {
        Self::Store(error(failed))
    }
}

/// What a look at the slot found.
#[derive(Default)]
struct Slot {
    /// As it was registered; there may be none yet.
    name: Option<String>,
    usable: bool,
    active: bool,
    database: String,
    published: bool,
    follows: bool,
}

async fn slot(client: &Client) -> Result<Slot, Error> {
    let rows = client.query_typed(SLOT, &[(&PUBLICATION, Type::TEXT)]).await?;
    let Some(row) = rows.first() else { return Ok(Slot::default()) };
    Ok(Slot {
        name: row.try_get(0)?,
        usable: row.try_get(1)?,
        active: row.try_get(2)?,
        database: row.try_get(3)?,
        published: row.try_get(4)?,
        follows: row.try_get(5)?,
    })
}

/// Makes a slot and registers it, so that rounds rely on it; false where somebody else is at it.
///
/// What was committed before the slot was made and is not visible yet would never be told. So it is registered only after
/// everything has ended that was under way by then, and what a cache knew before that moment counts for nothing.
pub(super) async fn begin_anew(client: &Client) -> Result<bool, Error> {
    let lock = "SELECT pg_try_advisory_lock(hashtext('cache_aside.slot'))";
    let locked = client.query_typed(lock, &[]).await?;
    if !locked.first().map_or(Ok(false), |row| row.try_get(0))? {
        return Ok(false);
    }
    let made = make(client).await;
    client.batch_execute("SELECT pg_advisory_unlock(hashtext('cache_aside.slot'))").await?;
    made.map(|()| true)
}

async fn make(client: &Client) -> Result<(), Error> {
    const FORMER: &str = "
        SELECT pg_drop_replication_slot(s.slot_name) FROM pg_replication_slots s
        WHERE s.database = current_database() AND s.slot_name LIKE $1 AND NOT s.active";
    // A slot that came along with a dump is somebody else's.
    client.query_typed("SELECT cache_aside.origin()", &[]).await?;
    let found = slot(client).await?;
    if found.usable {
        return Ok(());
    }
    // Those that were never registered too: a process may have died right here.
    let pattern = format!("cache\\_aside\\_{}\\_%", found.database);
    client.query_typed(FORMER, &[(&pattern, Type::TEXT)]).await?;
    let name = format!("cache_aside_{}_{:08x}", found.database, fastrand::u32(..));
    // Waits for all writers that are at work: as long as the longest of them takes.
    client.batch_execute("SET statement_timeout = 0").await?;
    let create = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
    client.query_typed(create, &[(&name, Type::TEXT)]).await?;
    let under_way = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
    let rows = client.query_typed(under_way, &[]).await?;
    let last: String = rows.first().map_or(Ok(String::new()), |row| row.try_get(0))?;
    let over = "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::text::xid8";
    loop {
        let rows = client.query_typed(over, &[(&last, Type::TEXT)]).await?;
        if rows.first().map_or(Ok(true), |row| row.try_get(0))? {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    client.query_typed("SELECT cache_aside.anew($1)", &[(&name, Type::TEXT)]).await?;
    Ok(())
}

/// Fills the outbox from the log, for as long as the service runs.
pub struct Decoder {
    store: PostgresStore,
    metrics: Arc<Metrics>,
    patience: Duration,
    anew: Option<Instant>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Decoder")
    }
}

impl Decoder {
    /// A decoder of this database.
    #[must_use]
    pub fn new(store: PostgresStore, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics, patience: PATIENCE, anew: None }
    }

    /// Runs for as long as the service does.
    pub async fn run(mut self) {
        let mut before = String::new();
        loop {
            let Err(trouble) = self.turn().await;
            let words = trouble.to_string();
            if words != before {
                tracing::warn!(error = %words, "the log can't be decoded; trying again");
            }
            before = words;
            self.metrics.error("decoder", if matches!(trouble, Trouble::Stream(_)) { "stream" } else { "database" });
            tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
        }
    }

    /// Waits for its turn, decodes, and says why it can't go on.
    async fn turn(&mut self) -> Result<Infallible, Trouble> {
        let opening = tokio::time::timeout(CONNECT, self.store.inner.connector.open()).await;
        let opened = opening.map_err(|_| StoreError::TimedOut)?;
        let client = opened.map_err(|failed| super::unreachable(&failed))?;
        // The rows need not survive a crash: the caches' entries don't either.
        client.batch_execute("SET synchronous_commit = off; SET datestyle = ISO; SET jit = off").await?;
        loop {
            let found = slot(&client).await?;
            if found.follows {
                return Err(StoreError::Unavailable("it follows another database".into()).into());
            }
            if !found.published {
                return Err(Trouble::NotInstalled);
            }
            let Some(name) = found.name.filter(|_| found.usable) else {
                self.begin_anew(&client).await?;
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            if !found.active {
                match self.decode(&client, &name).await {
                    Err(Trouble::Stream(Broken::Refused { code, message })) => match code.as_str() {
                        // Another was faster.
                        "55006" => {}
                        // What it needed of the log is gone, or the publication was not there at that time.
                        "55000" | "42704" | "58P01" => {
                            tracing::warn!(slot = name, error = message, "the slot is lost");
                            client.query_typed("SELECT pg_drop_replication_slot($1)", &[(&name, Type::TEXT)]).await?;
                            self.begin_anew(&client).await?;
                        }
                        _ => return Err(Broken::Refused { code, message }.into()),
                    },
                    ended => return ended,
                }
            }
            tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
        }
    }

    async fn decode(&mut self, client: &Client, slot: &str) -> Result<Infallible, Trouble> {
        let connector = &self.store.inner.connector;
        let opening = Stream::start(connector.config(), connector.tls(), slot, PUBLICATION, self.patience);
        let stream = opening.await?;
        tracing::info!(slot, "decoding the log");
        let mut session = Session {
            client,
            stream,
            tables: HashMap::new(),
            batch: Batch::default(),
            confirmed: 0,
            patience: self.patience + SILENT,
        };
        let ended = session.run().await;
        let progress = session.confirmed > 0;
        self.patience = if progress { PATIENCE } else { (self.patience * 4).min(MOST_PATIENCE) };
        ended
    }

    async fn begin_anew(&mut self, client: &Client) -> Result<(), Error> {
        if self.anew.is_some_and(|last| last.elapsed() < ANEW) {
            tokio::time::sleep(ANEW).await;
        }
        if begin_anew(client).await? {
            self.anew = Some(Instant::now());
            tracing::info!("a new slot: what caches hold is not known to be current, and they begin anew");
        }
        Ok(())
    }
}

/// One turn at the slot.
struct Session<'a> {
    client: &'a Client,
    stream: Stream,
    tables: HashMap<u32, Known>,
    batch: Batch,
    /// Everything before this position is in the outbox.
    confirmed: u64,
    /// What the server may take to say something.
    patience: Duration,
}

/// A table of the stream.
struct Known {
    columns: Vec<RelationColumn>,
    /// What the catalogue says of it; `None`: it is not captured.
    captured: Option<Captured>,
    asked: Instant,
}

struct Captured {
    relation: String,
    table: Table,
}

impl Session<'_> {
    async fn run(&mut self) -> Result<Infallible, Trouble> {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        // The end of the last whole transaction that is in the batch.
        let mut end = 0;
        let mut heard = Instant::now();
        loop {
            let received = tokio::select! {
                biased;
                _ = heartbeat.tick() => {
                    if heard.elapsed() > self.patience {
                        return Err(Broken::Unusable("the server fell silent".into()).into());
                    }
                    self.stream.confirm(self.confirmed, heard.elapsed() > QUIET).await?;
                    continue;
                }
                received = self.stream.next() => received?,
            };
            match received {
                Received::Data(data) => {
                    let message = pgoutput::parse(data)
                        .ok_or_else(|| Broken::Unusable("the server sent a change that can't be read".into()))?;
                    if let Message::Commit { end: position } = message {
                        self.batch.commit();
                        end = position;
                        if !self.stream.has_more() || self.batch.len() >= GATHERED {
                            self.write(end).await?;
                        }
                    } else {
                        self.take(message).await?;
                    }
                }
                Received::CaughtUp { position, reply } => {
                    if !self.batch.is_open() {
                        self.write(end.max(position)).await?;
                    } else if reply {
                        self.stream.confirm(self.confirmed, false).await?;
                    }
                }
            }
            heard = Instant::now();
        }
    }

    /// Adds one message's changes to the batch.
    async fn take(&mut self, message: Message) -> Result<(), Trouble> {
        match &message {
            Message::Begin { xid } => self.batch.begin(*xid),
            Message::Relation(relation) => {
                let columns = relation.columns.clone();
                self.know(relation.table, columns).await?;
            }
            Message::Insert { table, .. }
            | Message::Update { table, .. }
            | Message::Delete { table, .. }
            | Message::Anything { table } => self.add(*table, &message).await?,
            Message::Truncate { tables } => {
                for table in tables {
                    self.add(*table, &message).await?;
                }
            }
            Message::Commit { .. } | Message::Other => {}
        }
        Ok(())
    }

    async fn add(&mut self, id: u32, message: &Message) -> Result<(), Trouble> {
        if let Some(known) =
            self.tables.get(&id).filter(|known| known.captured.is_none() || known.asked.elapsed() > KNOWN)
        {
            let columns = known.columns.clone();
            self.know(id, columns).await?;
        }
        let captured = self.tables.get(&id).and_then(|known| known.captured.as_ref());
        self.batch.add(id, captured.map(|captured| &captured.table), message);
        Ok(())
    }

    /// Asks what is wanted of a table.
    async fn know(&mut self, id: u32, columns: Vec<RelationColumn>) -> Result<(), Trouble> {
        let found = capture::captured_table(self.client, id).await?;
        let captured =
            found.map(|(relation, wanted)| Captured { relation, table: Table { columns: columns.clone(), wanted } });
        self.tables.insert(id, Known { columns, captured, asked: Instant::now() });
        Ok(())
    }

    /// Writes what has gathered, and then confirms everything before `position`. The server hears from us meanwhile.
    async fn write(&mut self, position: u64) -> Result<(), Trouble> {
        if self.batch.len() > 0 {
            let (client, tables, changes) = (self.client, &self.tables, self.batch.take());
            let writing = async {
                for (id, rows) in changes {
                    let Some(captured) = tables.get(&id).and_then(|known| known.captured.as_ref()) else { continue };
                    insert(client, captured, &rows).await?;
                }
                Ok::<_, Error>(())
            };
            tokio::pin!(writing);
            let mut heartbeat = tokio::time::interval(HEARTBEAT);
            let deadline = Instant::now() + MOST_WRITING;
            loop {
                tokio::select! {
                    biased;
                    written = &mut writing => break written?,
                    _ = heartbeat.tick() => self.stream.confirm(self.confirmed, false).await?,
                    () = tokio::time::sleep_until(deadline) => return Err(StoreError::TimedOut.into()),
                }
            }
        }
        if position > self.confirmed {
            self.confirmed = position;
            self.stream.confirm(position, false).await?;
        }
        Ok(())
    }
}

/// Inserts changes of one table. Values become the text they have in the row's JSON; what is not known of a row stays out.
async fn insert(client: &Client, captured: &Captured, rows: &BTreeSet<(u32, Option<Image>)>) -> Result<(), Error> {
    let statement = capture::insert_decoded(&captured.relation, &captured.table.wanted);
    let names: Vec<&str> = captured.table.wanted.iter().map(|column| column.name.as_str()).collect();
    let run = async |rows: String| {
        let params: [(&(dyn ToSql + Sync), Type); 2] = [(&rows, Type::TEXT), (&names, Type::TEXT_ARRAY)];
        client.execute_typed(&statement, &params).await
    };
    let all: Vec<_> = rows.iter().map(|(xid, image)| json!({ "x": xid, "v": image })).collect();
    match run(serde_json::Value::from(all).to_string()).await {
        // A column has another type by now. Which rows they were is not known then, but that they changed is.
        Err(failed)
            if failed
                .as_db_error()
                .is_some_and(|no| ["22", "54"].iter().any(|class| no.code().code().starts_with(class))) =>
        {
            let xids: BTreeSet<u32> = rows.iter().map(|(xid, _)| *xid).collect();
            let anything: Vec<_> = xids.iter().map(|xid| json!({ "x": xid, "v": null })).collect();
            run(serde_json::Value::from(anything).to_string()).await?;
        }
        done => {
            done?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Decoder, Metrics, PostgresStore, StoreError, Trouble};
    use crate::config;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_never_lets_it_in_is_left() {
        // The kernel takes connections, and nobody says a word.
        let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let url = format!("postgres://a@{}/b", silent.local_addr().expect("it is bound")).into();
        let database = config::Database { url, ..config::Database::default() };
        let store = PostgresStore::new(&database, config::InvalidationMode::Wal).expect("it is sound");
        let mut decoder = Decoder::new(store, Metrics::new().expect("they are sound").into());
        let turn = tokio::time::timeout(Duration::from_mins(1), decoder.turn()).await.expect("it ends");
        assert!(matches!(turn, Err(Trouble::Store(StoreError::TimedOut))), "{turn:?}");
    }
}
