//! The statements of a resource. Names are quoted, values are parameters, and nothing of a request is ever in the text.

use std::collections::HashMap;

use mysql_async::{Row, Value};

use super::form::{self, Form};
use super::{bind, value};
use crate::catalog::{Column, Key, Resource, Statements, Table};
use crate::store::{self, StoreError, spelling};

/// Quotes an identifier.
pub(super) fn quote(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

/// A text as SQL has it, whatever the session's mode: for scripts, never for what a request brings.
pub(super) fn literal(text: &str) -> String {
    // A backslash means itself or not, by the mode; hexadecimal digits always mean themselves.
    if text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'\'' | b'\\')) {
        return format!("'{text}'");
    }
    let digits: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    if digits.is_empty() { "''".into() } else { format!("CONVERT(0x{digits} USING utf8mb4)") }
}

/// The table, with its database.
pub(super) fn from(table: &Table) -> String {
    let schema = table.schema.as_deref().map(|schema| format!("{}.", quote(schema))).unwrap_or_default();
    format!("{schema}{}", quote(&table.name))
}

/// Columns that every statement gives: those shown, then the key's, then the lists'.
pub(super) fn given(resource: &Resource) -> impl Iterator<Item = &Column> {
    let lists = resource.lists.iter().map(|list| &resource.table.columns[list.column]);
    resource.shown_columns().chain(resource.key_columns()).chain(lists)
}

pub(super) fn selected(resource: &Resource) -> String {
    given(resource).map(|column| format!("t.{}", quote(&column.name))).collect::<Vec<_>>().join(", ")
}

/// A parameter that is compared with a column.
fn mark(column: &Column) -> String {
    if Form::of(column) == Form::Decimal {
        // A text would be compared as a double.
        let (precision, scale) = form::scale(column);
        return format!("CAST(? AS DECIMAL({precision}, {scale}))");
    }
    "?".into()
}

/// The condition that finds a row by its key.
pub(super) fn by_key(resource: &Resource) -> String {
    let one = |column: &Column| format!("t.{} = {}", quote(&column.name), mark(column));
    resource.key_columns().map(one).collect::<Vec<_>>().join(" AND ")
}

pub(super) fn bound(resource: &Resource, key: &Key) -> Result<Vec<Value>, StoreError> {
    resource.key_columns().zip(key.parts()).map(|(column, part)| bind::compared(column, part)).collect()
}

/// All statements that read a resource; that of many rows is written when their number is known.
pub(super) fn statements(resource: &Resource) -> Statements {
    let (selected, from) = (selected(resource), from(&resource.table));
    let row = format!("SELECT {selected} FROM {from} AS t WHERE {} LIMIT 1", by_key(resource));
    let lists = resource.lists.iter().map(|list| {
        let column = &resource.table.columns[list.column];
        let by = |order: &crate::catalog::Order| {
            let way = if order.descending { " DESC" } else { "" };
            format!("t.{}{way}", quote(&resource.table.columns[order.column].name))
        };
        format!(
            "SELECT {selected} FROM {from} AS t WHERE t.{} = {} ORDER BY {} LIMIT {}",
            quote(&column.name),
            mark(column),
            list.order.iter().map(by).collect::<Vec<_>>().join(", "),
            list.limit + 1
        )
    });
    let rows = format!("SELECT {selected} FROM {from} AS t WHERE ");
    let lists = lists.collect();
    let (first_keys, next_keys) = pages(resource);
    Statements { row, rows, lists, first_keys, next_keys }
}

/// Pages of keys: the last parameter is how many, what comes before is the key to begin after ([`after`]). What has NULL in
/// its key can't be asked for.
fn pages(resource: &Resource) -> (String, String) {
    let columns: Vec<&Column> = resource.key_columns().collect();
    let names: Vec<String> = columns.iter().map(|column| format!("t.{}", quote(&column.name))).collect();
    // Labels are in the order of their declaration, but compared with a text as texts.
    let is_label = |column: &Column| column.type_name.starts_with("enum") || column.type_name.starts_with("set");
    let ordered = |(column, name): (&&Column, &String)| {
        if is_label(column) { format!("CONCAT({name})") } else { name.clone() }
    };
    let ordered: Vec<String> = columns.iter().zip(&names).map(ordered).collect();
    let there: Vec<String> = names.iter().map(|name| format!("{name} IS NOT NULL")).collect();
    // Spelled out: of a comparison of rows, `(a, b) > (?, ?)`, neither server makes a range of an index.
    let beyond = |last: usize| {
        let mut all: Vec<String> =
            (0..last).map(|index| format!("{} = {}", ordered[index], mark(columns[index]))).collect();
        all.push(format!("{} > {}", ordered[last], mark(columns[last])));
        format!("({})", all.join(" AND "))
    };
    let beyond: Vec<String> = (0..columns.len()).map(beyond).collect();
    let (from, names, there) = (from(&resource.table), names.join(", "), there.join(" AND "));
    let select = format!("SELECT {names} FROM {from} AS t WHERE {there}");
    let end = format!("ORDER BY {} LIMIT ?", ordered.join(", "));
    (format!("{select} {end}"), format!("{select} AND ({}) {end}", beyond.join(" OR ")))
}

