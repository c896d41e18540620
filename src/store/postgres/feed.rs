//! What changed: the outbox, read as "everything that a snapshot did not show".
//!
//! A cursor over ids would skip a slow transaction with a lower id for ever. A snapshot names such a transaction among
//! those in progress, so what is owed since it is: rows of transactions that it lists, and of all that began later.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, Statement};

use super::snapshot::Snapshot;
use super::{PostgresStore, error, wal};
use crate::store::{Change, Owed, StoreError};

/// Two index scans united; with OR the planner would read the whole table. The limit is one past what is delivered row
/// by row.
const OWED: &str = "
    SELECT h.snapshot, h.horizon, h.follows, o.relation, o.image, o.age, o.relation IS NOT NULL
    FROM (SELECT pg_current_snapshot()::text AS snapshot, (SELECT horizon::text FROM cache_aside.about) AS horizon,
                 pg_is_in_recovery() AS follows) h
    LEFT JOIN (SELECT relation, image::text AS image, extract(epoch FROM clock_timestamp() - at)::float8 AS age
               FROM (SELECT relation, image, at FROM cache_aside.outbox WHERE xid = ANY ($1::text[]::xid8[])
                     UNION ALL SELECT relation, image, at FROM cache_aside.outbox WHERE xid >= $2::text::xid8) x
               LIMIT $3) o ON true";

/// A moment: what is visible, a position in the log behind everything that made it so, and whether the log is decoded as
/// far as that already. Who only follows has no such position.
const MOMENT: &str = "
    WITH moment AS MATERIALIZED (
      SELECT pg_current_snapshot()::text AS snapshot,
             CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn() END AS position)
    SELECT m.snapshot, m.position::text, coalesce(s.confirmed_flush_lsn >= m.position, m.position IS NULL), s.slot_name IS NOT NULL
    FROM moment m CROSS JOIN cache_aside.about a LEFT JOIN pg_replication_slots s ON s.slot_name = a.slot";

/// One plan for all rounds, over the index whatever the statistics say: they are always behind in a table like this.
const SETUP: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET plan_cache_mode = force_generic_plan; \
                     SET jit = off";

/// How much is owed, up to a limit.
const AMOUNT: &str = "
    SELECT count(*) FROM (SELECT FROM cache_aside.outbox WHERE xid = ANY ($1::text[]::xid8[])
                          UNION ALL SELECT FROM cache_aside.outbox WHERE xid >= $2::text::xid8 LIMIT $3) x";

/// Which tables owe too much to be told row by row.
const CROWDED: &str = "
    SELECT relation FROM (SELECT relation FROM cache_aside.outbox WHERE xid = ANY ($1::text[]::xid8[])
                          UNION ALL SELECT relation FROM cache_aside.outbox WHERE xid >= $2::text::xid8) x
    GROUP BY relation HAVING count(*) > $3";

const REST: &str = "
    SELECT relation, image::text, extract(epoch FROM clock_timestamp() - at)::float8
    FROM (SELECT relation, image, at FROM cache_aside.outbox WHERE xid = ANY ($1::text[]::xid8[])
          UNION ALL SELECT relation, image, at FROM cache_aside.outbox WHERE xid >= $2::text::xid8) x
    WHERE relation <> ALL ($3)";

/// What one transaction has changed.
pub(super) const OF: &str = "
    SELECT relation, image::text, 0::float8 FROM cache_aside.outbox WHERE xid = $1::text::xid8";

/// What this transaction has changed so far.
pub(super) const OWN: &str = "
    SELECT relation, image::text, 0::float8 FROM cache_aside.outbox WHERE xid = pg_current_xact_id_if_assigned()";

/// Past so many changes of one table since the last round, all of its entries are dropped at once.
const MOST: i64 = 10_000;

/// Past so many changes in all, everything is dropped at once.
const TOO_MUCH: i64 = 100_000;

/// Rows that one sweep drops at most.
const SWEPT: i32 = 20_000;

/// A connection of its own to what changed: a full pool must not stop the rounds.
pub struct Feed {
    store: PostgresStore,
    open: Mutex<Option<Open>>,
    patience: Duration,
}

struct Open {
    client: Client,
    owed: Statement,
    /// Asked first where the log is decoded; prepared when it is needed.
    moment: Option<Statement>,
    /// Which database this is. A connection that was made to a primary stays with it.
    origin: String,
}

