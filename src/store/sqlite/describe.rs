//! Asks SQLite what a table is. Types are what was declared: they lead, they don't bind.

use rusqlite::{Connection, OptionalExtension};

use crate::catalog::{Column, Kind, Table, TableName};
use crate::store::StoreError;

/// The table or view of this name; exact names first.
pub(super) fn table(connection: &Connection, name: &TableName) -> Result<Option<Table>, StoreError> {
    let found = connection
        .query_row(
            "SELECT name, type FROM sqlite_schema
             WHERE type IN ('table', 'view') AND name = ?1 COLLATE NOCASE ORDER BY name <> ?1 LIMIT 1",
            [&name.name],
            |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)? == "view")),
        )
        .optional()?;
    Ok(found.map(|(name, is_view)| describe(connection, name, is_view)).transpose()?)
}

/// All tables.
pub(super) fn tables(connection: &Connection) -> Result<Vec<Table>, StoreError> {
    let mut statement = connection.prepare(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
    )?;
    let names: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    Ok(names.into_iter().map(|name| describe(connection, name, false)).collect::<Result<_, _>>()?)
}

fn describe(connection: &Connection, name: String, is_view: bool) -> rusqlite::Result<Table> {
    let mut columns = Vec::new();
    let mut key = Vec::new();
    let mut statement = connection
        .prepare("SELECT name, type, \"notnull\", pk, hidden FROM pragma_table_xinfo(?1) WHERE hidden <> 1")?;
    let mut rows = statement.query([&name])?;
    while let Some(row) = rows.next()? {
        let (column, declared): (String, String) = (row.get(0)?, row.get(1)?);
        let (not_null, position, hidden): (bool, i64, i64) = (row.get(2)?, row.get(3)?, row.get(4)?);
        if position > 0 {
            key.push((position, column.clone()));
        }
        let binary = is_view || {
            let (_, collation, ..) = connection.column_metadata(None, name.as_str(), column.as_str())?;
            collation.is_none_or(|collation| collation.to_bytes().eq_ignore_ascii_case(b"BINARY"))
        };
        let (kind, exact) = kind(&declared);
        columns.push(Column {
            exact: exact && (binary || !matches!(kind, Kind::Text { .. })),
            json: declared.to_ascii_uppercase().starts_with("JSON"),
            generated: hidden > 1,
            counted: false,
            nullable: !not_null && position == 0,
            cast: String::new(),
            name: column,
            type_name: declared,
            kind,
        });
    }
    key.sort();
    let mut unique = Vec::new();
    let mut statement =
        connection.prepare("SELECT name FROM pragma_index_list(?1) WHERE \"unique\" = 1 AND partial = 0")?;
    let indexes: Vec<String> = statement.query_map([&name], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for index in indexes {
        let mut statement = connection.prepare("SELECT name FROM pragma_index_info(?1) ORDER BY seqno")?;
        let columns: Vec<Option<String>> =
            statement.query_map([&index], |row| row.get(0))?.collect::<Result<_, _>>()?;
        // An index on an expression has columns without a name.
        if let Some(columns) = columns.into_iter().collect() {
            unique.push(columns);
        }
    }
    let primary_key = key.into_iter().map(|(_, column)| column).collect();
    Ok(Table { schema: None, name, is_view, columns, primary_key, unique })
}

/// A column of a statement's result, of which only the declared type is known, if that.
pub(super) fn of_result(name: &str, declared: &str) -> Column {
    Column {
        exact: false,
        json: declared.to_ascii_uppercase().starts_with("JSON"),
        generated: false,
        counted: false,
        nullable: true,
        cast: String::new(),
        name: name.to_owned(),
        type_name: declared.to_owned(),
        kind: kind(declared).0,
    }
}

/// The rules of column affinity, and the names that people declare in spite of them.
fn kind(declared: &str) -> (Kind, bool) {
    let declared = declared.to_ascii_uppercase();
    let has = |word: &str| declared.contains(word);
    if has("INT") {
        (Kind::Integer { min: i64::MIN.into(), max: i64::MAX.into() }, true)
    } else if has("BOOL") {
        (Kind::Boolean, true)
    } else if has("BLOB") || declared.is_empty() {
        (Kind::Bytes, true)
    } else if has("CHAR") || has("CLOB") || has("TEXT") || has("DATE") || has("TIME") || has("UUID") {
        (Kind::Text { max_bytes: None }, true)
    } else if has("JSON") {
        (Kind::Other, false)
    } else {
        (Kind::Number, false)
    }
}
