//! What changed: the outbox, read as "everything beyond a point, and what fills its gaps".
//!
//! Ids are given out in their order, and become visible in any order. A round reads the committed rows beyond its point
//! and in the point's gaps; ids that are missing between those that came are the next point's gaps. A gap leaves when its
//! row came, or after ten minutes if by then there is no such row, not even an uncommitted one: between taking an id
//! and inserting its row there is no time to speak of, and no reader or sweeper here takes a lock that could stretch it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Row};
use tokio::sync::Mutex;

use super::connect::{Connector, is_writable};
use super::point::Point;
use super::refusal::Failure;
use super::{MysqlStore, close, sql};
use crate::store::{self, Change, Owed, StoreError};

/// The last id that is visible: later ones are given to later rows.
pub(super) const LAST: &str = "SELECT MAX(id) FROM cache_aside.outbox";

/// What a transaction has changed so far: beyond an id that was given out before it began, under its own word.
pub(super) const OWN: &str = "SELECT relation, image, 0e0 FROM cache_aside.outbox WHERE id > ? AND tx = ?";

/// What is read after the rows: whatever was swept before them, this says so.
const ABOUT: &str = "
    SELECT CONCAT(@@global.read_only, @@global.innodb_read_only), UNIX_TIMESTAMP() DIV 60,
           (SELECT MAX(o.id) FROM cache_aside.outbox o), a.origin, a.horizon FROM cache_aside.about a";

/// The last point that was noted.
const NOTED: &str =
    "SELECT point, at > NOW(6) - INTERVAL 20 SECOND FROM cache_aside.points WHERE origin = ? ORDER BY id DESC LIMIT 1";

/// The last point that was noted so many seconds ago: what it shows, everybody has had time to see.
const SEEN_BY_ALL: &str = "
    SELECT point FROM cache_aside.points WHERE origin = ? AND at < NOW(6) - INTERVAL ? SECOND ORDER BY id DESC LIMIT 1";

/// In place of an origin that should be known and isn't.
const UNKNOWN: &str = "?";

/// Past so many changes of one table since the last round, all of its entries are dropped at once.
const MOST: usize = 10_000;

/// Past so many changes in all, everything is dropped at once.
const TOO_MUCH: usize = 100_000;

/// Gaps that are kept, as far as nothing says that they are alive.
const GAPS: usize = 1000;

/// Minutes for which a gap is kept in any case.
const DOUBT: u64 = 10;

/// Ids that are looked at in one statement where all there are must be.
const CHUNK: usize = 100_000;

/// What one sweep may take. What it did stays, and the next one goes on from there.
const SWEEPING: Duration = Duration::from_mins(1);

/// Rows that are dropped at once.
const SWEPT: usize = 1000;

/// Past so many rows, the outbox is swept sooner.
const CROWDED: i64 = 1_000_000;

/// A connection of its own to what changed: a full pool must not stop the rounds.
pub struct Feed {
    store: MysqlStore,
    open: Mutex<Option<Open>>,
    patience: Duration,
}

struct Open {
    conn: Conn,
    /// Which database this is, and which of its lives.
    origin: String,
    fingerprint: u64,
}

impl Open {
    async fn new(connector: &Arc<Connector>) -> Result<Self, StoreError> {
        let made = connector.connect().await?;
        Ok(Self { conn: made.conn, origin: made.text, fingerprint: made.origin })
    }
}

/// What the outbox says of itself.
struct About {
    follows: bool,
    minute: u64,
    last: u64,
    /// What may have been dropped, if it is of this life of the database.
    horizon: Option<Point>,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Feed")
    }
}

impl Feed {
    /// Reads the outbox of this database; a question that takes longer than `patience` has failed.
    #[must_use]
    pub fn new(store: MysqlStore, patience: Duration) -> Self {
        Self { store, open: Mutex::default(), patience }
    }

