//! Change capture: what `migrate` installs, and what a service finds of it.
//!
//! The schema `cache_aside` belongs to everybody who caches this database, so an installation only ever adds: tables
//! that this configuration doesn't name, and columns that it has no list for, may be another's.

mod published;
mod script;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use super::{PostgresStore, error, wal};
use crate::store::{Captured, StoreError, Wanted};
pub(super) use published::captured_table;
use script::Level;
pub(super) use script::{Column, PUBLICATION, Written, insert_decoded};

/// One row per wanted table: how its triggers are and which columns they write. A trigger counts if it calls the table's own
/// function, once per row or statement as it should.
const STATE: &str = "
    SELECT w.relation, r.relkind::text, r.relispartition OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = r.oid),
           a.version, c.id::text, c.columns,
           ARRAY(SELECT t.tgname::text || ':' || (t.tgtype & 1) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                 JOIN pg_namespace n ON n.oid = p.pronamespace
                 WHERE t.tgrelid = r.oid AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A')
                   AND n.nspname = 'cache_aside' AND p.proname = w.function),
           {columns},
           r.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = r.oid)
    FROM unnest($1::text[], $2::text[]) AS w (relation, function)
    LEFT JOIN pg_class r ON r.oid = to_regclass(w.relation)
    CROSS JOIN cache_aside.about a
    LEFT JOIN cache_aside.captures c ON c.relation = w.relation";

/// A table's columns, as two arrays: their names, and how each is written.
const COLUMNS: &str = "
           ARRAY(SELECT at.attname::text FROM pg_attribute at
                 WHERE at.attrelid = r.oid AND at.attnum > 0 AND NOT at.attisdropped ORDER BY at.attnum),
           ARRAY(SELECT CASE WHEN ty.typtype = 'e' THEN 'label:' WHEN ty.typtype = 'b' AND tn.nspname = 'pg_catalog'
                   AND ty.typname = ANY (ARRAY['int2', 'int4', 'int8', 'oid', 'text', 'varchar', 'bpchar', 'name', 'uuid',
                     'bool', 'numeric', 'float4', 'float8', 'bytea', 'date', 'time', 'timetz', 'timestamp', 'inet', 'cidr',
                     'macaddr']) OR ty.typname = 'citext' THEN 'json:' ELSE 'unsettled:' END
                   || CASE WHEN tn.nspname = 'pg_catalog' THEN format_type(ty.oid, -1)
                      ELSE quote_ident(tn.nspname) || '.' || quote_ident(ty.typname) END
                 FROM pg_attribute at JOIN pg_type ty ON ty.oid = at.atttypid JOIN pg_namespace tn ON tn.oid = ty.typnamespace
                 WHERE at.attrelid = r.oid AND at.attnum > 0 AND NOT at.attisdropped ORDER BY at.attnum)";

/// How often a lock that writers hold is asked for, and how long each time: whoever waits for it makes writers wait too.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PATIENCE: &str = "500ms";

/// One table of the database, as the capture is concerned.
struct Found {
    relation: String,
    kind: String,
    is_child: bool,
    version: i32,
    id: Option<String>,
    columns: Vec<String>,
    /// Each with a 1 if it fires for each row, else a 0.
    triggers: BTreeSet<String>,
    table_columns: Vec<Column>,
    /// Rows of other tables are among its rows.
    is_parent: bool,
}

impl Found {
    /// What is written of each row.
    fn captured(&self) -> Vec<Column> {
        let column = |name: &String| self.table_columns.iter().find(|column| column.name == *name).cloned();
        self.columns.iter().filter_map(column).collect()
    }

    fn level(&self) -> Level {
        if self.kind == "p" || self.is_child { Level::Row } else { Level::Statement }
    }

