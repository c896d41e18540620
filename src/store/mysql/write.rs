//! One write: a transaction that locks the row, judges the precondition, writes, and reads back what it wrote.
//!
//! MySQL gives nothing back from a write, so the row is read again by its key; a key that the database made is its last
//! insert id, or is found among what the triggers told. What the transaction has changed is told by the triggers too:
//! they copy a word that is this transaction's own.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Params, Row, ServerError, Value};
use serde_json::value::RawValue;

use super::form::Form;
use super::pool::Checked;
use super::refusal::{Failure, meaning};
use super::{MysqlStore, feed, sql};
use super::{bind, value};
use crate::catalog::{Capture, Column, Image, Key, Resource};
use crate::store::{
    Body, Change, LastWord, Precondition, StoreError, Waiters, Write, WriteError, Written, merge_patch,
};

/// How long a transaction whose entries are held may wait for its COMMIT.
const HOLD_IDLE: Duration = Duration::from_secs(3);

/// Ends what is under way, whatever came of it, and its own limits with it.
const END: &str = "ROLLBACK; SET SESSION wait_timeout = DEFAULT, @cache_aside_tx = NULL";

/// The session's own settings come back once the commit is answered.
const COMMIT: &str = "COMMIT; SET SESSION wait_timeout = DEFAULT, @cache_aside_tx = NULL";