    /// Which database the service's last connection found.
    #[must_use]
    pub fn origin(&self) -> String {
        self.store.inner.connector.found()
    }

    /// What changed since a point in the database's history, and where that leads. A point of another `origin` says
    /// nothing: ids that were seen there are given out again here.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: nothing is known then.
    pub async fn owed(&self, since: Option<&str>, origin: &str) -> Result<Owed, StoreError> {
        let mut place = self.open.lock().await;
        // What others find by now is what fills go by, and this must speak of the same.
        let connector = &self.store.inner.connector;
        let is_good = |open: &Open| !open.conn.is_disconnected() && connector.leads_to(open.fingerprint);
        let kept = match place.take() {
            Some(open) if !is_good(&open) => {
                close(open.conn);
                None
            }
            kept => kept,
        };
        let fresh = kept.is_none();
        let since = since.and_then(Point::parse);
        // A new connection costs several round trips; a new beginning reads all that there is.
        let patience = |beginning: bool| match (beginning, fresh) {
            (true, _) => self.patience * 10,
            (false, true) => self.patience * 3,
            (false, false) => self.patience,
        };
        let mut open = match kept {
            Some(open) => open,
            None => match tokio::time::timeout(patience(since.is_none()), Open::new(connector)).await {
                Ok(open) => open?,
                Err(_) => return Err(StoreError::TimedOut),
            },
        };
        let since = since.filter(|_| open.origin == origin);
        let patience = patience(since.is_none());
        match tokio::time::timeout(patience, owed(&mut open, since)).await {
            Ok(Ok(owed)) if owed.origin == UNKNOWN => {
                close(open.conn);
                let words = "this account may not see or begin a life of the database in cache_aside.life; \
                             run cache-aside migrate --grant USER@HOST";
                Err(StoreError::Refused(words.into()))
            }
            Ok(Ok(owed)) => {
                // Who follows another may become the primary under us, and is asked anew who it is.
                if owed.origin.is_empty() {
                    close(open.conn);
                } else {
                    *place = Some(open);
                }
                Ok(owed)
            }
            Ok(Err(failed)) => {
                close(open.conn);
                Err(Failure::from(failed).into())
            }
            Err(_) => {
                // The connection goes with its question, and the server stops working on it.
                let connector = Arc::clone(&self.store.inner.connector);
                let (id, origin) = (open.conn.id(), store::origin(&open.origin));
                close(open.conn);
                self.store.inner.connector.runtime().spawn(async move { connector.kill(id, origin).await });
                Err(StoreError::TimedOut)
            }
        }
    }

    /// Drops what nobody needs any more from the outbox. One at a time works; the others go on.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; somebody will do it.
    pub async fn sweep(&self) -> Result<(), StoreError> {
        let mut open = Open::new(&self.store.inner.connector).await?;
        // Only the primary is swept, and only where it is known which life of it this is.
        if open.origin.is_empty() {
            close(open.conn);
            return Ok(());
        }
        let swept = tokio::time::timeout(SWEEPING, sweep(&mut open)).await;
        // The lock goes with the connection.
        close(open.conn);
        match swept {
            Ok(swept) => swept.map_err(|failed| Failure::from(failed).into()),
            Err(_) => Err(StoreError::TimedOut),
        }
    }

    /// How many rows the outbox holds, up to a million and one.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn rows(&self) -> Result<i64, StoreError> {
        let (rows, _) = self.store.fetch(&count(), Vec::new()).await?;
        Ok(rows.first().and_then(|row| row.get(0)).unwrap_or(0))
    }
}

fn count() -> String {
    format!("SELECT COUNT(*) FROM (SELECT 1 FROM cache_aside.outbox LIMIT {}) o", CROWDED + 1)
}

