//! One write, in an immediate transaction: SQLite has one writer, and this is it.

use rusqlite::types::Value;
use rusqlite::{Connection, Transaction, TransactionBehavior, ffi, params_from_iter};
use serde_json::value::RawValue;

use super::{Found, by_key, find, quote, read_row, selected, value};
use crate::catalog::{Column, Key, Resource};
use crate::store::{Body, Precondition, StoreError, Write, WriteError, Written, merge_patch};

pub(super) fn run(
    connection: &mut Connection,
    resource: &Resource,
    write: &Write,
    last: impl FnOnce(&Written) -> Result<(), WriteError>,
) -> Result<Written, WriteError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let written = within(&transaction, resource, write)?;
    last(&written)?;
    transaction.commit()?;
    Ok(written)
}

fn within(transaction: &Transaction<'_>, resource: &Resource, write: &Write) -> Result<Written, WriteError> {
    let (key, body, precondition) = match write {
        Write::Create { body } => return create(transaction, resource, body),
        Write::Replace { key, body, precondition } | Write::Merge { key, body, precondition } => {
            (key, Some(body), precondition)
        }
        Write::Delete { key, precondition } => (key, None, precondition),
    };
    let before = find(transaction, resource, key)?.ok_or(WriteError::NotFound)?;
    if precondition.as_ref().is_some_and(|Precondition(holds)| !holds(&before.json)) {
        return Err(WriteError::PreconditionFailed);
    }
    let Some(body) = body else {
        let sql = format!("DELETE FROM {} WHERE {}", quote(&resource.table.name), by_key(resource));
        transaction
            .execute(&sql, params_from_iter(key_values(resource, key)))
            .map_err(|error| refused(error, resource, true))?;
        return Ok(Written {
            row: None,
            key: Key::from_database(before.key),
            lists: before.lists,
            changes: Vec::new(),
            incomplete: false,
        });
    };
    let after = update(transaction, resource, key, body, matches!(write, Write::Merge { .. }))?;
    let mut lists = before.lists;
    for list in after.lists {
        if !lists.contains(&list) {
            lists.push(list);
        }
    }
    Ok(Written {
        row: Some(after.json),
        key: Key::from_database(after.key),
        lists,
        changes: Vec::new(),
        incomplete: false,
    })
}

fn key_values(resource: &Resource, key: &Key) -> Vec<Value> {
    resource.key_columns().zip(key.parts()).map(|(column, part)| value::bind(column, part)).collect()
}

fn parse(column: &Column, raw: &RawValue) -> Result<Value, WriteError> {
    value::parse(column, raw).map_err(|detail| WriteError::Violation { columns: vec![column.name.clone()], detail })
}

fn create(transaction: &Transaction<'_>, resource: &Resource, body: &Body) -> Result<Written, WriteError> {
    let mut names = Vec::new();
    let mut values = Vec::new();
    for (name, raw) in body.iter() {
        let Some(position) = resource.table.position(name) else { continue };
        names.push(quote(name));
        values.push(parse(&resource.table.columns[position], raw)?);
    }
    let (table, selected) = (quote(&resource.table.name), selected(resource));
    let sql = if names.is_empty() {
        format!("INSERT INTO {table} DEFAULT VALUES RETURNING {selected}")
    } else {
        let marks = vec!["?"; names.len()].join(", ");
        format!("INSERT INTO {table} ({}) VALUES ({marks}) RETURNING {selected}", names.join(", "))
    };
    let found = transaction
        .query_row(&sql, params_from_iter(values), |row| read_row(resource, row))
        .map_err(|error| refused(error, resource, false))?;
    Ok(Written {
        row: Some(found.json),
        key: Key::from_database(found.key),
        lists: found.lists,
        changes: Vec::new(),
        incomplete: false,
    })
}

fn update(
    transaction: &Transaction<'_>,
    resource: &Resource,
    key: &Key,
    body: &Body,
    merging: bool,
) -> Result<Found, WriteError> {
    let mut sets = Vec::new();
    let mut values = Vec::new();
    for column in resource.shown_columns().filter(|column| !column.generated && !resource.is_key(&column.name)) {
        let name = quote(&column.name);
        match body.get(&column.name) {
            Some(raw) if merging && column.json && raw.get().starts_with('{') => {
                let merged = merged(transaction, resource, key, column, raw)?;
                sets.push(format!("{name} = ?"));
                values.push(Value::Text(merged.get().to_owned()));
            }
            Some(raw) => {
                sets.push(format!("{name} = ?"));
                values.push(parse(column, raw)?);
            }
            None if merging => {}
            None => sets.push(format!("{name} = ({})", default(transaction, resource, column)?)),
        }
    }
    if sets.is_empty() {
        return find(transaction, resource, key)?.ok_or(WriteError::NotFound);
    }
    values.extend(key_values(resource, key));
    let sql = format!(
        "UPDATE {} SET {} WHERE {} RETURNING {}",
        quote(&resource.table.name),
        sets.join(", "),
        by_key(resource),
        selected(resource)
    );
    transaction
        .query_row(&sql, params_from_iter(values), |row| read_row(resource, row))
        .map_err(|error| refused(error, resource, false))
}

