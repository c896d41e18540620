//! Change capture: what `migrate` installs, and what a service finds of it.
//!
//! The database `cache_aside` belongs to everybody who caches on this server, so an installation only ever adds: tables
//! that this configuration doesn't name, and columns that it has no list for, may be another's.

mod script;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Row};
use xxhash_rust::xxh3::xxh3_64;

use self::script::{Below, Cascade, Place};
use super::connect::SQL_MODE;
use super::refusal::{Failure, meaning};
use super::sql::literal;
use super::{MysqlStore, close, describe};
use crate::catalog::{Column, Table, TableName};
use crate::store::{Captured, StoreError, Wanted};

/// Tells what a person has dropped.
pub(super) const ANNOUNCE: &str = "INSERT INTO cache_aside.outbox (relation, image) VALUES ('', ?)";

/// Only MariaDB can be a node of Galera, and only it reads the comment.
const STATE: &str = "
    SELECT a.version, @@global.auto_increment_increment,
           COALESCE((SELECT /*M!100100 v.VARIABLE_VALUE FROM information_schema.GLOBAL_VARIABLES v
                     WHERE v.VARIABLE_NAME = 'WSREP_ON' AND '' <> */ 'OFF'), 'OFF')
    FROM cache_aside.about a;
    SELECT c.relation, c.id, c.columns FROM cache_aside.captures c";

/// How long what was found may be used: all resources are looked at in one go.
const FRESH: Duration = Duration::from_millis(400);

/// How often a lock that writers hold is asked for: whoever waits for it makes writers wait too, a second each time.
const LOCK_ATTEMPTS: u32 = 20;

/// What is installed.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    at: Instant,
    schemas: BTreeSet<String>,
    installed: Installed,
}

#[derive(Clone, Debug, Default)]
struct Installed {
    version: i64,
    /// Ids are given out in steps of this.
    step: u64,
    /// Several servers write, whatever the steps are.
    is_cluster: bool,
    /// By relation: the installation, and the columns that come along.
    captures: BTreeMap<String, (String, BTreeSet<String>)>,
    /// By database and name: the table, the body, and when it was made.
    triggers: BTreeMap<(String, String), (String, String, String)>,
    cascades: Vec<Cascade>,
}

impl Installed {
    /// What was made of this trigger, if its body says at least this.
    fn made(&self, place: &Place, event: &str, parts: &[String]) -> Option<&str> {
        let (table, body, created) = self.trigger(place, event)?;
        (*table == place.1 && parts.iter().all(|part| body.contains(part.as_str()))).then_some(created)
    }

    /// The trigger of this name: RENAME TABLE takes triggers along, so it may be on another table by now.
    fn trigger(&self, place: &Place, event: &str) -> Option<&(String, String, String)> {
        self.triggers.get(&(place.0.clone(), script::trigger(place, event)))
    }

    /// Another table that a trigger of this name went along with.
    fn strayed(&self, place: &Place, event: &str) -> Option<Place> {
        let (table, ..) = self.trigger(place, event)?;
        (*table != place.1).then(|| (place.0.clone(), table.clone()))
    }