/// Reads a change from a row whose columns from `first` on are relation, image and age.
pub(super) fn change(row: &Row, first: usize) -> Change {
    let image: Option<String> = row.get::<Option<String>, _>(first + 1).flatten();
    Change {
        relation: row.get(first).unwrap_or_default(),
        // What can't be read may be anything.
        image: image.and_then(|image| serde_json::from_str(&image).ok()),
        age: row.get::<Option<f64>, _>(first + 2).flatten().unwrap_or(0.0).max(0.0),
    }
}

const ROW: &str = "id, relation, image, UNIX_TIMESTAMP(NOW(6)) - UNIX_TIMESTAMP(at)";

fn about(row: Option<&Row>, origin: &str) -> About {
    let text = |index: usize| row.and_then(|row| row.get::<Option<String>, _>(index).flatten()).unwrap_or_default();
    let number = |index: usize| row.and_then(|row| row.get::<Option<u64>, _>(index).flatten()).unwrap_or(0);
    let horizon = Some(text(4)).filter(|_| text(3) == origin).and_then(|text| Point::parse(&text));
    About { follows: !is_writable(&text(0)), minute: number(1), last: number(2), horizon }
}

async fn owed(open: &mut Open, since: Option<Point>) -> Result<Owed, Error> {
    if open.origin.is_empty() {
        // It follows another, or does not say who it is: nothing that it tells is of use.
        let said: Option<Row> = open.conn.query_first(ABOUT).await?;
        let origin = origin(open, &about(said.as_ref(), ""));
        return Ok(Owed { origin, ..Owed::default() });
    }
    let Some(since) = since else { return survey(open).await };
    let asked = format!("SELECT {ROW} FROM cache_aside.outbox WHERE {} LIMIT {}; {ABOUT}", since.unseen(), MOST + 1);
    let mut result = open.conn.query_iter(asked).await?;
    let rows: Vec<Row> = result.collect().await?;
    let said: Vec<Row> = result.collect().await?;
    result.drop_result().await?;
    if rows.len() > MOST {
        return crowded(open, &since).await;
    }
    let about = about(said.first(), &open.origin);
    if !is_complete(&since, &about) {
        return survey(open).await;
    }
    let mut ids: Vec<u64> = rows.iter().filter_map(|row| row.get(0)).collect();
    let changes = rows.iter().map(|row| change(row, 1)).collect();
    let point = settled(&mut open.conn, since.seen(&mut ids, about.minute), about.minute).await?;
    Ok(Owed { point: point.text(), origin: origin(open, &about), complete: true, changes })
}

fn origin(open: &Open, about: &About) -> String {
    match open.origin.as_str() {
        _ if about.follows => String::new(),
        "" => UNKNOWN.to_owned(),
        origin => origin.to_owned(),
    }
}

/// Whether nothing is missing that came after the point: it was not swept, and the outbox is no older than it was. The
/// row with the highest id is never swept.
fn is_complete(since: &Point, about: &About) -> bool {
    about.last >= since.high() && about.horizon.as_ref().is_none_or(|horizon| since.contains(horizon))
}

/// Gives up gaps that nothing can fill any more.
///
/// This looks later than the rows were read: what was uncommitted then is seen here, committed or not, and stays a gap.
async fn settled(conn: &mut Conn, mut point: Point, minute: u64) -> Result<Point, Error> {
    // A minute ends at any moment: one that is whole lies before the last.
    let doubtful = point.doubtful(minute.saturating_sub(DOUBT), GAPS, minute.saturating_sub(1));
    if doubtful.is_empty() {
        return Ok(point);
    }
    let ranges: Vec<String> = doubtful.iter().map(|(first, last)| format!("id BETWEEN {first} AND {last}")).collect();
    let asked = format!(
        "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED; SELECT id FROM cache_aside.outbox WHERE {}",
        ranges.join(" OR ")
    );
    let mut result = conn.query_iter(asked).await?;
    let _: Vec<Row> = result.collect().await?;
    let mut alive: Vec<u64> = result.collect().await?;
    result.drop_result().await?;
    point.settle(&doubtful, &mut alive, minute);
    Ok(point)
}

