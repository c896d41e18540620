//! Statements that people wrote: they stand inside ours, so they can only read, and are only one.

use rusqlite::Connection;
use rusqlite::types::Value;

use super::{describe, value};
use crate::catalog::{Column, Param, Resource};
use crate::store::{RESULT_BYTES, RESULT_ROWS, Rows, StoreError};

fn wrapped(sql: &str) -> String {
    format!("SELECT * FROM (\n{sql}\n) LIMIT {}", RESULT_ROWS + 1)
}

/// Tries a declared statement; the words say what is wrong with it.
pub(super) fn check(connection: &Connection, resource: &Resource) -> Result<Option<String>, StoreError> {
    let declared = resource.parameters.as_ref().map_or(0, |parameters| parameters.0.len());
    let count = match connection.prepare_cached(&wrapped(&resource.statements.row)) {
        Ok(statement) => statement.parameter_count(),
        Err(failed) => {
            let words = failed.to_string();
            let error = StoreError::from(failed);
            return if error.is_outage() { Err(error) } else { Ok(Some(words)) };
        }
    };
    Ok((count != declared).then(|| format!("the statement takes {count} parameters, and params: names {declared}")))
}

/// Runs a statement.
pub(super) fn run(connection: &Connection, resource: &Resource, params: &[Param]) -> Result<Rows, StoreError> {
    let bad = |failed: rusqlite::Error| match StoreError::from(failed) {
        StoreError::Refused(words) | StoreError::Changed(words) => StoreError::BadStatement(words),
        other => other,
    };
    let mut statement = connection.prepare_cached(&wrapped(&resource.statements.row)).map_err(bad)?;
    if !statement.readonly() || statement.parameter_count() != params.len() {
        let count = statement.parameter_count();
        let words = format!("it may only read; it takes {count} parameters, and {} were given", params.len());
        return Err(StoreError::BadStatement(words));
    }
    for (index, param) in params.iter().enumerate() {
        // `$1` is a name here, and names have positions in the order they first stand in.
        let name = format!("${}", index + 1);
        let place = statement.parameter_index(&name).map_err(bad)?.unwrap_or(index + 1);
        statement.raw_bind_parameter(place, bound(param)).map_err(bad)?;
    }
    let columns: Vec<Column> = statement
        .columns()
        .iter()
        .map(|column| describe::of_result(column.name(), column.decl_type().unwrap_or_default()))
        .collect();
    let mut rows = statement.raw_query();
    let mut json = vec![b'['];
    let mut count = 0;
    let mut truncated = false;
    while let Some(row) = rows.next().map_err(bad)? {
        if count == RESULT_ROWS || json.len() > RESULT_BYTES {
            truncated = true;
            break;
        }
        json.extend_from_slice(if count == 0 { b"{" } else { b",{" });
        for (index, column) in columns.iter().enumerate() {
            if index > 0 {
                json.push(b',');
            }
            value::name(&mut json, &column.name);
            value::write(&mut json, row.get_ref(index)?, column);
        }
        json.push(b'}');
        count += 1;
    }
    json.push(b']');
    Ok(Rows { json: json.into(), truncated, origin: 0 })
}

/// Numbers as numbers: nothing here says what a parameter is compared with. An array is JSON, for `json_each`.
fn bound(param: &Param) -> Value {
    match param {
        Param::Null => Value::Null,
        Param::Text(text) => match (text.parse::<i64>(), text.parse::<f64>()) {
            (Ok(number), _) if number.to_string() == *text => Value::Integer(number),
            (_, Ok(number)) if number.to_string() == *text => Value::Real(number),
            _ => Value::Text(text.clone()),
        },
        Param::List(all) => Value::Text(json(all).to_string()),
    }
}

fn json(all: &[Param]) -> serde_json::Value {
    let one = |param: &Param| match param {
        Param::Null => serde_json::Value::Null,
        Param::Text(text) => serde_json::Value::from(text.as_str()),
        Param::List(all) => json(all),
    };
    serde_json::Value::Array(all.iter().map(one).collect())
}