enum Refused {
    /// By us, or in words already.
    Write(WriteError),
    Database(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

impl From<WriteError> for Refused {
    fn from(error: WriteError) -> Self {
        Self::Write(error)
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        Self::Write(error.into())
    }
}

/// What became of one attempt.
enum Outcome {
    Written(Written),
    Refused(WriteError),
    Server(ServerError),
    /// The connection had died before anything was asked of it.
    Dead,
}

pub(super) async fn run(
    store: &MysqlStore,
    resource: &Resource,
    write: Write,
    last: &LastWord,
    waiters: &Waiters,
) -> Result<Written, WriteError> {
    let (mut again, mut found_dead) = (2, false);
    loop {
        match attempt(store, resource, &write, last, waiters, found_dead).await? {
            Outcome::Written(written) => return Ok(written),
            Outcome::Refused(refused) => return Err(refused),
            // The database undid the transaction because of others, or was never asked; the same words may succeed now.
            Outcome::Server(refusal) if again > 0 && refusal.code == 1213 => again -= 1,
            Outcome::Dead if !found_dead => found_dead = true,
            Outcome::Dead => return Err(StoreError::Unavailable("the connection was lost".into()).into()),
            Outcome::Server(refusal) => return Err(explain(store, resource, &write, &refusal).await),
        }
    }
}

async fn attempt(
    store: &MysqlStore,
    resource: &Resource,
    write: &Write,
    last: &LastWord,
    waiters: &Waiters,
    found_dead: bool,
) -> Result<Outcome, WriteError> {
    let mut checked = waiters.or(store.checkout(found_dead)).await?;
    let mut token = [0_u8; 16];
    getrandom::fill(&mut token).map_err(|error| StoreError::Unavailable(error.to_string()))?;
    let started = Started::now(store, resource, &token);
    let began = tokio::time::timeout(store.limit(), started.begin(checked.begin()?)).await;
    let before = match checked.end(began) {
        Ok(before) => before,
        Err(failed) if failed.was_lost() => return Ok(Outcome::Dead),
        Err(Failure::Server(refusal)) => {
            checked.forget();
            return Err(meaning(&refusal).into());
        }
        Err(failed) => return Err(StoreError::from(failed).into()),
    };
    // What the transaction did, from the moment at which nobody may know whether it did.
    let committing = Mutex::new(None);
    // Each statement has its own limit in the server; one that answers none of them has this one.
    let limit = store.limit() * 4;
    let working = work(checked.begin()?, resource, write, last, &started, before, &committing);
    let worked = tokio::time::timeout(limit, working).await;
    let sent = committing.into_inner().unwrap_or_else(PoisonError::into_inner);
    let unknown = |written: Written| WriteError::Unknown(Box::new(written));
    Ok(match (worked, sent) {
        (Ok(Ok(written)), _) => {
            done(&mut checked);
            Outcome::Written(written)
        }
        // Whatever the server says to a COMMIT, it may have done it; but not after a deadlock among nodes.
        (Ok(Err(Refused::Database(Error::Server(refusal)))), Some(_)) if refusal.code == 1213 => {
            rolled_back(store, &mut checked).await?;
            Outcome::Server(refusal)
        }
        (Ok(Err(Refused::Database(_))) | Err(_), Some(written)) => return Err(unknown(written)),
        (Ok(Err(Refused::Database(Error::Server(refusal)))), None) => {
            rolled_back(store, &mut checked).await?;
            Outcome::Server(refusal)
        }
        // Before COMMIT was sent: the server undoes what it has.
        (Ok(Err(Refused::Database(lost))), None) => return Err(StoreError::from(Failure::from(lost)).into()),
        (Ok(Err(Refused::Write(refused))), _) => {
            rolled_back(store, &mut checked).await?;
            Outcome::Refused(refused)
        }
        (Err(_), None) => return Err(StoreError::TimedOut.into()),
    })
}

/// Everything was answered.
fn done(checked: &mut Checked<'_>) {
    // An outcome that is known leaves nothing under way.
    let _ = checked.end(Ok(Ok(())));
}

async fn rolled_back(store: &MysqlStore, checked: &mut Checked<'_>) -> Result<(), WriteError> {
    let ended = tokio::time::timeout(store.limit(), checked.begin()?.query_drop(END)).await;
    if let Err(failed) = checked.end(ended) {
        tracing::debug!(?failed, "a transaction could not be rolled back; its connection is given up");
        checked.forget();
    }
    Ok(())
}

/// What a transaction begins with.
struct Started {
    script: String,
    token: String,
}

impl Started {
    fn now(store: &MysqlStore, resource: &Resource, token: &[u8]) -> Self {
        let token: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
        // A transaction whose client stalls must not hold its locks for ever.
        let idle = store.inner.statement_timeout.as_secs() + 5;
        let before = if resource.capture == Capture::On { feed::LAST } else { "SELECT 0" };
        let script = format!(
            "{before}; SET SESSION wait_timeout = {idle}, @cache_aside_tx = '{token}'; START TRANSACTION READ WRITE"
        );
        Self { script, token }
    }

    /// Answers the last id of the outbox that was given out before.
    async fn begin(&self, conn: &mut Conn) -> Result<u64, Error> {
        Ok(conn.query_first::<Option<u64>, _>(&self.script).await?.flatten().unwrap_or(0))
    }
}

async fn work(
    conn: &mut Conn,
    resource: &Resource,
    write: &Write,
    last: &LastWord,
    started: &Started,
    before: u64,
    committing: &Mutex<Option<Written>>,
) -> Result<Written, Refused> {
    let told = Told { before, token: started.token.as_bytes(), wanted: resource.capture == Capture::On };
    let mut written = within(conn, resource, write, &told).await?;
    written.changes = told.changes(conn).await?;
    if last.is_wanted() {
        // Should this process stop now, the server ends the transaction before the hold ends.
        conn.query_drop(format!("SET SESSION wait_timeout = {}", HOLD_IDLE.as_secs())).await?;
        last.given(&written).await?;
    }
    *committing.lock().unwrap_or_else(PoisonError::into_inner) = Some(written.clone());
    conn.query_drop(COMMIT).await?;
    Ok(written)
}

/// Where the triggers have told what this transaction does.
struct Told<'a> {
    before: u64,
    token: &'a [u8],
    wanted: bool,
}

impl Told<'_> {
    async fn changes(&self, conn: &mut Conn) -> Result<Vec<Change>, Error> {
        if !self.wanted {
            return Ok(Vec::new());
        }
        let rows: Vec<Row> = conn.exec(feed::OWN, (self.before, self.token)).await?;
        Ok(rows.iter().map(|row| feed::change(row, 0)).collect())
    }
}