/// A new beginning: what is there now was there before.
async fn survey(open: &mut Open) -> Result<Owed, Error> {
    let (point, about) = surveyed(open, false).await?;
    Ok(Owed { point: point.text(), origin: origin(open, &about), complete: false, changes: Vec::new() })
}

/// The point that is reached now, from the last one that was noted. Transactions that are open since longer are among
/// its gaps. After a long absence that takes many statements; `noting`: how far it came is noted after each.
async fn surveyed(open: &mut Open, noting: bool) -> Result<(Point, About), Error> {
    let noted: Option<(String, bool)> = open.conn.exec_first(NOTED, (open.origin.as_str(),)).await?;
    let said: Option<Row> = open.conn.query_first(ABOUT).await?;
    let before = about(said.as_ref(), &open.origin);
    let noted = noted.and_then(|(text, _)| Point::parse(&text)).or(before.horizon);
    // An outbox that was emptied by hand, or put back.
    let base = noted.filter(|point| point.high() <= before.last).unwrap_or_else(Point::beginning);
    let (unseen, mut point, mut after) = (base.unseen(), base, 0);
    loop {
        // Always upwards: what comes later below stays a gap.
        let asked =
            format!("SELECT id FROM cache_aside.outbox WHERE id > {after} AND ({unseen}) ORDER BY id LIMIT {CHUNK}");
        let mut ids: Vec<u64> = open.conn.query(asked).await?;
        let is_last = ids.len() < CHUNK;
        after = ids.last().copied().unwrap_or(after);
        point = point.seen(&mut ids, before.minute);
        if is_last {
            break;
        }
        if noting && !before.follows {
            note(open, &point).await?;
        }
    }
    let said: Option<Row> = open.conn.query_first(ABOUT).await?;
    let about = about(said.as_ref(), &open.origin);
    let point = settled(&mut open.conn, point, about.minute).await?;
    Ok((point, about))
}

async fn note(open: &mut Open, point: &Point) -> Result<(), Error> {
    let note = "INSERT INTO cache_aside.points (origin, point) VALUES (?, ?)";
    open.conn.exec_drop(note, (open.origin.as_str(), point.text())).await
}

/// Too much to be told at once: tables that owe too many rows are told as a whole. All of it as of one moment.
async fn crowded(open: &mut Open, since: &Point) -> Result<Owed, Error> {
    open.conn
        .query_drop(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
        )
        .await?;
    let told = told_as_a_whole(open, since).await?;
    open.conn.query_drop("COMMIT").await?;
    let Some((mut ids, changes)) = told else { return survey(open).await };
    let said: Option<Row> = open.conn.query_first(ABOUT).await?;
    let about = about(said.as_ref(), &open.origin);
    if !is_complete(since, &about) {
        return survey(open).await;
    }
    let point = settled(&mut open.conn, since.seen(&mut ids, about.minute), about.minute).await?;
    Ok(Owed { point: point.text(), origin: origin(open, &about), complete: true, changes })
}

async fn told_as_a_whole(open: &mut Open, since: &Point) -> Result<Option<(Vec<u64>, Vec<Change>)>, Error> {
    let unseen = since.unseen();
    let ids: Vec<u64> =
        open.conn.query(format!("SELECT id FROM cache_aside.outbox WHERE {unseen} LIMIT {}", TOO_MUCH + 1)).await?;
    if ids.len() > TOO_MUCH {
        return Ok(None);
    }
    let crowded: BTreeSet<String> = open
        .conn
        .query(format!(
            "SELECT relation FROM cache_aside.outbox WHERE {unseen} GROUP BY relation HAVING COUNT(*) > {MOST}"
        ))
        .await?
        .into_iter()
        .collect();
    let whole = |relation: &String| Change { relation: relation.clone(), image: None, age: 0.0 };
    let mut changes: Vec<Change> = crowded.iter().map(whole).collect();
    // Names of tables alone, as our own triggers wrote them.
    let others: String =
        crowded.iter().map(|relation| format!(" AND relation <> {}", sql::literal(relation))).collect();
    let rows: Vec<Row> =
        open.conn.query(format!("SELECT {ROW} FROM cache_aside.outbox WHERE ({unseen}){others}")).await?;
    changes.extend(rows.iter().map(|row| change(row, 1)));
    Ok(Some((ids, changes)))
}

