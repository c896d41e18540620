//! Asks the information schema what a table is.

use std::collections::BTreeMap;

use mysql_async::{Row, Value};

use super::form::labels;
use super::{MysqlStore, sql};
use crate::catalog::{Column, Kind, Table, TableName};
use crate::store::StoreError;

const TABLES: &str = "
    SELECT t.TABLE_SCHEMA, t.TABLE_NAME, t.TABLE_TYPE LIKE '%VIEW%' FROM information_schema.TABLES t
    WHERE t.TABLE_SCHEMA = ?";

/// Documents are known by their type, or by the check that MariaDB puts in its place.
const COLUMNS: &str = "
    SELECT c.TABLE_NAME, c.COLUMN_NAME, c.COLUMN_TYPE, c.DATA_TYPE, c.IS_NULLABLE = 'YES', c.EXTRA LIKE '%GENERATED%' AND c.EXTRA NOT LIKE '%DEFAULT_GENERATED%',
           COALESCE(c.COLLATION_NAME, ''), c.EXTRA LIKE '%auto_increment%'
    FROM information_schema.COLUMNS c WHERE c.TABLE_SCHEMA = ?";

const CHECKS: &str = "
    SELECT c.TABLE_NAME, c.CHECK_CLAUSE FROM information_schema.CHECK_CONSTRAINTS c
    WHERE c.CONSTRAINT_SCHEMA = ? AND c.CHECK_CLAUSE LIKE 'json\\_valid(%'";

const UNIQUE: &str = "
    SELECT s.TABLE_NAME, s.INDEX_NAME, s.COLUMN_NAME FROM information_schema.STATISTICS s
    WHERE s.TABLE_SCHEMA = ? AND s.NON_UNIQUE = 0";

/// The table or view of this name: exactly, else in lower case.
pub(super) async fn table(store: &MysqlStore, name: &TableName) -> Result<Option<Table>, StoreError> {
    // A plain parameter: with an expression in its place, MariaDB opens every table of every database.
    let Some(schema) = name.schema.as_deref().or(store.database()) else { return Ok(None) };
    let one = |name: &str| vec![bytes(schema), bytes(name)];
    for wanted in [name.name.clone(), name.name.to_lowercase()] {
        let (rows, _) = store.fetch(&format!("{TABLES} AND t.TABLE_NAME = ?"), one(&wanted)).await?;
        let exact = rows.iter().find(|row| row.get::<String, _>(1).is_some_and(|found| found == wanted));
        if let Some(row) = exact.or(rows.first()) {
            let (schema, found) = (text(row, 0), text(row, 1));
            let described = describe(store, &schema, Some(&found), &[(found.clone(), flag(row, 2))]).await?;
            return Ok(described.into_iter().next());
        }
    }
    Ok(None)
}

/// All tables of the database that the URL names, without what is our own.
pub(super) async fn tables(store: &MysqlStore) -> Result<Vec<Table>, StoreError> {
    let Some(schema) = store.database() else { return Ok(Vec::new()) };
    let all = format!("{TABLES} AND t.TABLE_TYPE = 'BASE TABLE' ORDER BY t.TABLE_NAME");
    let (rows, _) = store.fetch(&all, vec![bytes(schema)]).await?;
    let names: Vec<(String, bool)> = rows.iter().map(|row| (text(row, 1), false)).collect();
    describe(store, schema, None, &names).await
}

async fn describe(
    store: &MysqlStore,
    schema: &str,
    only: Option<&str>,
    names: &[(String, bool)],
) -> Result<Vec<Table>, StoreError> {
    let params = || {
        let parts = std::iter::once(schema).chain(only);
        parts.map(bytes).collect::<Vec<_>>()
    };
    let of = |alias: &str| only.map(|_| format!(" AND {alias}.TABLE_NAME = ?")).unwrap_or_default();
    let mut documents: Vec<(String, String)> = Vec::new();
    match store.fetch(&format!("{CHECKS}{}", of("c")), params()).await {
        Ok((rows, _)) => documents.extend(rows.iter().map(|row| (text(row, 0), text(row, 1)))),
        // MySQL has no such column, and types for documents.
        Err(outage) if outage.is_outage() => return Err(outage),
        Err(_) => {}
    }
    let (rows, _) = store.fetch(&format!("{COLUMNS}{} ORDER BY c.ORDINAL_POSITION", of("c")), params()).await?;
    let mut columns: BTreeMap<String, Vec<Column>> = BTreeMap::new();
    for row in &rows {
        let table = text(row, 0);
        let check = format!("json_valid({})", sql::quote(&text(row, 1)));
        let is_document = documents.iter().any(|(of, clause)| *of == table && *clause == check);
        columns.entry(table).or_default().push(column(row, is_document));
    }
    let (rows, _) =
        store.fetch(&format!("{UNIQUE}{} ORDER BY s.INDEX_NAME, s.SEQ_IN_INDEX", of("s")), params()).await?;
    let mut indexes: BTreeMap<(String, String), Vec<Option<String>>> = BTreeMap::new();
    for row in &rows {
        // An index on an expression has parts without a column.
        indexes.entry((text(row, 0), text(row, 1))).or_default().push(row.get::<Option<String>, _>(2).flatten());
    }
    let described = names.iter().map(|(name, is_view)| {
        let mut table = Table {
            schema: Some(schema.to_owned()),
            name: name.clone(),
            is_view: *is_view,
            columns: columns.remove(name).unwrap_or_default(),
            primary_key: Vec::new(),
            unique: Vec::new(),
        };
        for ((_, index), parts) in indexes.iter().filter(|((of, _), _)| of == name) {
            match parts.iter().cloned().collect::<Option<Vec<_>>>() {
                Some(columns) if index == "PRIMARY" => table.primary_key = columns,
                Some(columns) => table.unique.push(columns),
                None => {}
            }
        }
        table
    });
    Ok(described.collect())
}

