//! One write: a transaction that locks the row, judges the precondition, writes, and reads back what it wrote.
//!
//! The body crosses as one JSON text and is taken apart by `json_to_record`, so that each value is read by the database as
//! its column's type. Statements of writes differ with the body's columns, so they are never kept prepared.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Transaction};
use serde_json::value::RawValue;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error, Row};

use super::{PostgresStore, SLACK, Text, error, feed, sql, wal};
use crate::catalog::{Capture, Column, Key, Resource};
use crate::store::{
    Body, Change, LastWord, Precondition, StoreError, Waiters, Write, WriteError, Written, merge_patch,
};

/// How long a transaction whose entries are held may wait for its COMMIT.
const HOLD_IDLE: Duration = Duration::from_secs(3);

/// How long the answer to a write may wait for the decoder.
const DECODING: Duration = Duration::from_millis(300);

type Params<'a> = Vec<(&'a (dyn ToSql + Sync), Type)>;

/// A row as it was before the write, locked.
struct Before {
    json: bytes::Bytes,
    /// As the database spells it, which may not be how it was asked for.
    key: Key,
    lists: Vec<(usize, String)>,
    /// The documents in JSON columns that a merge needs, in the order they were asked for.
    documents: Vec<Option<String>>,
}

enum Failure {
    Refused(WriteError),
    Database(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

impl From<WriteError> for Failure {
    fn from(error: WriteError) -> Self {
        Self::Refused(error)
    }
}

pub(super) async fn run(
    store: &PostgresStore,
    resource: &Resource,
    write: Write,
    last: &LastWord,
    waiters: &Waiters,
) -> Result<Written, WriteError> {
    let mut again = 2;
    loop {
        match attempt(store, resource, &write, last, waiters).await {
            // The database undid the transaction because of others; the same words may succeed now.
            Err(Failure::Database(failed)) if again > 0 && is_contention(&failed) => again -= 1,
            Err(Failure::Database(failed)) => return Err(explain(store, resource, &write, failed).await),
            Err(Failure::Refused(refused)) => return Err(refused),
            Ok(written) => return Ok(written),
        }
    }
}

fn is_contention(error: &Error) -> bool {
    error.code().is_some_and(|code| matches!(code.code(), "40001" | "40P01"))
}

async fn attempt(
    store: &PostgresStore,
    resource: &Resource,
    write: &Write,
    last: &LastWord,
    waiters: &Waiters,
) -> Result<Written, Failure> {
    let mut checked = waiters.or(store.checkout()).await.map_err(WriteError::from)?;
    let client = checked.client_mut().map_err(WriteError::from)?;
    if client.is_closed() {
        return Err(WriteError::from(StoreError::Unavailable("the connection was lost".into())).into());
    }
    // What the transaction did, from the moment at which nobody may know whether it did.
    let committing = Mutex::new(None);
    // Each statement has its own limit in the server; one that answers none of them has this one.
    let limit = (store.inner.statement_timeout + SLACK) * 4;
    if let Ok(outcome) = tokio::time::timeout(limit, transact(store, client, resource, write, last, &committing)).await
    {
        outcome
    } else {
        store.abandon(checked);
        let sent = committing.into_inner().unwrap_or_else(PoisonError::into_inner);
        let timed_out = || WriteError::Store(StoreError::TimedOut);
        Err(sent.map_or_else(timed_out, |written| WriteError::Unknown(Box::new(written))).into())
    }
}

async fn transact(
    store: &PostgresStore,
    client: &mut ClientWrapper,
    resource: &Resource,
    write: &Write,
    last: &LastWord,
    committing: &Mutex<Option<Written>>,
) -> Result<Written, Failure> {
    let transaction = client.transaction().await?;
    let mut written = within(&transaction, resource, write).await?;
    // Triggers have told what they did by now; a decoder does so after the commit.
    let mut id = None;
    if resource.capture == Capture::On {
        if store.inner.decodes {
            let rows = transaction.query_typed("SELECT pg_current_xact_id_if_assigned()::text", &[]).await?;
            id = rows.first().map_or(Ok(None), |row| row.try_get::<_, Option<String>>(0))?;
        } else {
            written.changes = changes(&transaction).await?;
        }
    }
    if last.is_wanted() {
        // Should this process stop now, the server ends the transaction before the hold ends.
        let limit = format!("SET LOCAL idle_in_transaction_session_timeout = {}", HOLD_IDLE.as_millis());
        transaction.batch_execute(&limit).await?;
        last.given(&written).await?;
    }
    *committing.lock().unwrap_or_else(PoisonError::into_inner) = Some(written.clone());
    match transaction.commit().await {
        Ok(()) => {
            if let Some(id) = id {
                match decoded(client, &id).await {
                    Ok(Some(changes)) => written.changes = changes,
                    // Committed, and its own row is known: the rest comes with the next round.
                    Ok(None) => written.incomplete = true,
                    Err(failed) => {
                        tracing::debug!(error = %failed, "what a write has changed is not known");
                        written.incomplete = true;
                    }
                }
            }
            Ok(written)
        }
        // A deferred constraint, or a lost transaction: the server said no.
        Err(refused) if refused.as_db_error().is_some_and(|refusal| !refusal.code().code().starts_with("57")) => {
            Err(refused.into())
        }
        Err(_) => Err(WriteError::Unknown(Box::new(written)).into()),
    }
}

/// What a transaction that was just committed has changed, once the decoder has told; `None` if it takes too long.
async fn decoded(client: &ClientWrapper, id: &str) -> Result<Option<Vec<Change>>, Error> {
    let rows = client.query_typed("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
    let position: String = rows.first().map_or(Ok(String::new()), |row| row.try_get(0))?;
    if !wal::passed(client, &position, DECODING).await? {
        return Ok(None);
    }
    let rows = client.query_typed(feed::OF, &[(&id, Type::TEXT)]).await?;
    rows.iter().map(|row| feed::change(row, 0)).collect::<Result<_, _>>().map(Some)
}

/// What the transaction has changed, with all that triggers and cascades did: deferred ones are made to run now.
async fn changes(transaction: &Transaction<'_>) -> Result<Vec<Change>, Error> {
    // Sent together: one round trip.
    let (fired, rows) = tokio::join!(
        biased;
        transaction.batch_execute("SET CONSTRAINTS ALL IMMEDIATE"),
        transaction.query_typed(feed::OWN, &[])
    );
    fired?;
    rows?.iter().map(|row| feed::change(row, 0)).collect()
}

async fn within(transaction: &Transaction<'_>, resource: &Resource, write: &Write) -> Result<Written, Failure> {
    let (key, body, precondition) = match write {
        Write::Create { body } => return create(transaction, resource, body).await,
        Write::Replace { key, body, precondition } | Write::Merge { key, body, precondition } => {
            (key, Some(body), precondition)
        }
        Write::Delete { key, precondition } => (key, None, precondition),
    };
    let merging = matches!(write, Write::Merge { .. });
    let documents: Vec<&Column> = match body {
        Some(body) if merging => resource
            .shown_columns()
            .filter(|column| column.json && body.get(&column.name).is_some_and(|value| value.get().starts_with('{')))
            .collect(),
        _ => Vec::new(),
    };
    let before = lock(transaction, resource, key, &documents).await?.ok_or(WriteError::NotFound)?;
    if precondition.as_ref().is_some_and(|Precondition(holds)| !holds(&before.json)) {
        return Err(WriteError::PreconditionFailed.into());
    }
    let Some(body) = body else {
        let statement = format!("DELETE FROM {} AS t WHERE {}", resource.table.relation(), sql::by_key(resource, 1));
        transaction.execute_typed(&statement, &key_params(key)).await?;
        return Ok(Written { row: None, key: before.key, lists: before.lists, changes: Vec::new(), incomplete: false });
    };
    let mut body = body.clone();
    for (column, document) in documents.iter().zip(&before.documents) {
        let target: Option<Box<RawValue>> =
            document.as_deref().and_then(|document| serde_json::from_str(document).ok());
        let patch = body.get(&column.name).map(ToOwned::to_owned);
        if let Some(patch) = patch {
            let merged = merge_patch(target.as_deref(), &patch).map_err(|error| WriteError::Violation {
                columns: vec![column.name.clone()],
                detail: error.to_string(),
            })?;
            body.set(&column.name, merged);
        }
    }
    let mut written = update(transaction, resource, key, &body, merging).await?.unwrap_or(Written {
        row: Some(before.json),
        key: before.key,
        lists: Vec::new(),
        changes: Vec::new(),
        incomplete: false,
    });
    for list in before.lists {
        if !written.lists.contains(&list) {
            written.lists.push(list);
        }
    }
    Ok(written)
}

fn key_params(key: &Key) -> Params<'_> {
    key.parts().iter().map(|part| (part as &(dyn ToSql + Sync), Type::TEXT)).collect()
}

async fn lock(
    transaction: &Transaction<'_>,
    resource: &Resource,
    key: &Key,
    documents: &[&Column],
) -> Result<Option<Before>, Error> {
    let (keys, lists) = (key_texts(resource), list_texts(resource));
    let documents: String = documents.iter().map(|column| format!(", t.{}::text", sql::quote(&column.name))).collect();
    let statement = format!(
        "SELECT {}{keys}{lists}{documents} FROM {} AS t WHERE {} LIMIT 1 FOR UPDATE OF t",
        sql::json(resource),
        resource.table.relation(),
        sql::by_key(resource, 1)
    );
    let Some(row) = transaction.query_typed(&statement, &key_params(key)).await?.into_iter().next() else {
        return Ok(None);
    };
    let keys = resource.key.len();
    let first = 1 + keys + resource.lists.len();
    Ok(Some(Before {
        json: row.try_get::<_, Text>(0)?.0,
        key: key_of(&row, keys)?,
        lists: lists_of(&row, resource, 1 + keys)?,
        documents: (first..row.len()).map(|index| row.try_get(index)).collect::<Result<_, _>>()?,
    }))
}

fn list_texts(resource: &Resource) -> String {
    resource.lists.iter().map(|list| format!(", {}", sql::text(&resource.table.columns[list.column]))).collect()
}

fn lists_of(row: &Row, resource: &Resource, first: usize) -> Result<Vec<(usize, String)>, Error> {
    let mut lists = Vec::new();
    for index in 0..resource.lists.len() {
        if let Some(value) = row.try_get(first + index)? {
            lists.push((index, value));
        }
    }
    Ok(lists)
}

fn returning(resource: &Resource) -> String {
    format!("RETURNING {}{}{}", sql::json(resource), key_texts(resource), list_texts(resource))
}

fn key_texts(resource: &Resource) -> String {
    resource.key_columns().map(|column| format!(", {}", sql::text(column))).collect()
}

/// The key, which stands right after the row.
fn key_of(row: &Row, parts: usize) -> Result<Key, Error> {
    let texts = (1..=parts).map(|index| row.try_get::<_, Option<String>>(index).map(Option::unwrap_or_default));
    Ok(Key::from_database(texts.collect::<Result<_, _>>()?))
}

fn written(row: &Row, resource: &Resource) -> Result<Written, Error> {
    let keys = resource.key.len();
    Ok(Written {
        row: Some(row.try_get::<_, Text>(0)?.0),
        key: key_of(row, keys)?,
        lists: lists_of(row, resource, 1 + keys)?,
        changes: Vec::new(),
        incomplete: false,
    })
}

/// The body's columns, as a record that the database takes apart; `None` for an empty body.
fn record(resource: &Resource, body: &Body) -> Option<String> {
    let columns: Vec<String> = body
        .iter()
        .filter_map(|(name, _)| resource.table.position(name))
        .map(|position| &resource.table.columns[position])
        .map(|column| format!("{} {}", sql::quote(&column.name), column.type_name))
        .collect();
    (!columns.is_empty()).then(|| format!("json_to_record($1::text::json) AS x({})", columns.join(", ")))
}

async fn create(transaction: &Transaction<'_>, resource: &Resource, body: &Body) -> Result<Written, Failure> {
    let table = resource.table.relation();
    let json = body.to_json();
    let names: Vec<String> = body.iter().map(|(name, _)| sql::quote(name)).collect();
    let rows = if let Some(record) = record(resource, body) {
        let values: Vec<String> = names.iter().map(|name| format!("x.{name}")).collect();
        let statement = format!(
            "INSERT INTO {table} AS t ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {record} {}",
            names.join(", "),
            values.join(", "),
            returning(resource)
        );
        transaction.query_typed(&statement, &[(&json, Type::TEXT)]).await?
    } else {
        let statement = format!("INSERT INTO {table} AS t DEFAULT VALUES {}", returning(resource));
        transaction.query_typed(&statement, &[]).await?
    };
    match rows.first() {
        Some(row) => Ok(written(row, resource)?),
        // A trigger that answers NULL swallows the row.
        None => {
            Err(WriteError::Violation { columns: vec![], detail: "the database did not take the row".into() }.into())
        }
    }
}

/// Sets columns; `None` where there is nothing to set.
async fn update(
    transaction: &Transaction<'_>,
    resource: &Resource,
    key: &Key,
    body: &Body,
    merging: bool,
) -> Result<Option<Written>, Failure> {
    let sets: Vec<String> = resource
        .shown_columns()
        .filter(|column| !column.generated && !resource.is_key(&column.name))
        .filter_map(|column| {
            let name = sql::quote(&column.name);
            match body.get(&column.name) {
                Some(_) => Some(format!("{name} = x.{name}")),
                None if merging => None,
                None => Some(format!("{name} = DEFAULT")),
            }
        })
        .collect();
    if sets.is_empty() {
        return Ok(None);
    }
    let json = body.to_json();
    let mut params: Params<'_> = Vec::new();
    let record = record(resource, body);
    if record.is_some() {
        params.push((&json, Type::TEXT));
    }
    let condition = sql::by_key(resource, 1 + params.len());
    params.extend(key_params(key));
    let statement = format!(
        "UPDATE {} AS t SET {}{} WHERE {condition} {}",
        resource.table.relation(),
        sets.join(", "),
        record.map(|record| format!(" FROM {record}")).unwrap_or_default(),
        returning(resource)
    );
    match transaction.query_typed(&statement, &params).await?.first() {
        Some(row) => Ok(Some(written(row, resource)?)),
        None => Err(WriteError::NotFound.into()),
    }
}

/// Turns the database's refusal into columns and words, without a word of SQL.
async fn explain(store: &PostgresStore, resource: &Resource, write: &Write, failed: Error) -> WriteError {
    let Some(refusal) = failed.as_db_error() else {
        // Before COMMIT was sent: the server undoes what it has.
        return error(failed).into();
    };
    let constraint = refusal.constraint().unwrap_or_default();
    let column: Vec<String> = refusal.column().map(ToOwned::to_owned).into_iter().collect();
    match refusal.code().code() {
        "23505" | "23P01" => WriteError::Conflict {
            columns: constrained(store, resource, constraint).await,
            detail: "another row has this value already".into(),
        },
        "23503" | "23001" if matches!(write, Write::Delete { .. }) => {
            WriteError::Conflict { columns: vec![], detail: "other rows refer to this one".into() }
        }
        "23503" => WriteError::Violation {
            columns: constrained(store, resource, constraint).await,
            detail: "it refers to a row that is not there, or other rows refer to it".into(),
        },
        "23502" if !column.is_empty() => {
            WriteError::Violation { columns: column, detail: "a value is required".into() }
        }
        "23514" => {
            let mut columns = constrained(store, resource, constraint).await;
            if columns.is_empty() {
                columns = culprits(store, resource, write).await;
            }
            WriteError::Violation { columns, detail: format!("the value breaks the check {constraint:?}") }
        }
        "428C9" => WriteError::Violation { columns: column, detail: "the database computes this column".into() },
        code if code.starts_with("22") || code.starts_with("23") || code.starts_with("54") => WriteError::Violation {
            columns: culprits(store, resource, write).await,
            detail: "the value is not one that the column's type allows".into(),
        },
        "42501" => WriteError::Violation {
            columns: vec![],
            detail: "a policy or a missing privilege of the database refused it".into(),
        },
        "P0001" => WriteError::Violation { columns: vec![], detail: "a rule of the database refused it".into() },
        "40001" | "40P01" => StoreError::Unavailable("too much contention".into()).into(),
        _ => error(failed).into(),
    }
}

/// The columns of a constraint or unique index.
async fn constrained(store: &PostgresStore, resource: &Resource, constraint: &str) -> Vec<String> {
    const COLUMNS: &str = "
        SELECT a.attname::text FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = $2::text::regclass AND a.attnum = ANY (COALESCE(
          (SELECT c.conkey FROM pg_catalog.pg_constraint c WHERE c.conname = $1 AND c.conrelid = $2::text::regclass),
          (SELECT i.indkey::int2[] FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
           WHERE x.relname = $1 AND i.indrelid = $2::text::regclass)))
        ORDER BY a.attnum";
    let table = resource.table.relation();
    let params: [(&(dyn ToSql + Sync), Type); 2] = [(&constraint, Type::TEXT), (&table, Type::TEXT)];
    match store.ask(async |client| client.query_typed(COLUMNS, &params).await).await {
        Ok(rows) => rows.iter().filter_map(|row| row.try_get(0).ok()).collect(),
        Err(failed) => {
            tracing::debug!(error = %failed, "the columns of a constraint could not be found");
            Vec::new()
        }
    }
}

/// The columns whose values the database can't read: each is tried by itself.
async fn culprits(store: &PostgresStore, resource: &Resource, write: &Write) -> Vec<String> {
    let (Write::Create { body } | Write::Replace { body, .. } | Write::Merge { body, .. }) = write else {
        return Vec::new();
    };
    let tried = store.ask(async |client| {
        let mut columns = Vec::new();
        for (name, value) in body.iter() {
            let mut one = Body::default();
            one.set(name, value.to_owned());
            let Some(record) = record(resource, &one) else { continue };
            let statement = format!("SELECT 1 FROM {record}");
            let json = one.to_json();
            // Only a "no" to this one value counts; a lost connection says nothing about it.
            let tried = client.query_typed(&statement, &[(&json, Type::TEXT)]).await;
            if tried.is_err_and(|failed| failed.as_db_error().is_some()) {
                columns.push(name.to_owned());
            }
        }
        Ok(columns)
    });
    tried.await.unwrap_or_default()
}