async fn within(conn: &mut Conn, resource: &Resource, write: &Write, told: &Told<'_>) -> Result<Written, Refused> {
    let (key, body, precondition) = match write {
        Write::Create { body } => return create(conn, resource, body, told).await,
        Write::Replace { key, body, precondition } | Write::Merge { key, body, precondition } => {
            (key, Some(body), precondition)
        }
        Write::Delete { key, precondition } => (key, None, precondition),
    };
    let merging = matches!(write, Write::Merge { .. });
    let key_values = sql::bound(resource, key)?;
    let (selected, from, by_key) = (sql::selected(resource), sql::from(&resource.table), sql::by_key(resource));
    let locking = format!("SELECT {selected} FROM {from} AS t WHERE {by_key} LIMIT 1 FOR UPDATE");
    let before: Option<Row> = conn.exec_first(&locking, Params::Positional(key_values.clone())).await?;
    let before = before.ok_or(WriteError::NotFound)?;
    let documents = before.clone();
    let before = sql::found(resource, &before);
    if precondition.as_ref().is_some_and(|Precondition(holds)| !holds(&before.json)) {
        return Err(WriteError::PreconditionFailed.into());
    }
    let Some(body) = body else {
        // With the table named twice, the alias is understood by both servers.
        conn.exec_drop(format!("DELETE t FROM {from} AS t WHERE {by_key}"), Params::Positional(key_values)).await?;
        return Ok(written(None, before.key, before.lists));
    };
    let (mut sets, mut values) = (Vec::new(), Vec::new());
    for (index, column) in resource.shown_columns().enumerate() {
        if column.generated || resource.is_key(&column.name) {
            continue;
        }
        let name = sql::quote(&column.name);
        match body.get(&column.name) {
            Some(patch) if merging && column.json && patch.get().starts_with('{') => {
                let document = value::text(documents.as_ref(index).unwrap_or(&Value::NULL), Form::Json);
                let target: Option<Box<RawValue>> = document.and_then(|document| serde_json::from_str(&document).ok());
                let merged =
                    merge_patch(target.as_deref(), patch).map_err(|error| violation(column, error.to_string()))?;
                sets.push(format!("t.{name} = ?"));
                values.push(Value::Bytes(merged.get().as_bytes().to_vec()));
            }
            Some(raw) => {
                sets.push(format!("t.{name} = ?"));
                values.push(parse(column, raw)?);
            }
            None if merging => {}
            None => sets.push(format!("t.{name} = DEFAULT")),
        }
    }
    if sets.is_empty() {
        return Ok(written(Some(before.json), before.key, before.lists));
    }
    values.extend(key_values.iter().cloned());
    let statement = format!("UPDATE {from} AS t SET {} WHERE {by_key}", sets.join(", "));
    conn.exec_drop(statement, Params::Positional(values)).await?;
    let after = again(conn, resource, key_values).await?.ok_or(WriteError::NotFound)?;
    let mut written = written(Some(after.json), after.key, after.lists);
    for list in before.lists {
        if !written.lists.contains(&list) {
            written.lists.push(list);
        }
    }
    Ok(written)
}

fn written(row: Option<Vec<u8>>, key: Vec<String>, lists: Vec<(usize, String)>) -> Written {
    let (row, key) = (row.map(Into::into), Key::from_database(key));
    Written { row, key, lists, changes: Vec::new(), incomplete: false }
}

fn violation(column: &Column, detail: String) -> WriteError {
    WriteError::Violation { columns: vec![column.name.clone()], detail }
}

fn parse(column: &Column, raw: &RawValue) -> Result<Value, WriteError> {
    bind::stored(column, raw).map_err(|detail| violation(column, detail))
}

