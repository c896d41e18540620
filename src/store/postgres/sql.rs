//! The statements of a resource. Names are quoted, values are parameters, and nothing of a request is ever in the text.
//!
//! Every value crosses as text and is cast by the database: no type is forgotten, and no digit is lost. A row is
//! `row_to_json` over the shown columns; keys and list values are the same JSON text without its quotes, so that a key
//! which a client saw in a row is the key under which that row is cached.

use std::collections::HashMap;
use std::fmt::Write as _;

use tokio_postgres::{Error, Row};

use super::Text;
use crate::catalog::{Column, Key, Resource, Statements};
use crate::store;

/// Quotes an identifier.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The row as JSON, over the table's alias `t`.
pub(super) fn json(resource: &Resource) -> String {
    // A column of the alias's name would be taken for the row.
    let mut alias = "r".to_owned();
    while resource.shown_columns().any(|column| column.name == alias) {
        alias.push('_');
    }
    let columns: Vec<String> = resource.shown_columns().map(|column| format!("t.{}", quote(&column.name))).collect();
    format!("(SELECT row_to_json({alias}) FROM (SELECT {}) AS {alias})::text", columns.join(", "))
}

/// The text of a column's value as it stands in the row's JSON.
pub(super) fn text(column: &Column) -> String {
    format!("(to_jsonb(t.{}) #>> '{{}}')", quote(&column.name))
}

fn key_texts(resource: &Resource) -> String {
    resource.key_columns().map(text).collect::<Vec<_>>().join(", ")
}

/// The condition that finds a row by its key, in parameters from `first` on.
pub(super) fn by_key(resource: &Resource, first: usize) -> String {
    let one = |(index, column): (usize, &Column)| {
        format!("t.{} = ${}::text::{}", quote(&column.name), first + index, column.cast)
    };
    resource.key_columns().enumerate().map(one).collect::<Vec<_>>().join(" AND ")
}

/// All statements that read a resource.
pub(super) fn statements(resource: &Resource) -> Statements {
    let (json, keys, from) = (json(resource), key_texts(resource), resource.table.relation());
    let row = format!("SELECT {json}, {keys} FROM {from} AS t WHERE {} LIMIT 1", by_key(resource, 1));
    let exact: Vec<&Column> = resource.key_columns().filter(|column| column.exact).collect();
    let rows = if let ([column], [_]) = (exact.as_slice(), resource.key.as_slice()) {
        let name = quote(&column.name);
        format!("SELECT {json}, {keys} FROM {from} AS t WHERE t.{name} = ANY ($1::text[]::{}[])", column.cast)
    } else {
        // Only the database knows which asked text a key of such a type equals, so each brings its place along.
        let arrays: Vec<String> = (1..=resource.key.len()).map(|index| format!("${index}::text[]")).collect();
        let names: Vec<String> = (1..=resource.key.len()).map(|index| format!("k{index}")).collect();
        let mut on = String::new();
        for (column, name) in resource.key_columns().zip(&names) {
            let and = if on.is_empty() { "" } else { " AND " };
            // Writing to a String can't fail.
            let _ = write!(on, "{and}t.{} = asked.{name}::{}", quote(&column.name), column.cast);
        }
        format!(
            "SELECT {json}, {keys}, asked.place FROM unnest({}) WITH ORDINALITY AS asked ({}, place) \
             JOIN {from} AS t ON {on}",
            arrays.join(", "),
            names.join(", ")
        )
    };
    let lists = resource.lists.iter().map(|list| {
        let column = &resource.table.columns[list.column];
        let by = |order: &crate::catalog::Order| {
            let way = if order.descending { " DESC" } else { "" };
            format!("t.{}{way}", quote(&resource.table.columns[order.column].name))
        };
        let order: Vec<String> = list.order.iter().map(by).collect();
        format!(
            "SELECT {json} FROM {from} AS t WHERE t.{} = $1::text::{} ORDER BY {} LIMIT {}",
            quote(&column.name),
            column.cast,
            order.join(", "),
            list.limit + 1
        )
    });
    let lists = lists.collect();
    let (first_keys, next_keys) = pages(resource);
    Statements { row, rows, lists, first_keys, next_keys }
}

/// Pages of keys: `$1` is how many, what comes then is the key to begin after. The columns themselves are compared and put
/// in order, so both by the same collation. What has NULL in its key can't be asked for.
fn pages(resource: &Resource) -> (String, String) {
    let (keys, from) = (key_texts(resource), resource.table.relation());
    let names: Vec<String> = resource.key_columns().map(|column| format!("t.{}", quote(&column.name))).collect();
    let there: Vec<String> = names.iter().map(|name| format!("{name} IS NOT NULL")).collect();
    let value = |(index, column): (usize, &Column)| format!("${}::text::{}", index + 2, column.cast);
    let values: Vec<String> = resource.key_columns().enumerate().map(value).collect();
    let (names, there, values) = (names.join(", "), there.join(" AND "), values.join(", "));
    let select = format!("SELECT {keys} FROM {from} AS t WHERE {there}");
    let end = format!("ORDER BY {names} LIMIT $1::int8");
    (format!("{select} {end}"), format!("{select} AND ({names}) > ({values}) {end}"))
}

/// Reads the keys of a page.
pub(super) fn keys(resource: &Resource, found: &[Row]) -> Result<Vec<Key>, Error> {
    let text = |row: &Row, index| Ok(row.try_get::<_, Option<String>>(index)?.unwrap_or_default());
    let key =
        |row| Ok(Key::from_database((0..resource.key.len()).map(|index| text(row, index)).collect::<Result<_, _>>()?));
    found.iter().map(key).collect()
}

/// Reads a row that was asked for as `key`.
pub(super) fn row(row: &Row, key: &Key) -> Result<store::Row, Error> {
    let mut spelled_as_asked = true;
    for (index, part) in key.parts().iter().enumerate() {
        let spelled: Option<&str> = row.try_get(1 + index)?;
        spelled_as_asked &= spelled == Some(part.as_str());
    }
    Ok(store::Row { json: row.try_get::<_, Text>(0)?.0, spelled_as_asked })
}

/// Puts the rows of a batch into the order in which their keys were asked for.
pub(super) fn in_order(resource: &Resource, keys: &[&Key], found: &[Row]) -> Result<Vec<Option<store::Row>>, Error> {
    let mut rows = vec![None; keys.len()];
    let place = 1 + resource.key.len();
    if found.first().is_some_and(|row| row.len() > place) {
        for one in found {
            let place: i64 = one.try_get(place)?;
            // Places count from one, in the array that was sent.
            if let Some(index) = usize::try_from(place - 1).ok().filter(|index| *index < keys.len()) {
                rows[index].get_or_insert(row(one, keys[index])?);
            }
        }
        return Ok(rows);
    }
    let mut asked: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, key) in keys.iter().enumerate() {
        asked.entry(key.parts()[0].as_str()).or_default().push(index);
    }
    for one in found {
        let text: Option<&str> = one.try_get(1)?;
        for index in text.and_then(|text| asked.get(text)).into_iter().flatten() {
            rows[*index].get_or_insert(row(one, keys[*index])?);
        }
    }
    Ok(rows)
}