    fn lacking_triggers(&self) -> Vec<&'static str> {
        let there = |event: &&'static str| {
            let each_row = self.level() == Level::Row && *event != "truncate";
            self.triggers.contains(&format!("{}:{}", script::trigger(&self.relation, event), u8::from(each_row)))
        };
        script::EVENTS.into_iter().filter(|event| !there(event)).collect()
    }

    fn judge(&self, wanted: &Wanted) -> Captured {
        let relation = &self.relation;
        match self.kind.as_str() {
            "r" if self.is_parent => {
                return Captured::Never(format!(
                    "{relation} has inheriting tables: changes made to those directly are not seen before the TTL ends"
                ));
            }
            "r" | "p" => {}
            "" => return Captured::Lacking(format!("{relation} is not there")),
            "f" => {
                return Captured::Never(format!(
                    "{relation} is a foreign table: changes are not seen before the TTL ends"
                ));
            }
            _ => return Captured::Never(format!("{relation} is a view: name the tables it reads with depends_on:")),
        }
        if self.version < script::VERSION {
            return Captured::Lacking("the change capture is of an older version; run cache-aside migrate".into());
        }
        let triggers = self.lacking_triggers();
        let Some(id) = self.id.as_deref().filter(|_| triggers.len() < script::EVENTS.len()) else {
            return Captured::Lacking(format!("changes of {relation} are not captured; run cache-aside migrate"));
        };
        if !triggers.is_empty() {
            let words = "has no trigger, or a disabled one, for";
            return Captured::Lacking(format!("{relation} {words} {}; run cache-aside migrate", triggers.join(", ")));
        }
        if let Some(column) = wanted.columns.iter().find(|column| !self.columns.contains(column)) {
            return Captured::Lacking(format!(
                "changes of {relation} are captured without column {column}; run cache-aside migrate"
            ));
        }
        Captured::Complete { id: id.to_owned(), partial: false, late: false }
    }
}

/// What is to be done for one table.
struct Step {
    relation: String,
    columns: Vec<String>,
    script: String,
    /// It was done before.
    done: bool,
}

/// A question about tables, for a database that has our schema or has not.
fn question(state: &str, installed: bool) -> String {
    let state = state.replace("{columns}", COLUMNS);
    if installed {
        return state;
    }
    state
        .replace("cache_aside.about a", "(SELECT 0 AS version) a")
        .replace("cache_aside.captures c", "(SELECT NULL AS relation, NULL::uuid AS id, NULL::text[] AS columns) c")
}

/// The wanted tables by name, as the database has them. `installed`: whether there is a schema to ask.
async fn find(client: &Client, wanted: &[Wanted], installed: bool) -> Result<BTreeMap<String, Found>, Error> {
    let relations: Vec<&str> = wanted.iter().map(|wanted| wanted.relation.as_str()).collect();
    let state = question(STATE, installed);
    let functions: Vec<String> = relations.iter().map(|relation| script::function_name(relation)).collect();
    let rows = client.query_typed(&state, &[(&relations, Type::TEXT_ARRAY), (&functions, Type::TEXT_ARRAY)]).await?;
    let mut found = BTreeMap::new();
    for row in &rows {
        let relation: String = row.try_get(0)?;
        let one = Found {
            relation: relation.clone(),
            kind: row.try_get::<_, Option<String>>(1)?.unwrap_or_default(),
            is_child: row.try_get::<_, Option<bool>>(2)?.unwrap_or_default(),
            version: row.try_get(3)?,
            id: row.try_get(4)?,
            columns: row.try_get::<_, Option<Vec<String>>>(5)?.unwrap_or_default(),
            triggers: row.try_get::<_, Vec<String>>(6)?.into_iter().collect(),
            table_columns: columns(row.try_get(7)?, row.try_get(8)?),
            is_parent: row.try_get::<_, Option<bool>>(9)?.unwrap_or_default(),
        };
        found.insert(relation, one);
    }
    Ok(found)
}

/// The table's columns, from their names and from their types, each with how it is written.
fn columns(names: Vec<String>, types: Vec<String>) -> Vec<Column> {
    let column = |(name, text): (String, String)| {
        let (kind, type_name) = text.split_once(':').unwrap_or(("unsettled", ""));
        let kind = match kind {
            "json" => Written::Json,
            "label" => Written::Label,
            _ => Written::Unsettled,
        };
        Column { name, type_name: type_name.to_owned(), kind }
    };
    names.into_iter().zip(types).map(column).collect()
}

/// Whether an error says that nothing is installed, or that this role may not see it.
pub(super) fn absent(failed: &Error) -> Option<&'static str> {
    match failed.code()?.code() {
        "42P01" | "42883" | "3F000" => Some("the change capture is not installed; run cache-aside migrate"),
        "42501" => Some("this role may not read the change capture; run cache-aside migrate --grant ROLE"),
        _ => None,
    }
}