    fn judge(&self, wanted: &Wanted, table: &Table) -> Captured {
        let relation = &wanted.relation;
        if self.version < script::VERSION {
            return Captured::Lacking("the change capture is of an older version; run cache-aside migrate".into());
        }
        if self.step != 1 {
            return Captured::Lacking(format!(
                "the server gives out ids in steps of {} (auto_increment_increment), as where several servers write: \
                 changes can't be followed there",
                self.step
            ));
        }
        if self.is_cluster {
            return Captured::Lacking(
                "the server is a node of a Galera cluster: changes can't be followed there".into(),
            );
        }
        let Some((id, captured)) = self.captures.get(relation) else {
            return Captured::Lacking(format!("changes of {relation} are not captured; run cache-aside migrate"));
        };
        if let Some(column) = wanted.columns.iter().find(|column| !captured.contains(*column)) {
            return Captured::Lacking(format!(
                "changes of {relation} are captured without column {column}; run cache-aside migrate"
            ));
        }
        let place = place_of(table);
        let columns = chosen(table, captured);
        let mut made = String::new();
        for event in script::EVENTS {
            let Some(created) = self.made(&place, event, &[script::own(relation, &columns, event)]) else {
                return Captured::Lacking(format!(
                    "{relation} has no trigger that tells of each {event} as the table is now; run cache-aside migrate"
                ));
            };
            made.push_str(created);
        }
        let one: BTreeSet<String> = std::iter::once(relation.clone()).collect();
        for (parent, below) in script::below(&self.cascades, &one) {
            for event in ["update", "delete"] {
                let parts = script::cascaded(&below, event);
                if parts.is_empty() {
                    continue;
                }
                // Other captured tables may be among what a condition tells of.
                let parts = [script::whole(relation)];
                let Some(created) = self.made(&parent, event, &parts) else {
                    return Captured::Lacking(format!(
                        "a foreign key changes rows of {relation} when {} changes, and no trigger there says so; \
                         run cache-aside migrate",
                        script::relation(&parent)
                    ));
                };
                made.push_str(created);
            }
        }
        // Triggers that were made anew leave a gap.
        Captured::Complete { id: format!("{id}-{:016x}", xxh3_64(made.as_bytes())), partial: false, late: false }
    }
}

fn place_of(table: &Table) -> Place {
    (table.schema.clone().unwrap_or_default(), table.name.clone())
}

/// The columns that come along, as far as they are still there.
fn chosen<'a>(table: &'a Table, names: &BTreeSet<String>) -> Vec<&'a Column> {
    // In the order of their names, which doesn't change when the table does.
    names.iter().filter_map(|name| table.columns.iter().find(|column| column.name == *name)).collect()
}

fn text(row: &Row, index: usize) -> String {
    row.get::<Option<String>, _>(index).flatten().unwrap_or_default()
}

fn flag(row: &Row, index: usize) -> bool {
    row.get::<Option<i64>, _>(index).flatten().is_some_and(|flag| flag != 0)
}

fn captures(rows: &[Row]) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let one = |row: &Row| (text(row, 0), (text(row, 1), serde_json::from_str(&text(row, 2)).unwrap_or_default()));
    rows.iter().map(one).collect()
}

fn triggers(rows: &[Row]) -> BTreeMap<(String, String), (String, String, String)> {
    let one = |row: &Row| ((text(row, 0), text(row, 1)), (text(row, 2), text(row, 3), text(row, 4)));
    rows.iter().map(one).collect()
}

fn cascades(rows: &[Row]) -> Vec<Cascade> {
    let one = |row: &Row| Cascade {
        child: (text(row, 0), text(row, 1)),
        parent: (text(row, 2), text(row, 3)),
        column: text(row, 4),
        deletes: flag(row, 5),
        updates: flag(row, 6),
    };
    rows.iter().map(one).collect()
}

/// What is installed, as far as tables of these databases are concerned, and those whose cascades change them.
async fn installed(conn: &mut Conn, schemas: &BTreeSet<String>) -> Result<Installed, Error> {
    let mut result = conn.query_iter(STATE).await?;
    let about: Vec<Row> = result.collect().await?;
    let captured: Vec<Row> = result.collect().await?;
    result.drop_result().await?;
    let mut found = Installed {
        version: about.first().and_then(|row| row.get(0)).unwrap_or(0),
        step: about.first().and_then(|row| row.get(1)).unwrap_or(1),
        is_cluster: about.first().is_some_and(|row| text(row, 2) == "ON"),
        captures: captures(&captured),
        ..Installed::default()
    };
    let (mut asked, mut open) = (BTreeSet::new(), schemas.clone());
    while let Some(schema) = open.pop_first() {
        let call = format!("CALL cache_aside.installed({})", literal(&schema));
        let mut result = conn.query_iter(call).await?;
        let made: Vec<Row> = result.collect().await?;
        let keys: Vec<Row> = result.collect().await?;
        result.drop_result().await?;
        found.triggers.extend(triggers(&made));
        let keys = cascades(&keys);
        asked.insert(schema);
        // A parent may be in another database.
        open.extend(keys.iter().map(|key| key.parent.0.clone()).filter(|schema| !asked.contains(schema)));
        found.cascades.extend(keys);
    }
    Ok(found)
}

