//! SQLite's values as the JSON that PostgreSQL would write, and back.

use rusqlite::types::{Value, ValueRef};
use serde_json::value::RawValue;

use crate::catalog::{Column, Kind};
use crate::store::spelling::{bytes, double, hexadecimal, string};

/// Appends `"name":`.
pub(super) fn name(out: &mut Vec<u8>, name: &str) {
    string(out, name);
    out.push(b':');
}

/// Appends a value as the column's type wants it shown.
pub(super) fn write(out: &mut Vec<u8>, value: ValueRef<'_>, column: &Column) {
    match value {
        ValueRef::Null => out.extend_from_slice(b"null"),
        ValueRef::Integer(number) if column.kind == Kind::Boolean && matches!(number, 0 | 1) => {
            out.extend_from_slice(if number == 1 { b"true" } else { b"false" });
        }
        ValueRef::Integer(number) => out.extend_from_slice(number.to_string().as_bytes()),
        ValueRef::Real(number) if number.is_finite() => out.extend_from_slice(double(number).as_bytes()),
        ValueRef::Real(number) => string(out, &double(number)),
        ValueRef::Text(text) => {
            let text = String::from_utf8_lossy(text);
            // What is declared JSON is shown as JSON, if it is; anything else would break the row.
            if column.json && serde_json::from_str::<&RawValue>(&text).is_ok() {
                out.extend_from_slice(text.trim().as_bytes());
            } else {
                string(out, &timestamp(&text, column));
            }
        }
        ValueRef::Blob(bytes) => string(out, &hexadecimal(bytes)),
    }
}

/// The text of a key or list value: the JSON without its quotes; `None` for NULL.
pub(super) fn text(value: ValueRef<'_>, column: &Column) -> Option<String> {
    Some(match value {
        ValueRef::Null => return None,
        ValueRef::Integer(number) if column.kind == Kind::Boolean && matches!(number, 0 | 1) => {
            (number == 1).to_string()
        }
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => double(number),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        ValueRef::Blob(bytes) => hexadecimal(bytes),
    })
}

/// The value that a key's text is compared as.
pub(super) fn bind(column: &Column, text: &str) -> Value {
    match &column.kind {
        Kind::Integer { .. } => text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Integer),
        Kind::Boolean => Value::Integer(i64::from(text == "true")),
        Kind::Bytes => bytes(text).map_or_else(|| Value::Text(text.to_owned()), Value::Blob),
        Kind::Number => match (text.parse(), text.parse()) {
            (Ok(number), _) => Value::Integer(number),
            (_, Ok(number)) => Value::Real(number),
            _ => Value::Text(text.to_owned()),
        },
        _ => Value::Text(text.to_owned()),
    }
}

/// The value that a member of a body is stored as, or why it can't be.
pub(super) fn parse(column: &Column, raw: &RawValue) -> Result<Value, String> {
    let json = raw.get();
    let wrong = |expected: &str| Err(format!("expected {expected}"));
    if json == "null" {
        return Ok(Value::Null);
    }
    if column.json {
        return Ok(Value::Text(json.to_owned()));
    }
    let quoted: Option<String> = if json.starts_with('"') { serde_json::from_str(json).ok() } else { None };
    match (&column.kind, quoted) {
        (Kind::Integer { .. }, text) => {
            let digits = text.as_deref().unwrap_or(json);
            digits.parse().map(Value::Integer).or_else(|_| wrong("a whole number of 64 bits"))
        }
        (Kind::Boolean, text) => match text.as_deref().unwrap_or(json) {
            "true" => Ok(Value::Integer(1)),
            "false" => Ok(Value::Integer(0)),
            _ => wrong("true or false"),
        },
        (Kind::Number, text) => {
            let digits = text.as_deref().unwrap_or(json);
            if let Ok(number) = digits.parse() {
                return Ok(Value::Integer(number));
            }
            match digits.parse::<f64>() {
                Ok(number) if number.is_finite() => Ok(Value::Real(number)),
                _ => wrong("a number"),
            }
        }
        (Kind::Bytes, Some(text)) => {
            bytes(&text).map_or_else(|| wrong("\\x and hexadecimal digits"), |bytes| Ok(Value::Blob(bytes)))
        }
        (_, Some(text)) if text.contains('\0') => wrong("text without NUL"),
        (_, Some(text)) => Ok(Value::Text(text)),
        (Kind::Bytes, None) => wrong("\\x and hexadecimal digits"),
        (_, None) => wrong("text"),
    }
}

/// `2024-05-01 10:00:00` in a column of timestamps is ISO 8601 but for its T.
fn timestamp<'a>(text: &'a str, column: &Column) -> std::borrow::Cow<'a, str> {
    let declared = column.type_name.to_ascii_uppercase();
    let bytes = text.as_bytes();
    let is_one = (declared.contains("TIMESTAMP") || declared.contains("DATETIME"))
        && bytes.len() >= 16
        && bytes[10] == b' '
        && bytes[..10]
            .iter()
            .enumerate()
            .all(|(at, byte)| if matches!(at, 4 | 7) { *byte == b'-' } else { byte.is_ascii_digit() });
    if is_one { text.replacen(' ', "T", 1).into() } else { text.into() }
}