/// The row as it is now.
async fn again(conn: &mut Conn, resource: &Resource, key: Vec<Value>) -> Result<Option<sql::Found>, Error> {
    let row: Option<Row> = conn.exec_first(&resource.statements.row, Params::Positional(key)).await?;
    Ok(row.map(|row| sql::found(resource, &row)))
}

async fn create(conn: &mut Conn, resource: &Resource, body: &Body, told: &Told<'_>) -> Result<Written, Refused> {
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for (name, raw) in body.iter() {
        let Some(position) = resource.table.position(name) else { continue };
        names.push(sql::quote(name));
        values.push(parse(&resource.table.columns[position], raw)?);
    }
    let given: Vec<Option<Value>> = resource
        .key_columns()
        .map(|column| {
            let raw = body.get(&column.name)?;
            parse(column, raw).ok().filter(|value| *value != Value::NULL).map(|value| as_compared(column, value))
        })
        .collect();
    let lacking: Vec<&Column> =
        resource.key_columns().zip(&given).filter(|(_, part)| part.is_none()).map(|(column, _)| column).collect();
    // The last insert id is that of a column that is counted up, which need not be the key's.
    let is_counted = matches!(lacking.as_slice(), [column] if column.counted);
    let untold = || {
        let columns = lacking.iter().map(|column| column.name.clone()).collect();
        let detail = "the key must be given: this database does not tell which one it made".into();
        WriteError::Violation { columns, detail }
    };
    if !lacking.is_empty() && !is_counted && !told.wanted {
        return Err(untold().into());
    }
    let from = sql::from(&resource.table);
    let marks = vec!["?"; names.len()].join(", ");
    let params = if values.is_empty() { Params::Empty } else { Params::Positional(values) };
    let inserted =
        conn.exec_iter(format!("INSERT INTO {from} ({}) VALUES ({marks})", names.join(", ")), params).await?;
    let made = inserted.last_insert_id().filter(|id| *id > 0);
    inserted.drop_result().await?;
    let key: Option<Vec<Value>> = if lacking.is_empty() || (is_counted && made.is_some()) {
        given.into_iter().map(|part| part.or(made.map(Value::UInt))).collect()
    } else {
        told_key(resource, &told.changes(conn).await?)?
    };
    let key = key.ok_or_else(untold)?;
    match again(conn, resource, key).await? {
        Some(found) => Ok(written(Some(found.json), found.key, found.lists)),
        None => {
            Err(WriteError::Violation { columns: vec![], detail: "the database did not take the row".into() }.into())
        }
    }
}

/// What was stored in a column of floats is what is looked for.
fn as_compared(column: &Column, value: Value) -> Value {
    match value {
        #[expect(clippy::cast_possible_truncation, reason = "as the column does")]
        Value::Double(number) if Form::of(column) == Form::Float => Value::Float(number as f32),
        other => other,
    }
}

/// The key of the last row of this table that the triggers told of.
fn told_key(resource: &Resource, changes: &[Change]) -> Result<Option<Vec<Value>>, StoreError> {
    let relation = resource.table.relation();
    let told =
        changes.iter().rev().filter(|change| change.relation == relation).find_map(|change| change.image.as_ref());
    let Some(image) = told else { return Ok(None) };
    let part = |image: &Image, column: &Column| image.get(&column.name).cloned().flatten();
    let parts: Option<Vec<String>> = resource.key_columns().map(|column| part(image, column)).collect();
    parts.map(|parts| sql::bound(resource, &Key::from_database(parts))).transpose()
}