/// The databases of these tables.
fn schemas(wanted: &[Wanted]) -> BTreeSet<String> {
    wanted.iter().filter_map(|wanted| TableName::parse(&wanted.relation).ok()?.schema).collect()
}

/// Whether a refusal says that nothing is installed, or that this account may not see it.
fn absent(code: u16) -> Option<&'static str> {
    match code {
        1049 | 1146 | 1305 => Some("the change capture is not installed; run cache-aside migrate"),
        1044 | 1142 | 1143 | 1370 => {
            Some("this account may not use the change capture; run cache-aside migrate --grant USER@HOST")
        }
        _ => None,
    }
}

impl MysqlStore {
    /// How far changes of these tables are captured, in their order.
    pub(super) async fn captures(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        let installed = match self.installed(schemas(wanted)).await? {
            Ok(installed) => installed,
            Err(words) => return Ok(wanted.iter().map(|_| Captured::Lacking(words.into())).collect()),
        };
        let mut all = Vec::new();
        for wanted in wanted {
            all.push(match self.base_table(&wanted.relation).await? {
                Found::Table(table) => installed.judge(wanted, &table),
                Found::Absent => Captured::Lacking(format!("{} is not there", wanted.relation)),
                Found::Never(words) => Captured::Never(words),
            });
        }
        Ok(all)
    }