fn bytes(text: &str) -> Value {
    Value::Bytes(text.as_bytes().to_vec())
}

fn text(row: &Row, index: usize) -> String {
    row.get::<Option<String>, _>(index).flatten().unwrap_or_default()
}

fn flag(row: &Row, index: usize) -> bool {
    row.get::<Option<i64>, _>(index).flatten().is_some_and(|flag| flag != 0)
}

fn column(row: &Row, is_document: bool) -> Column {
    let (declared, name) = (text(row, 2), text(row, 3).to_lowercase());
    let json = is_document || name == "json";
    let (kind, exact) = kind(&name, &declared, &text(row, 6), json);
    Column {
        name: text(row, 1),
        // MariaDB leaves out what was not given.
        type_name: declared,
        cast: String::new(),
        kind,
        exact,
        json,
        generated: flag(row, 5),
        counted: flag(row, 7),
        nullable: flag(row, 4),
    }
}

/// How keys of a type are spelled, and whether equal ones have one text alone.
fn kind(name: &str, declared: &str, collation: &str, json: bool) -> (Kind, bool) {
    let unsigned = declared.contains("unsigned");
    let integer = |bits: u32| {
        let (min, max) = if unsigned { (0, (1 << bits) - 1) } else { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) };
        (Kind::Integer { min, max }, true)
    };
    match name {
        _ if json => (Kind::Other, false),
        "tinyint" if declared.starts_with("tinyint(1)") && !unsigned => (Kind::Boolean, true),
        "tinyint" => integer(8),
        "smallint" => integer(16),
        "mediumint" => integer(24),
        "int" => integer(32),
        "bigint" => integer(64),
        "year" => (Kind::Integer { min: 0, max: 2155 }, true),
        "decimal" | "float" | "double" => (Kind::Number, false),
        "enum" => (Kind::Label(labels(declared)), true),
        "uuid" => (Kind::Uuid, true),
        "binary" | "varbinary" | "tinyblob" | "blob" | "mediumblob" | "longblob" => (Kind::Bytes, true),
        "char" | "varchar" | "tinytext" | "text" | "mediumtext" | "longtext" => {
            // Those of char(n) come without the spaces at their end.
            (Kind::Text { max_bytes: None }, name != "char" && has_one_text(collation))
        }
        "set" | "date" | "datetime" | "timestamp" | "time" | "bit" | "inet4" | "inet6" => (Kind::Other, false),
        // Shapes, vectors.
        _ => (Kind::Bytes, false),
    }
}

/// Whether a collation tells all texts apart: by their bytes, spaces at the end too.
fn has_one_text(collation: &str) -> bool {
    collation == "binary" || collation == "utf8mb4_0900_bin" || collation.ends_with("_nopad_bin")
}

#[cfg(test)]
mod tests {
    use super::kind;
    use crate::catalog::Kind;

    #[test]
    fn whole_numbers_have_the_bounds_of_their_type() {
        for (name, declared, min, max) in [
            ("tinyint", "tinyint(4)", -128, 127),
            ("tinyint", "tinyint(1) unsigned", 0, 255),
            ("mediumint", "mediumint", -8_388_608, 8_388_607),
            ("bigint", "bigint(20) unsigned", 0, i128::from(u64::MAX)),
            ("bigint", "bigint", i128::from(i64::MIN), i128::from(i64::MAX)),
        ] {
            assert_eq!(kind(name, declared, "", false), (Kind::Integer { min, max }, true), "{declared}");
        }
        assert_eq!(kind("tinyint", "tinyint(1)", "", false), (Kind::Boolean, true));
    }

    #[test]
    fn a_text_is_exact_where_its_collation_is() {
        let text = Kind::Text { max_bytes: None };
        for (collation, exact) in [
            ("utf8mb4_general_ci", false),
            ("utf8mb4_bin", false),
            ("utf8mb4_nopad_bin", true),
            ("utf8mb4_0900_bin", true),
        ] {
            assert_eq!(kind("varchar", "varchar(20)", collation, false), (text.clone(), exact), "{collation}");
        }
        assert_eq!(kind("char", "char(20)", "utf8mb4_nopad_bin", false), (text, false));
    }
}