/// Turns the database's refusal into columns and words, without a word of SQL.
async fn explain(store: &MysqlStore, resource: &Resource, write: &Write, refusal: &ServerError) -> WriteError {
    let said = refusal.message.as_str();
    let conflict = |columns, detail: &str| WriteError::Conflict { columns, detail: detail.into() };
    let violation = |columns, detail: &str| WriteError::Violation { columns, detail: detail.into() };
    let column = || shown(resource, named(said));
    match refusal.code {
        1062 | 1586 => {
            let columns = indexed(store, resource, after(said, "for key ")).await;
            conflict(columns, "another row has this value already")
        }
        1451 | 1217 if matches!(write, Write::Delete { .. }) => conflict(vec![], "other rows refer to this one"),
        1451 | 1217 => violation(vec![], "other rows refer to this one"),
        1452 | 1216 => violation(listed(after(said, "FOREIGN KEY ")), "it refers to a row that is not there"),
        1048 | 1364 => violation(column(), "a value is required"),
        // MariaDB's and MySQL's checks.
        4025 | 3819 => {
            let check =
                if refusal.code == 4025 { after(said, "CONSTRAINT ") } else { after(said, "Check constraint ") };
            let check = check.map_or(String::new(), |check| check.rsplit('.').next().unwrap_or(check).replace('`', ""));
            let columns = checked(store, resource, &check).await;
            violation(columns, &format!("the value breaks the check {check:?}"))
        }
        1906 | 3105 => {
            violation(shown(resource, after(said, "generated column ")), "the database computes this column")
        }
        1644 => violation(vec![], "a rule of the database refused it"),
        1142 | 1143 => violation(vec![], "a missing privilege of the database refused it"),
        1213 => StoreError::Unavailable("too much contention".into()).into(),
        1264 | 1265 | 1292 | 1366 | 1406 | 1411 | 1690 | 3140..=3158 => {
            violation(column(), "the value is not one that the column's type allows")
        }
        _ => match meaning(refusal) {
            StoreError::BadValue(_) => violation(column(), "the value is not one that the column's type allows"),
            other => other.into(),
        },
    }
}

/// What stands quoted right after these words, where they come last: before that, the same words may be in a value.
fn after<'a>(said: &'a str, words: &str) -> Option<&'a str> {
    let rest = &said[said.rfind(words)? + words.len()..];
    let quote = rest.chars().next().filter(|quote| matches!(quote, '\'' | '`' | '"' | '('))?;
    let close = if quote == '(' { ')' } else { quote };
    // All of these are one byte long.
    let rest = &rest[1..];
    // A quoted value may hold quotes, but what is asked for here comes last.
    let end = if close == '\'' { rest.rfind(close)? } else { rest.find(close)? };
    Some(&rest[..end])
}

/// The column of "column 'x' at row 1", "column `db`.`t`.`x` at row 1", or "Field 'x' doesn't …".
fn named(said: &str) -> Option<&str> {
    for words in ["for column ", "Column ", "Field ", "column "] {
        let Some(at) = said.rfind(words) else { continue };
        let rest = &said[at + words.len()..];
        let rest = rest.split(" at row ").next().unwrap_or(rest);
        let quote = if rest.starts_with('`') { '`' } else { '\'' };
        let found = rest.rsplit(quote).nth(1).filter(|_| quote == '`').or_else(|| rest.split(quote).nth(1));
        return found.map(|found| found.rsplit('.').next().unwrap_or(found));
    }
    None
}

fn shown(resource: &Resource, name: Option<&str>) -> Vec<String> {
    let known = |name: &&str| resource.table.columns.iter().any(|column| column.name == *name);
    name.filter(known).map(ToOwned::to_owned).into_iter().collect()
}

/// "`a`, `b`"
fn listed(columns: Option<&str>) -> Vec<String> {
    let columns = columns.unwrap_or_default().split(", ").map(|column| column.trim_matches('`').replace("``", "`"));
    columns.filter(|column| !column.is_empty()).collect()
}