/// The parameters of the page that begins after a key: its first part, its first two, and so on.
pub(super) fn after(resource: &Resource, key: &Key) -> Result<Vec<Value>, StoreError> {
    let bound = bound(resource, key)?;
    Ok((1..=bound.len()).flat_map(|count| bound[..count].iter().cloned()).collect())
}

/// The key that a row of a page is.
pub(super) fn key(resource: &Resource, row: &Row) -> Key {
    let text = |(index, column): (usize, &Column)| {
        value::text(row.as_ref(index).unwrap_or(&Value::NULL), Form::of(column)).unwrap_or_default()
    };
    Key::from_database(resource.key_columns().enumerate().map(text).collect())
}

/// Rows by so many keys.
pub(super) fn rows(resource: &Resource, count: usize) -> String {
    let all = match resource.key.as_slice() {
        [only] => {
            let column = &resource.table.columns[*only];
            format!("t.{} IN ({})", quote(&column.name), vec![mark(column); count].join(", "))
        }
        _ => vec![format!("({})", by_key(resource)); count].join(" OR "),
    };
    format!("{}{all}", resource.statements.rows)
}

/// Each of so many keys by itself, with its place: only the database knows which of several texts a key equals.
pub(super) fn one_by_one(resource: &Resource, count: usize) -> String {
    let (selected, from, by_key) = (selected(resource), from(&resource.table), by_key(resource));
    let one = |place: usize| format!("(SELECT {selected}, {place} FROM {from} AS t WHERE {by_key} LIMIT 1)");
    (0..count).map(one).collect::<Vec<_>>().join(" UNION ALL ")
}

/// A row as it was read.
pub(super) struct Found {
    pub(super) json: Vec<u8>,
    pub(super) key: Vec<String>,
    pub(super) lists: Vec<(usize, String)>,
}

/// Reads what [`given`] names, from a row.
pub(super) fn found(resource: &Resource, row: &Row) -> Found {
    let mut json = Vec::with_capacity(256);
    let (mut key, mut lists) = (Vec::new(), Vec::new());
    let (shown, keys) = (resource.columns.len(), resource.key.len());
    for (index, column) in given(resource).enumerate() {
        let (value, form) = (row.as_ref(index).unwrap_or(&Value::NULL), Form::of(column));
        if index < shown {
            json.push(if index == 0 { b'{' } else { b',' });
            spelling::string(&mut json, &column.name);
            json.push(b':');
            value::write(&mut json, value, form);
        } else if index < shown + keys {
            key.push(value::text(value, form).unwrap_or_default());
        } else if let Some(text) = value::text(value, form) {
            lists.push((index - shown - keys, text));
        }
    }
    json.push(b'}');
    Found { json, key, lists }
}

impl Found {
    /// The same as the answer to `key`.
    pub(super) fn asked_as(self, key: &Key) -> store::Row {
        store::Row { spelled_as_asked: self.key == key.parts(), json: self.json.into() }
    }
}

/// Puts rows into the order in which their keys were asked for, as far as they are spelled as they were asked for.
pub(super) fn in_order(resource: &Resource, keys: &[&Key], rows: &[Row]) -> Vec<Option<store::Row>> {
    let mut asked: HashMap<&[String], Vec<usize>> = HashMap::new();
    for (index, key) in keys.iter().enumerate() {
        asked.entry(key.parts()).or_default().push(index);
    }
    let mut all = vec![None; keys.len()];
    for row in rows {
        let found = found(resource, row);
        let row = store::Row { json: found.json.into(), spelled_as_asked: true };
        for index in asked.get(found.key.as_slice()).into_iter().flatten() {
            all[*index].get_or_insert_with(|| row.clone());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::{literal, quote};

    #[test]
    fn names_and_texts_can_hold_anything() {
        assert_eq!(quote("a`b"), "`a``b`");
        assert_eq!(literal("plain"), "'plain'");
        assert_eq!(literal("it's \\"), "CONVERT(0x69742773205c USING utf8mb4)");
        assert_eq!(literal(""), "''");
    }
}