impl Open {
    async fn new(store: &PostgresStore) -> Result<Self, StoreError> {
        let (client, origin) =
            store.inner.connector.open_known().await.map_err(|failed| super::unreachable(&failed))?;
        let prepare = async {
            client.batch_execute(SETUP).await?;
            client.prepare(OWED).await
        };
        let owed = prepare.await.map_err(error)?;
        Ok(Self { client, owed, moment: None, origin })
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Feed")
    }
}

impl Feed {
    /// Reads the outbox of this database; a question that takes longer than `patience` has failed.
    #[must_use]
    pub fn new(store: PostgresStore, patience: Duration) -> Self {
        Self { store, open: Mutex::default(), patience }
    }

    /// Which database the service's last connection found.
    #[must_use]
    pub fn origin(&self) -> String {
        self.store.inner.connector.found()
    }

    /// What changed since a point in the database's history, and where that leads. `late`: changes of some tables are told
    /// a moment after they are visible.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: nothing is known then.
    pub async fn owed(&self, since: Option<&str>, late: bool) -> Result<Owed, StoreError> {
        let mut place = self.open.lock().await;
        let kept = place.take().filter(|open| !open.client.is_closed());
        let fresh = kept.is_none();
        let asked = async {
            let mut open = match kept {
                Some(open) => open,
                None => Open::new(&self.store).await?,
            };
            if late && open.moment.is_none() {
                open.moment = Some(open.client.prepare(MOMENT).await.map_err(error)?);
            }
            let moment = match &open.moment {
                Some(moment) if late => Some(self.moment(&open.client, moment).await?),
                _ => None,
            };
            let owed = ask(&open, since, moment).await.map_err(error)?;
            Ok::<_, StoreError>((open, owed))
        };
        // A new connection costs several round trips.
        let patience = if fresh { self.patience * 3 } else { self.patience };
        match tokio::time::timeout(patience, asked).await {
            Ok(Ok((open, owed))) => {
                // A standby may become the primary under us: whoever follows is asked anew who it is.
                *place = Some(open).filter(|_| !owed.origin.is_empty());
                Ok(owed)
            }
            Ok(Err(failed)) => Err(failed),
            // The connection goes with its question.
            Err(_) => Err(StoreError::TimedOut),
        }
    }

    /// A moment whose past is all in the outbox.
    async fn moment(&self, client: &Client, moment: &Statement) -> Result<String, StoreError> {
        let rows = client.query(moment, &[]).await.map_err(error)?;
        let row = rows.first().ok_or_else(|| StoreError::Refused("it does not say what is visible".into()))?;
        let read =
            || Ok::<_, tokio_postgres::Error>((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?));
        let (point, position, told, has_slot): (String, Option<String>, bool, bool) = read().map_err(error)?;
        // Others decoded once. Should they do so again, they make a slot, and what is claimed until then counts for nothing.
        let told = told || !has_slot && !self.store.inner.decodes;
        if let Some(position) = position.filter(|_| !told)
            && !wal::passed(client, &position, self.patience / 2).await.map_err(error)?
        {
            let words = "the log is not decoded so far: does a service with invalidation.mode wal run that may replicate? \
                         If none is to, drop the replication slot";
            return Err(StoreError::Refused(words.into()));
        }
        Ok(point)
    }

    /// How far behind the decoder is, and what the server keeps for it, in bytes; `None` where nothing is decoded.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn decoder_lag(&self) -> Result<Option<(i64, i64)>, StoreError> {
        if !self.store.inner.decodes {
            return Ok(None);
        }
        self.store.ask(async |client| wal::lag(client).await).await
    }

    /// Drops what nobody needs any more from the outbox.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; somebody will do it.
    pub async fn sweep(&self) -> Result<(), StoreError> {
        loop {
            let sweep = "SELECT cache_aside.sweep($1)";
            let rows = self.store.ask(async |client| client.query_typed(sweep, &[(&SWEPT, Type::INT4)]).await).await?;
            let dropped = rows.first().map_or(Ok(0), |row| row.try_get::<_, i32>(0)).map_err(error)?;
            if dropped < SWEPT {
                return Ok(());
            }
        }
    }

    /// How many rows the outbox holds, as the planner knows it.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn rows(&self) -> Result<i64, StoreError> {
        const ROWS: &str = "SELECT count(*) FROM (SELECT FROM cache_aside.outbox LIMIT 1000001) o";
        let rows = self.store.ask(async |client| client.query_typed(ROWS, &[]).await).await?;
        rows.first().map_or(Ok(0), |row| row.try_get(0)).map_err(error)
    }
}