    /// What is installed; or why nothing can be seen of it.
    async fn installed(&self, schemas: BTreeSet<String>) -> Result<Result<Installed, &'static str>, StoreError> {
        let mut place = self.inner.installed.lock().await;
        if let Some(seen) =
            place.as_ref().filter(|seen| seen.at.elapsed() < FRESH && seen.schemas.is_superset(&schemas))
        {
            return Ok(Ok(seen.installed.clone()));
        }
        let mut checked = self.inner.pool.checkout().await?;
        let at = Instant::now();
        let asked = tokio::time::timeout(self.limit(), installed(checked.begin()?, &schemas)).await;
        match checked.end(asked) {
            Ok(installed) => {
                *place = Some(Seen { at, schemas, installed: installed.clone() });
                // A connection that knows no life yet would store nothing.
                if checked.origin() == 0 {
                    checked.forget();
                }
                Ok(Ok(installed))
            }
            Err(Failure::Server(refusal)) => match absent(refusal.code) {
                Some(words) => Ok(Err(words)),
                None => Err(meaning(&refusal)),
            },
            Err(failed) => Err(failed.into()),
        }
    }

    async fn base_table(&self, relation: &str) -> Result<Found, StoreError> {
        let Ok(name) = TableName::parse(relation) else { return Ok(Found::Absent) };
        let Some(table) = describe::table(self, &name).await? else { return Ok(Found::Absent) };
        if table.is_view {
            let words = format!("{relation} is a view: name the tables it reads with depends_on:");
            return Ok(Found::Never(words));
        }
        let engine = "SELECT t.ENGINE FROM information_schema.TABLES t WHERE t.TABLE_SCHEMA = ? AND t.TABLE_NAME = ?";
        let place = place_of(&table);
        let params = [place.0, place.1].map(|part| mysql_async::Value::Bytes(part.into_bytes())).to_vec();
        let (rows, _) = self.fetch(engine, params).await?;
        let engine = rows.first().map(|row| text(row, 0)).unwrap_or_default();
        if engine != "InnoDB" {
            let words = format!(
                "{relation} is a table of the engine {engine}, which has no transactions: changes are not seen before the \
                 TTL ends"
            );
            return Ok(Found::Never(words));
        }
        Ok(Found::Table(Box::new(table)))
    }

    /// Installs what is lacking, and says what it did, one sentence each.
    ///
    /// Needs the right to create the database `cache_aside`, and triggers on the tables and on those whose cascades change
    /// them. Writers wait for it no longer than a second at a time.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; what was done before stays, and running it again goes on from there.
    pub async fn install(&self, wanted: &[Wanted], account: Option<&str>) -> Result<Vec<String>, StoreError> {
        let made = self.inner.connector.connect().await?;
        let mut conn = made.conn;
        let done = self.installing(&mut conn, wanted, account).await;
        // Its session has settings and locks that nobody else must have.
        close(conn);
        *self.inner.installed.lock().await = None;
        done
    }

    async fn installing(
        &self,
        conn: &mut Conn,
        wanted: &[Wanted],
        account: Option<&str>,
    ) -> Result<Vec<String>, StoreError> {
        let failed = |failed: Error| StoreError::from(Failure::from(failed));
        // One at a time, wherever it runs; the lock ends with this connection.
        conn.query_drop(
            "SET SESSION lock_wait_timeout = 1 /*M!100101 , max_statement_time = 0 */; \
             SELECT GET_LOCK('cache_aside.migrate', 60)",
        )
        .await
        .map_err(failed)?;
        let there = installed(conn, &BTreeSet::new()).await.is_ok_and(|there| there.version == script::VERSION);
        for statement in script::base() {
            // Made anew, it would lose the rights that were granted on it.
            if there && statement.contains("PROCEDURE") {
                continue;
            }
            conn.query_drop(statement).await.map_err(failed)?;
        }
        let before = installed(conn, &schemas(wanted)).await.map_err(failed)?;
        let mut done = Vec::new();
        let steps = self.steps(&before, wanted).await?;
        for step in &steps.tables {
            let lacking: Vec<&(&str, String)> = step
                .bodies
                .iter()
                .filter(|(event, body)| {
                    before
                        .trigger(&step.place, event)
                        .is_none_or(|(table, there, _)| *table != step.place.1 || there != body)
                })
                .collect();
            let strayed = lacking.iter().filter_map(|(event, _)| before.strayed(&step.place, event)).collect();
            let name = script::relation(&step.place);
            if !lacking.is_empty() {
                replace(conn, &step.place, strayed, &lacking).await.map_err(failed)?;
            }
            match &step.columns {
                Some(columns)
                    if lacking.is_empty() && before.captures.get(&name).is_some_and(|(_, c)| c == columns) =>
                {
                    done.push(format!("{name}: up to date"));
                }
                Some(columns) => {
                    let registered = "INSERT INTO cache_aside.captures (relation, id, columns) VALUES (?, ?, ?) \
                                      ON DUPLICATE KEY UPDATE id = VALUES(id), columns = VALUES(columns)";
                    let id = uuid::Uuid::now_v7().to_string();
                    // A set of strings always is JSON.
                    let json = serde_json::to_string(columns).unwrap_or_default();
                    conn.exec_drop(registered, (&name, id, json)).await.map_err(failed)?;
                    let list = columns.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                    done.push(format!("{name}: captured, with {}", if list.is_empty() { "no columns" } else { &list }));
                }
                None if lacking.is_empty() => done.push(format!("{name}: up to date, for its cascades")),
                None => done.push(format!("{name}: tells of its cascades")),
            }
        }
        done.extend(steps.left_out);
        if let Some(account) = account {
            for right in script::grant(account) {
                conn.query_drop(right).await.map_err(failed)?;
            }
            done.push(format!("{account} may serve"));
        }
        Ok(done)
    }

    /// The whole SQL that [`Self::install`] would run on an empty database, as the servers' own client reads it.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database could not describe the tables.
    pub async fn install_script(&self, wanted: &[Wanted], account: Option<&str>) -> Result<String, StoreError> {
        let made = self.inner.connector.connect().await?;
        let mut conn = made.conn;
        let found = async {
            let before = match installed(&mut conn, &schemas(wanted)).await {
                Ok(before) => before,
                Err(Error::Server(refusal)) if absent(refusal.code).is_some() => Installed {
                    cascades: cascades(&conn.query::<Row, _>(script::CASCADES).await?),
                    ..Installed::default()
                },
                Err(failed) => return Err(failed),
            };
            Ok(before)
        };
        let before = found.await.map_err(|failed| StoreError::from(Failure::from(failed)))?;
        close(conn);
        // A trigger keeps the mode and the character set of the session that made it.
        let mut all = format!("SET NAMES utf8mb4;\nSET SESSION sql_mode = '{SQL_MODE}';\nDELIMITER ;;\n");
        let mut say = |statement: &str| {
            all.push_str(statement);
            all.push_str(" ;;\n");
        };
        for statement in script::base() {
            say(&statement);
        }
        for step in self.steps(&before, wanted).await?.tables {
            for (event, body) in &step.bodies {
                say(&script::drop(&step.place.0, &script::trigger(&step.place, event)));
                say(&script::create(&step.place, event, body));
            }
            if let Some(columns) = &step.columns {
                let json = serde_json::to_string(columns).unwrap_or_default();
                say(&format!(
                    "INSERT INTO cache_aside.captures (relation, id, columns) VALUES ({}, UUID(), {}) \
                     ON DUPLICATE KEY UPDATE id = VALUES(id), columns = VALUES(columns)",
                    literal(&script::relation(&step.place)),
                    literal(&json)
                ));
            }
        }
        for right in account.map(script::grant).unwrap_or_default() {
            say(&right);
        }
        all.push_str("DELIMITER ;\n");
        Ok(all)
    }

    /// Which triggers there should be.
    async fn steps(&self, before: &Installed, wanted: &[Wanted]) -> Result<Steps, StoreError> {
        let (mut tables, mut left_out) = (BTreeMap::new(), BTreeSet::new());
        let asked: BTreeSet<String> = wanted.iter().map(|wanted| wanted.relation.clone()).collect();
        let above = script::below(&before.cascades, &asked);
        // What others have captured is looked at only where a trigger must tell of both.
        let above: BTreeSet<Place> = above.into_keys().collect();
        let shared = above.iter().map(script::relation).filter(|relation| before.captures.contains_key(relation));
        let relations: BTreeSet<String> = asked.iter().cloned().chain(shared).collect();
        for relation in &relations {
            match self.base_table(relation).await? {
                Found::Table(table) => {
                    let asked = wanted.iter().filter(|wanted| wanted.relation == *relation);
                    let mut columns: BTreeSet<String> = asked.flat_map(|wanted| wanted.columns.clone()).collect();
                    columns.extend(before.captures.get(relation).into_iter().flat_map(|(_, there)| there.clone()));
                    // A column that is gone would make every write fail.
                    columns.retain(|name| table.columns.iter().any(|column| column.name == *name));
                    tables.insert(place_of(&table), (*table, columns));
                }
                Found::Never(words) => drop(left_out.insert(words)),
                Found::Absent => {}
            }
        }
        let captured = tables.keys().map(script::relation).chain(before.captures.keys().cloned()).collect();
        let below = script::below(&before.cascades, &captured);
        let places: BTreeSet<&Place> = tables.keys().chain(&above).collect();
        let step = |place: &Place| {
            let table = tables.get(place);
            let columns = table.map(|(table, columns)| chosen(table, columns));
            let body = |event: &&'static str| {
                let below: Option<&Below> = below.get(place);
                Some((*event, script::body(&script::relation(place), columns.as_deref(), below, event)?))
            };
            Step {
                place: place.clone(),
                columns: table.map(|(_, columns)| columns.clone()),
                bodies: script::EVENTS.iter().filter_map(body).collect(),
            }
        };
        Ok(Steps { tables: places.into_iter().map(step).collect(), left_out: left_out.into_iter().collect() })
    }

    /// Removes the capture of all tables, whoever installed it.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn uninstall(&self) -> Result<(), StoreError> {
        let mut conn = self.inner.connector.connect().await?.conn;
        let removed = async {
            conn.query_drop("SET SESSION lock_wait_timeout = 1 /*M!100101 , max_statement_time = 0 */").await?;
            for statement in removal(&mut conn).await? {
                patiently(&mut conn, &[statement]).await?;
            }
            Ok::<_, Error>(())
        };
        let removed = removed.await;
        close(conn);
        *self.inner.installed.lock().await = None;
        removed.map_err(|failed| Failure::from(failed).into())
    }

    /// The SQL that removes the capture.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: which triggers there are, only the database knows.
    pub async fn uninstall_script(&self) -> Result<String, StoreError> {
        let mut conn = self.inner.connector.connect().await?.conn;
        let removal = removal(&mut conn).await;
        close(conn);
        let removal = removal.map_err(|failed| StoreError::from(Failure::from(failed)))?;
        Ok(removal.iter().map(|statement| format!("{statement};\n")).collect())
    }
}