/// The columns of an index, whose name stands alone or after the table's.
async fn indexed(store: &MysqlStore, resource: &Resource, name: Option<&str>) -> Vec<String> {
    const COLUMNS: &str = "
        SELECT s.INDEX_NAME, s.COLUMN_NAME FROM information_schema.STATISTICS s
        WHERE s.TABLE_SCHEMA = ? AND s.TABLE_NAME = ? AND s.COLUMN_NAME IS NOT NULL
        ORDER BY s.SEQ_IN_INDEX";
    let Some(name) = name else { return Vec::new() };
    let bare = name.split_once('.').map_or(name, |(_, bare)| bare);
    let rows = looked_up(store, COLUMNS, resource).await;
    let of = |wanted: &str| -> Vec<String> {
        rows.iter().filter(|(index, _)| index == wanted).map(|(_, column)| column.clone()).collect()
    };
    let whole = of(name);
    if whole.is_empty() { of(bare) } else { whole }
}

/// The columns that a check speaks of.
async fn checked(store: &MysqlStore, resource: &Resource, check: &str) -> Vec<String> {
    const MARIADB: &str = "
        SELECT c.CONSTRAINT_NAME, c.CHECK_CLAUSE FROM information_schema.CHECK_CONSTRAINTS c
        WHERE c.CONSTRAINT_SCHEMA = ? AND c.TABLE_NAME = ?";
    const MYSQL: &str = "
        SELECT c.CONSTRAINT_NAME, c.CHECK_CLAUSE FROM information_schema.CHECK_CONSTRAINTS c
        JOIN information_schema.TABLE_CONSTRAINTS t USING (CONSTRAINT_SCHEMA, CONSTRAINT_NAME)
        WHERE c.CONSTRAINT_SCHEMA = ? AND t.TABLE_NAME = ?";
    let mut rows = looked_up(store, MARIADB, resource).await;
    if rows.is_empty() {
        rows = looked_up(store, MYSQL, resource).await;
    }
    let clauses: Vec<&str> = rows.iter().filter(|(name, _)| name == check).map(|(_, clause)| clause.as_str()).collect();
    let mentioned = |column: &&Column| clauses.iter().any(|clause| clause.contains(&sql::quote(&column.name)));
    resource.table.columns.iter().filter(mentioned).map(|column| column.name.clone()).collect()
}

async fn looked_up(store: &MysqlStore, question: &str, resource: &Resource) -> Vec<(String, String)> {
    let schema = resource.table.schema.clone().unwrap_or_default();
    let params = vec![Value::Bytes(schema.into_bytes()), Value::Bytes(resource.table.name.clone().into_bytes())];
    match store.fetch(question, params).await {
        Ok((rows, _)) => rows.iter().filter_map(|row| Some((row.get(0)?, row.get(1)?))).collect(),
        Err(error) => {
            tracing::debug!(%error, "the columns of a constraint could not be found");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{after, listed, named};

    #[test]
    fn columns_are_found_in_what_the_servers_say() {
        for (said, expected) in [
            ("Column 'name' cannot be null", "name"),
            ("Field 'name' doesn't have a default value", "name"),
            ("Out of range value for column 'id' at row 1", "id"),
            ("Data too long for column 'name' at row 1", "name"),
            ("Incorrect integer value: 'for column 'x'' for column `shop`.`author`.`id` at row 1", "id"),
            ("Invalid JSON text: \"x\" at position 1 in value for column 'book.extra'.", "extra"),
        ] {
            assert_eq!(named(said), Some(expected), "{said}");
        }
        assert_eq!(after("Duplicate entry 'a'b' for key 'author.name'", "for key "), Some("author.name"));
        assert_eq!(after("Duplicate entry 'for key é' for key 'PRIMARY'", "for key "), Some("PRIMARY"));
        assert_eq!(after("Duplicate entry 'x' for key é", "for key "), None);
        let fails =
            "Cannot add … (`s`.`book`, CONSTRAINT `c` FOREIGN KEY (`author_id`, `x`) REFERENCES `author` (`id`))";
        assert_eq!(listed(after(fails, "FOREIGN KEY ")), ["author_id", "x"]);
        assert_eq!(after("Check constraint 'book_chk_1' is violated.", "Check constraint "), Some("book_chk_1"));
        assert_eq!(after("CONSTRAINT `book.pages` failed for `s`.`book`", "CONSTRAINT "), Some("book.pages"));
    }
}