/// Notes how far one can see now, and drops what everybody who was there within ten minutes has seen; what has piled up
/// past a million rows, sooner.
async fn sweep(open: &mut Open) -> Result<(), Error> {
    // Should this process be cut off, the server ends the session, and the lock with it.
    open.conn.query_drop("SET SESSION wait_timeout = 60").await?;
    let locked: Option<Option<u8>> = open.conn.query_first("SELECT GET_LOCK('cache_aside.sweep', 0)").await?;
    if locked.flatten() != Some(1) {
        return Ok(());
    }
    let noted: Option<(String, bool)> = open.conn.exec_first(NOTED, (open.origin.as_str(),)).await?;
    if noted.is_none_or(|(_, is_recent)| !is_recent) {
        let (point, about) = surveyed(open, true).await?;
        if about.follows {
            return Ok(());
        }
        note(open, &point).await?;
    }
    let rows: Option<i64> = open.conn.query_first(count()).await?;
    let keep = if rows.unwrap_or(0) > CROWDED { 30 } else { 600 };
    let seen: Option<String> = open.conn.exec_first(SEEN_BY_ALL, (open.origin.as_str(), keep)).await?;
    let Some(seen) = seen.and_then(|text| Point::parse(&text)) else { return Ok(()) };
    let said: Option<Row> = open.conn.query_first(ABOUT).await?;
    let said = about(said.as_ref(), &open.origin);
    // It never moves back, whatever the clock does.
    let horizon = match said.horizon {
        Some(before) if !seen.contains(&before) => before,
        _ => seen,
    };
    // Before anything is dropped: whoever misses a row finds that it may be missing.
    let move_on = "UPDATE cache_aside.about SET origin = ?, horizon = ?";
    open.conn.exec_drop(move_on, (open.origin.as_str(), horizon.text())).await?;
    open.conn.query_drop("DELETE FROM cache_aside.points WHERE at < NOW(6) - INTERVAL 11 MINUTE").await?;
    let mut after = 0;
    loop {
        // Found without a lock, and dropped in runs without a gap: nothing waits for an open transaction. The limit ends a
        // run at its last row; else the one after it would be looked at, and may be locked.
        let asked = format!(
            "SELECT id FROM cache_aside.outbox WHERE id > {after} AND id < {} ORDER BY id LIMIT {SWEPT}",
            horizon.high()
        );
        let found: Vec<u64> = open.conn.query(asked).await?;
        let Some(last) = found.last().copied() else { return Ok(()) };
        for (first, last) in runs(found.iter().copied().filter(|id| horizon.shows(*id))) {
            let drop = format!(
                "DELETE FROM cache_aside.outbox WHERE id BETWEEN {first} AND {last} ORDER BY id LIMIT {}",
                last - first + 1
            );
            open.conn.query_drop(drop).await?;
        }
        if found.len() < SWEPT {
            return Ok(());
        }
        after = last;
    }
}

/// Ids in ascending order, as runs without a gap.
fn runs(ids: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for id in ids {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == id => *last = id,
            _ => runs.push((id, id)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn ids_without_a_gap_are_one_run() {
        assert_eq!(runs([2, 3, 4, 7, 9, 10].into_iter()), [(2, 4), (7, 7), (9, 10)]);
        assert_eq!(runs(std::iter::empty()), []);
    }
}