impl PostgresStore {
    /// How far changes of these tables are captured, in their order.
    pub(super) async fn captures(&self, wanted: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        let decodes = self.inner.decodes;
        let judged = self.ask(async |client| {
            let judged = async {
                let judged: Vec<_> = if decodes {
                    let found = published::find(client, wanted, true).await?;
                    let judge = |wanted: &Wanted| found.get(&wanted.relation).map(|found| found.judge(wanted));
                    wanted.iter().map(judge).collect()
                } else {
                    let found = find(client, wanted, true).await?;
                    let judge = |wanted: &Wanted| found.get(&wanted.relation).map(|found| found.judge(wanted));
                    wanted.iter().map(judge).collect()
                };
                // What a round and a write will ask for: without the right to it, nothing would ever be delivered.
                let all = "SELECT xid, image, cache_aside.origin() FROM cache_aside.outbox LIMIT 0";
                client.query_typed(all, &[]).await?;
                Ok::<_, Error>(judged)
            };
            match judged.await {
                Ok(judged) => Ok(Ok(judged)),
                Err(failed) => absent(&failed).map(Err).ok_or(failed),
            }
        });
        let one = |(judged, wanted): (Option<Captured>, &Wanted)| {
            judged.unwrap_or_else(|| Captured::Lacking(format!("{} is not there", wanted.relation)))
        };
        Ok(match judged.await? {
            Ok(judged) => judged.into_iter().zip(wanted).map(one).collect(),
            Err(words) => wanted.iter().map(|_| Captured::Lacking(words.into())).collect(),
        })
    }

    /// The whole SQL that [`Self::install`] would run on an empty database.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database could not describe the tables.
    pub async fn install_script(&self, wanted: &[Wanted], role: Option<&str>) -> Result<String, StoreError> {
        let checked = self.checkout().await?;
        let client = checked.client()?;
        let mut all = format!("BEGIN;\n{}COMMIT;\n", script::base());
        let steps = match self.steps(client, wanted, true).await {
            // Nothing is installed, and nothing is to be installed by looking.
            Err(failed) if absent(&failed).is_some() => self.steps(client, wanted, false).await,
            steps => steps,
        };
        if self.inner.decodes {
            all.push_str(&script::publication());
        }
        for step in steps.map_err(error)? {
            // What is up to date, too: the whole SQL is asked for.
            for part in ["BEGIN;\nSET LOCAL lock_timeout = '", LOCK_PATIENCE, "';\n", &step.script, "COMMIT;\n"] {
                all.push_str(part);
            }
        }
        all.push_str(&role.map(|role| self.grant(role)).unwrap_or_default());
        if self.inner.decodes {
            all.push_str(
                "-- The replication slot is made by the first service that runs, or by cache-aside migrate.\n",
            );
        }
        Ok(all)
    }

    fn grant(&self, role: &str) -> String {
        let decoding = if self.inner.decodes { script::grant_decoding(role) } else { String::new() };
        script::grant(role) + &decoding
    }

    /// What is to be done for each table.
    async fn steps(&self, client: &Client, wanted: &[Wanted], installed: bool) -> Result<Vec<Step>, Error> {
        if !self.inner.decodes {
            let tables = merged(client, wanted, installed).await?;
            let before = find(client, wanted, installed).await?;
            return Ok(tables
                .into_iter()
                .map(|table| {
                    let lacking = table.lacking_triggers();
                    let before = before.get(&table.relation);
                    // After a gap, what was cached before must not be used again.
                    let forget = if lacking.is_empty() { String::new() } else { script::forget(&table.relation) };
                    let script = forget + &script::table(&table.relation, &table.captured(), table.level());
                    let done =
                        lacking.is_empty() && before.is_some_and(|it| it.id.is_some() && it.columns == table.columns);
                    Step { relation: table.relation, columns: table.columns, script, done }
                })
                .collect());
        }
        let mut steps = Vec::new();
        for (relation, found) in published::find(client, wanted, installed).await? {
            if !found.can_be_published() {
                continue;
            }
            let columns = union(wanted, &relation, &found.columns, &found.table_columns);
            let forget = if found.published { String::new() } else { script::forget(&relation) };
            let script = forget + &script::publish(&relation, &found.captured(&columns));
            steps.push(Step { done: found.is_complete(&columns), relation, columns, script });
        }
        Ok(steps)
    }