fn merged(
    transaction: &Transaction<'_>,
    resource: &Resource,
    key: &Key,
    column: &Column,
    patch: &RawValue,
) -> Result<Box<RawValue>, WriteError> {
    let sql = format!("SELECT {} FROM {} WHERE {}", quote(&column.name), quote(&resource.table.name), by_key(resource));
    let document: Option<String> =
        transaction.query_row(&sql, params_from_iter(key_values(resource, key)), |row| row.get(0))?;
    let target: Option<Box<RawValue>> = document.and_then(|document| serde_json::from_str(&document).ok());
    merge_patch(target.as_deref(), patch)
        .map_err(|error| WriteError::Violation { columns: vec![column.name.clone()], detail: error.to_string() })
}

/// `UPDATE … SET c = DEFAULT` is no SQL here: the expression is in the schema.
fn default(transaction: &Transaction<'_>, resource: &Resource, column: &Column) -> Result<String, WriteError> {
    let expression: Option<String> = transaction.query_row(
        "SELECT dflt_value FROM pragma_table_xinfo(?1) WHERE name = ?2",
        [&resource.table.name, &column.name],
        |row| row.get(0),
    )?;
    Ok(expression.unwrap_or_else(|| "NULL".into()))
}

impl From<rusqlite::Error> for WriteError {
    fn from(error: rusqlite::Error) -> Self {
        StoreError::from(error).into()
    }
}

/// The columns that a check without a name, whose text is all that SQLite tells, speaks of.
fn mentioned(check: &str, resource: &Resource) -> Vec<String> {
    let words: Vec<&str> = check.split(|letter: char| !letter.is_alphanumeric() && letter != '_').collect();
    let names = resource.shown_columns().map(|column| column.name.clone());
    names.filter(|name| words.contains(&name.as_str())).collect()
}

/// Turns SQLite's refusal into columns and words.
fn refused(error: rusqlite::Error, resource: &Resource, deleting: bool) -> WriteError {
    let rusqlite::Error::SqliteFailure(code, Some(message)) = &error else {
        return StoreError::from(error).into();
    };
    // "UNIQUE constraint failed: users.email, users.name"
    let named = message.split_once(": ").map_or("", |(_, columns)| columns);
    let columns: Vec<String> =
        named.split(", ").filter_map(|column| column.split_once('.').map(|(_, column)| column.to_owned())).collect();
    match code.extended_code {
        ffi::SQLITE_CONSTRAINT_UNIQUE | ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_ROWID => {
            WriteError::Conflict { columns, detail: "another row has this value already".into() }
        }
        ffi::SQLITE_CONSTRAINT_NOTNULL => WriteError::Violation { columns, detail: "a value is required".into() },
        ffi::SQLITE_CONSTRAINT_FOREIGNKEY if deleting => {
            WriteError::Conflict { columns: vec![], detail: "other rows refer to this one".into() }
        }
        ffi::SQLITE_CONSTRAINT_FOREIGNKEY => {
            WriteError::Violation { columns: vec![], detail: "there is no row that it refers to".into() }
        }
        ffi::SQLITE_CONSTRAINT_CHECK => WriteError::Violation {
            columns: mentioned(named, resource),
            detail: format!("the value breaks the check {named:?}"),
        },
        ffi::SQLITE_CONSTRAINT_DATATYPE | ffi::SQLITE_MISMATCH => {
            let column = message.rsplit_once('.').map(|(_, column)| column.to_owned());
            let detail = "the value is not one that the column's type allows".into();
            WriteError::Violation { columns: column.into_iter().collect(), detail }
        }
        ffi::SQLITE_CONSTRAINT_TRIGGER => {
            WriteError::Violation { columns: vec![], detail: "a rule of the database refused it".into() }
        }
        _ => StoreError::from(error).into(),
    }
}