/// `moment`: what the outbox is known to hold, where it is filled later than the changes are visible.
async fn ask(open: &Open, point: Option<&str>, moment: Option<String>) -> Result<Owed, tokio_postgres::Error> {
    let since = point.and_then(Snapshot::parse);
    let (under_way, next) = since.as_ref().map_or((Vec::new(), String::new()), Snapshot::unseen);
    // Without a point nothing is owed: no transaction has this id.
    let next = if next.is_empty() { u64::MAX.to_string() } else { next };
    let limit = MOST + 1;
    let rows = open.client.query(&open.owed, &[&under_way, &next, &limit]).await?;
    let mut owed = Owed::default();
    if let Some(first) = rows.first() {
        owed.point = moment.map_or_else(|| first.try_get(0), Ok)?;
        let follows: bool = first.try_get(2)?;
        owed.origin = if follows { String::new() } else { open.origin.clone() };
        let horizon: Option<String> = first.try_get(1)?;
        let horizon = horizon.as_deref().and_then(Snapshot::parse);
        let now = Snapshot::parse(&owed.point);
        // A database that shows less than it did was restored.
        owed.complete = since
            .as_ref()
            .zip(horizon.zip(now))
            .is_some_and(|(since, (horizon, now))| since.contains(&horizon) && now.contains(since));
    }
    if !owed.complete {
        return Ok(owed);
    }
    if i64::try_from(rows.len()).unwrap_or(i64::MAX) <= MOST {
        for row in &rows {
            if row.try_get(6)? {
                owed.changes.push(change(row, 3)?);
            }
        }
        return Ok(owed);
    }
    // Too much to be told: everything begins anew.
    let limit = TOO_MUCH + 1;
    let params: [(&(dyn ToSql + Sync), Type); 3] =
        [(&under_way, Type::TEXT_ARRAY), (&next, Type::TEXT), (&limit, Type::INT8)];
    let rows = open.client.query_typed(AMOUNT, &params).await?;
    if rows.first().map_or(Ok(0), |row| row.try_get::<_, i64>(0))? > TOO_MUCH {
        owed.complete = false;
        return Ok(owed);
    }
    let params: [(&(dyn ToSql + Sync), Type); 3] =
        [(&under_way, Type::TEXT_ARRAY), (&next, Type::TEXT), (&MOST, Type::INT8)];
    let mut crowded = Vec::new();
    for row in open.client.query_typed(CROWDED, &params).await? {
        let relation: String = row.try_get(0)?;
        owed.changes.push(Change { relation: relation.clone(), image: None, age: 0.0 });
        crowded.push(relation);
    }
    let params: [(&(dyn ToSql + Sync), Type); 3] =
        [(&under_way, Type::TEXT_ARRAY), (&next, Type::TEXT), (&crowded, Type::TEXT_ARRAY)];
    for row in open.client.query_typed(REST, &params).await? {
        owed.changes.push(change(&row, 0)?);
    }
    // The later statements see what was committed meanwhile, and lack what was swept meanwhile.
    let rows = open.client.query_typed("SELECT horizon::text FROM cache_aside.about", &[]).await?;
    let horizon: Option<String> = rows.first().map_or(Ok(None), |row| row.try_get(0))?;
    let horizon = horizon.as_deref().and_then(Snapshot::parse);
    owed.complete = since.zip(horizon).is_some_and(|(since, horizon)| since.contains(&horizon));
    Ok(owed)
}

/// Reads a change from a row whose columns from `first` on are relation, image and age.
pub(super) fn change(row: &Row, first: usize) -> Result<Change, tokio_postgres::Error> {
    let image: Option<&str> = row.try_get(first + 1)?;
    Ok(Change {
        relation: row.try_get(first)?,
        // What can't be read may be anything.
        image: image.and_then(|image| serde_json::from_str(image).ok()),
        age: row.try_get(first + 2)?,
    })
}
