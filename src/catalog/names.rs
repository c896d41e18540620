//! Names as people write them in a configuration.

use super::Table;
use crate::config::nearest;

/// A table's name from the configuration: `users`, `shop.users`, `"My Schema"."Users"`.
///
/// An unquoted part first means exactly what it says and only then, as in SQL, its lower-case form:
/// whoever created `"Album"` with quotes should not need them again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    /// The schema, where one was written.
    pub schema: Option<String>,
    /// The table.
    pub name: String,
}

impl TableName {
    /// Splits a name at its dot, honouring double quotes (`""` inside quotes is one quote).
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong with the name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = split(text)?;
        match (parts.pop(), parts.pop(), parts.pop()) {
            (Some(name), schema, None) => Ok(Self { schema, name }),
            _ => Err(format!("{text:?} has more than two parts; write table or schema.table")),
        }
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.schema {
            Some(schema) => write!(out, "{schema}.{}", self.name),
            None => out.write_str(&self.name),
        }
    }
}

/// Strips the quotes of one SQL identifier: `"AlbumId"` and `AlbumId` name the same column.
///
/// # Errors
///
/// A sentence that says what is wrong with the name.
pub fn identifier(text: &str) -> Result<String, String> {
    if !text.starts_with('"') {
        return if text.is_empty() { Err("a name is empty".into()) } else { Ok(text.into()) };
    }
    let mut parts = split(text)?;
    match (parts.pop(), parts.pop()) {
        (Some(name), None) => Ok(name),
        _ => Err(format!("{text:?} is more than one name")),
    }
}

fn split(text: &str) -> Result<Vec<String>, String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        // `parts` starts with one element and only grows.
        let Some(part) = parts.last_mut() else { break };
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                part.push('"');
            }
            '"' if quoted || part.is_empty() => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            '\0' => return Err(format!("{text:?} holds a NUL byte")),
            other => part.push(other),
        }
    }
    if quoted {
        return Err(format!("{text:?} lacks its closing quote"));
    }
    if parts.iter().any(String::is_empty) {
        return Err(format!("{text:?} has an empty part"));
    }
    Ok(parts)
}

/// The column called `name` in the configuration: exactly, else in lower case as SQL folds it.
pub(super) fn column(table: &Table, name: &str) -> Result<usize, String> {
    let bare = identifier(name)?;
    let folded = || (!name.starts_with('"')).then(|| table.position(&bare.to_lowercase()));
    if let Some(position) = table.position(&bare).or_else(|| folded().flatten()) {
        return Ok(position);
    }
    let names = table.columns.iter().map(|column| column.name.as_str());
    let hint = match nearest(&bare, names) {
        Some(near) => format!("; did you mean {near:?}?"),
        None => String::new(),
    };
    Err(format!("table {} has no column {bare:?}{hint}", table.name))
}

#[cfg(test)]
mod tests {
    use super::{TableName, identifier};

    #[test]
    fn names_are_split_at_dots_outside_quotes() {
        let parse = |text| TableName::parse(text).map(|name| (name.schema, name.name));
        assert_eq!(parse("users"), Ok((None, "users".into())));
        assert_eq!(parse("shop.users"), Ok((Some("shop".into()), "users".into())));
        assert_eq!(parse(r#""my.schema"."a""b""#), Ok((Some("my.schema".into()), "a\"b".into())));
        assert_eq!(parse("Straße.Tür"), Ok((Some("Straße".into()), "Tür".into())));
        for wrong in ["", "a..b", "a.b.c", "\"a", "a\0b", "."] {
            assert!(parse(wrong).is_err(), "{wrong:?} should be refused");
        }
        assert_eq!(identifier("\"a.b\""), Ok("a.b".into()));
        assert!(identifier("\"a\".\"b\"").is_err());
    }
}