    /// Installs what is lacking, and says what it did, one sentence each.
    ///
    /// Needs the right to create a schema in the database and to create triggers on the tables. Writers wait for it no
    /// longer than half a second at a time.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; what was done before stays, and running it again goes on from there.
    pub async fn install(&self, wanted: &[Wanted], role: Option<&str>) -> Result<Vec<String>, StoreError> {
        // Its session has settings and a lock that the pool must not hand on.
        let lost = self.checkout().await?.lose()?;
        let client = &lost.client;
        let run = async {
            let mut done = Vec::new();
            // One at a time, wherever it runs; the lock ends with this connection's session.
            client
                .batch_execute("SET statement_timeout = 0; SELECT pg_advisory_lock(hashtext('cache_aside.migrate'))")
                .await?;
            client.batch_execute(&format!("BEGIN; {} COMMIT", script::base())).await?;
            if self.inner.decodes {
                client.batch_execute(&script::publication()).await?;
            }
            for step in self.steps(client, wanted, true).await? {
                if step.done {
                    done.push(format!("{}: up to date", step.relation));
                    continue;
                }
                locked(client, &step.script).await?;
                done.push(format!("{}: captured, with {}", step.relation, list(&step.columns)));
            }
            if let Some(role) = role {
                client.batch_execute(&self.grant(role)).await?;
                done.push(format!("{role} may serve"));
            }
            if self.inner.decodes && wal::begin_anew(client).await? {
                done.push("the replication slot is there".into());
            }
            Ok::<_, Error>(done)
        };
        run.await.map_err(error)
    }

    /// Removes the capture of all tables, whoever installed it.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn uninstall(&self) -> Result<(), StoreError> {
        let checked = self.checkout().await?;
        let client = checked.client()?;
        locked(client, script::UNINSTALL).await.map_err(error)?;
        // A service that reads a slot finds nothing to fill any more, and doesn't come back.
        for attempt in 0.. {
            let rows = client.query_typed(script::END_DECODING, &[]).await.map_err(error)?;
            let mut left = false;
            for row in rows {
                let (name, active): (String, bool) = (row.try_get(0).map_err(error)?, row.try_get(1).map_err(error)?);
                let drop = "SELECT pg_drop_replication_slot($1)";
                let dropped = if active { None } else { Some(client.query_typed(drop, &[(&name, Type::TEXT)]).await) };
                match dropped {
                    Some(Ok(_)) => {}
                    None | Some(Err(_)) if attempt < LOCK_ATTEMPTS => left = true,
                    None => return Err(StoreError::Refused(format!("the replication slot {name} is in use"))),
                    Some(Err(failed)) => return Err(error(failed)),
                }
            }
            if !left {
                break;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        Ok(())
    }

    /// The SQL that removes the capture.
    #[must_use]
    pub fn uninstall_script() -> &'static str {
        script::UNINSTALL
    }
}

fn list(columns: &[String]) -> String {
    if columns.is_empty() { "no columns".into() } else { columns.join(", ") }
}

/// Runs a script in one transaction. Where a lock can't be had soon it lets go, so that writers can go on, and tries again.
async fn locked(client: &Client, script: &str) -> Result<(), Error> {
    for attempt in 1.. {
        let all = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_PATIENCE}'; {script} COMMIT");
        match client.batch_execute(&all).await {
            Err(failed) => {
                client.batch_execute("ROLLBACK").await?;
                if failed.code().is_none_or(|code| code.code() != "55P03") || attempt == LOCK_ATTEMPTS {
                    return Err(failed);
                }
                tokio::time::sleep(Duration::from_millis(250).mul_f64(0.5 + fastrand::f64())).await;
            }
            Ok(()) => break,
        }
    }
    Ok(())
}

/// The tables that can have triggers, each with its wanted columns and those that are captured already.
async fn merged(client: &Client, wanted: &[Wanted], installed: bool) -> Result<Vec<Found>, Error> {
    let mut tables: Vec<Found> = find(client, wanted, installed).await?.into_values().collect();
    tables.retain(|table| matches!(table.kind.as_str(), "r" | "p"));
    for table in &mut tables {
        table.columns = union(wanted, &table.relation, &table.columns, &table.table_columns);
    }
    Ok(tables)
}

/// The columns of a table that are wanted, or captured already.
fn union(wanted: &[Wanted], relation: &str, captured: &[String], there: &[Column]) -> Vec<String> {
    let asked = wanted.iter().filter(|wanted| wanted.relation == relation).flat_map(|wanted| &wanted.columns);
    let columns: BTreeSet<&String> = asked.chain(captured).collect();
    // A column that is gone would only make every statement "anything may have changed".
    columns.into_iter().filter(|name| there.iter().any(|column| column.name == **name)).cloned().collect()
}