/// The triggers first: without the outbox they would make every write fail.
async fn removal(conn: &mut Conn) -> Result<Vec<String>, Error> {
    let rows: Vec<Row> = conn.query(script::TRIGGERS).await?;
    let ours = triggers(&rows).into_keys().map(|(schema, name)| script::drop(&schema, &name));
    Ok(ours.chain(std::iter::once("DROP DATABASE IF EXISTS cache_aside".to_owned())).collect())
}

enum Found {
    Table(Box<Table>),
    Absent,
    Never(String),
}

/// The triggers of one table.
struct Step {
    place: Place,
    /// What comes along, where the table itself is captured.
    columns: Option<BTreeSet<String>>,
    bodies: Vec<(&'static str, String)>,
}

struct Steps {
    tables: Vec<Step>,
    /// What can't be captured: why.
    left_out: Vec<String>,
}

/// Makes triggers anew, with no write in between. `strayed`: tables on which triggers of these names are now; they leave
/// there, which takes their locks too.
async fn replace(
    conn: &mut Conn,
    place: &Place,
    strayed: BTreeSet<Place>,
    bodies: &[&(&str, String)],
) -> Result<(), Error> {
    let locked: Vec<String> =
        std::iter::once(place).chain(&strayed).map(|place| format!("{} WRITE", script::table(place))).collect();
    let mut statements = vec![format!("LOCK TABLES {}", locked.join(", "))];
    for (event, body) in bodies {
        statements.push(script::drop(&place.0, &script::trigger(place, event)));
        statements.push(script::create(place, event, body));
    }
    let replaced = patiently(conn, &statements).await;
    conn.query_drop("UNLOCK TABLES").await?;
    replaced
}

/// Where a lock can't be had soon it lets go, so that writers can go on, and tries again.
async fn patiently(conn: &mut Conn, statements: &[String]) -> Result<(), Error> {
    for attempt in 1.. {
        let mut outcome = Ok(());
        for statement in statements {
            outcome = conn.query_drop(statement.as_str()).await;
            if outcome.is_err() {
                break;
            }
        }
        match outcome {
            Err(Error::Server(refusal)) if refusal.code == 1205 && attempt < LOCK_ATTEMPTS => {
                conn.query_drop("UNLOCK TABLES").await?;
                tokio::time::sleep(Duration::from_millis(250).mul_f64(0.5 + fastrand::f64())).await;
            }
            outcome => return outcome,
        }
    }
    Ok(())
}
