//! Statements as resources: their results are rows without a key, found by the statement and its parameters.

#[cfg(feature = "store")]
use std::{fmt::Write as _, sync::Arc};

#[cfg(feature = "store")]
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use super::resource::Statements;
use super::{Policy, Resource};
#[cfg(feature = "store")]
use super::{Target, What};
use crate::config::{self, Defaults};

/// What a statement is given for `$1`, `$2`…
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Param {
    /// NULL.
    Null,
    /// A value, as text that the database reads as one of the parameter's type.
    Text(String),
    /// An array.
    List(Vec<Param>),
}

/// A declared statement's parameters; ad-hoc ones have none with names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(pub Vec<config::Parameter>);

impl Resource {
    /// The results of a declared statement.
    #[must_use]
    pub fn declared_query(name: &str, declared: &config::Query, defaults: &Defaults, key_prefix: &str) -> Self {
        let policy = Policy::new(&declared.over(defaults));
        Self::query(&format!("query:{name}"), &declared.sql, declared.params.clone(), policy, key_prefix)
    }

    /// The results of a statement that somebody made up. Only its TTL bounds how old they can be.
    #[must_use]
    pub fn ad_hoc_query(sql: &str, policy: Policy, key_prefix: &str) -> Self {
        Self::query("query", sql, Vec::new(), policy, key_prefix)
    }

    fn query(name: &str, sql: &str, parameters: Vec<config::Parameter>, policy: Policy, key_prefix: &str) -> Self {
        let sql = normalised(sql);
        // Another's result lives by other rules, though it has the same key.
        let shape = xxh3_64(format!("{name} {} {sql}", policy.ttl.as_millis()).as_bytes());
        Self {
            statements: Statements { row: sql, ..Statements::default() },
            parameters: Some(Parameters(parameters)),
            ..Self::bare(name, policy, key_prefix, shape)
        }
    }

    /// The result for these parameters.
    #[cfg(feature = "store")]
    #[must_use]
    pub fn result_of(self: &Arc<Self>, params: Vec<Param>) -> Target {
        let mut hasher = Sha256::new();
        let sql = &self.statements.row;
        hasher.update(sql.len().to_be_bytes());
        hasher.update(sql);
        for param in &params {
            hash(&mut hasher, param);
        }
        let mut entry = format!("{}query:", self.key_prefix);
        for byte in hasher.finalize() {
            // Writing to a String can't fail.
            let _ = write!(entry, "{byte:02x}");
        }
        Target::new(Arc::clone(self), entry, What::Result(params))
    }
}

/// So that no two lists of parameters give the same bytes.
#[cfg(feature = "store")]
fn hash(hasher: &mut Sha256, param: &Param) {
    match param {
        Param::Null => hasher.update(b"n"),
        Param::Text(text) => {
            hasher.update(b"t");
            hasher.update(text.len().to_be_bytes());
            hasher.update(text);
        }
        Param::List(all) => {
            hasher.update(b"l");
            hasher.update(all.len().to_be_bytes());
            for param in all {
                hash(hasher, param);
            }
        }
    }
}

/// The statement without what only people see: spaces around it, runs of them in it, a semicolon at its end. Where quotes
/// or comments make it hard to say what is a space, it stays as it is.
fn normalised(sql: &str) -> String {
    let sql = sql.trim_matches(|letter: char| letter.is_whitespace() || letter == ';');
    if ["--", "/*", "\\", "$$"].iter().any(|mark| sql.contains(mark)) || dollar_quoted(sql) {
        return sql.to_owned();
    }
    let mut out = String::with_capacity(sql.len());
    let mut quote = None;
    for letter in sql.chars() {
        match quote {
            Some(open) if letter == open => quote = None,
            None if matches!(letter, '\'' | '"' | '`') => quote = Some(letter),
            None if letter.is_whitespace() => {
                if !out.ends_with(' ') {
                    out.push(' ');
                }
                continue;
            }
            Some(_) | None => {}
        }
        out.push(letter);
    }
    out
}

/// `$tag$` opens a text; `$1` does not.
fn dollar_quoted(sql: &str) -> bool {
    sql.split('$').skip(1).any(|part| part.starts_with(|first: char| first.is_alphabetic() || first == '_'))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Param, Policy, Resource, normalised};
    use crate::config::Defaults;

    #[test]
    fn what_people_format_differently_is_the_same_statement() {
        let expected = "SELECT 'a  b', \"c  d\" FROM t WHERE x = $1";
        for sql in [
            expected,
            "\n  SELECT 'a  b',\t\"c  d\"\n FROM t  WHERE x = $1 ;\n",
            "SELECT 'a  b', \"c  d\" FROM t WHERE x = $1;;",
        ] {
            assert_eq!(normalised(sql), expected);
        }
        for sql in ["SELECT 1 -- a  b", "SELECT /* a */  1", "SELECT $a$ x  y $a$", "SELECT E'a\\'  b'"] {
            assert_eq!(normalised(sql), sql);
        }
    }

    #[cfg(feature = "store")]
    #[test]
    fn results_are_told_apart_by_statement_and_parameters() {
        let key = |sql: &str, params: Vec<Param>| {
            let resource = Arc::new(Resource::ad_hoc_query(sql, Policy::new(&Defaults::default()), "p:"));
            resource.result_of(params).entry().to_owned()
        };
        let text = |text: &str| Param::Text(text.into());
        let keys = [
            key("SELECT 1", vec![]),
            key("SELECT 2", vec![]),
            key("SELECT 1", vec![Param::Null]),
            key("SELECT 1", vec![text("")]),
            key("SELECT 1", vec![text("ab")]),
            key("SELECT 1", vec![text("a"), text("b")]),
            key("SELECT 1", vec![Param::List(vec![text("a"), text("b")])]),
            key("SELECT 1", vec![Param::List(vec![text("a")]), text("b")]),
        ];
        let distinct: std::collections::BTreeSet<&String> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert!(keys.iter().all(|key| key.starts_with("p:query:") && key.len() == "p:query:".len() + 64));
        assert_eq!(key(" SELECT  1;", vec![]), keys[0]);
    }
}
