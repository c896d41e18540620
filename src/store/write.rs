//! What a write is, what it touched, and why it was refused.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use indexmap::IndexMap;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Change, StoreError};
use crate::catalog::Key;

/// A row as a client sent it: each value is kept as the text it came in, so that no digit is lost.
#[derive(Clone, Debug, Default)]
pub struct Body(IndexMap<String, Box<RawValue>>);

impl Body {
    /// The members, in the order they came.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &RawValue)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_ref()))
    }

    /// The member of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.get(name).map(AsRef::as_ref)
    }

    /// Sets a member; a new one comes last.
    pub fn set(&mut self, name: &str, value: Box<RawValue>) {
        self.0.insert(name.to_owned(), value);
    }

    /// Removes a member.
    pub fn remove(&mut self, name: &str) {
        self.0.shift_remove(name);
    }

    /// The JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut json = String::from("{");
        for (index, (name, value)) in self.0.iter().enumerate() {
            if index > 0 {
                json.push(',');
            }
            json.push_str(&serde_json::Value::from(name.as_str()).to_string());
            json.push(':');
            json.push_str(value.get());
        }
        json.push('}');
        json
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members { twice: false })
    }
}

struct Members {
    /// Whether a member may stand twice; the last one counts then, as `jsonb` has it.
    twice: bool,
}

impl<'de> Visitor<'de> for Members {
    type Value = Body;

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("a JSON object with the row's columns")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
        let mut body = Body::default();
        while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if !self.twice && body.0.contains_key(&name) {
                return Err(serde::de::Error::custom(format!("the member {name:?} stands twice")));
            }
            body.0.insert(name, value);
        }
        Ok(body)
    }
}

/// Documents may be this deep; deeper ones could exhaust the stack.
const DEEPEST: usize = 128;

/// RFC 7396: what `target` is after `patch`. Values that the patch doesn't touch keep their text.
///
/// # Errors
///
/// Where one of the two is no valid JSON, or the patch is nested more than 128 deep.
pub fn merge_patch(target: Option<&RawValue>, patch: &RawValue) -> serde_json::Result<Box<RawValue>> {
    merge(target, patch, 0)
}

fn merge(target: Option<&RawValue>, patch: &RawValue, depth: usize) -> serde_json::Result<Box<RawValue>> {
    if !patch.get().starts_with('{') {
        return Ok(patch.to_owned());
    }
    if depth == DEEPEST {
        return Err(serde::de::Error::custom("the patch is nested too deep"));
    }
    let mut merged = match target {
        Some(target) if target.get().starts_with('{') => object(target)?,
        _ => Body::default(),
    };
    let patch = object(patch)?;
    // In one pass: removing one by one would take time by the square of a hostile patch.
    merged.0.retain(|name, _| patch.get(name).is_none_or(|value| value.get() != "null"));
    for (name, value) in patch.0 {
        if value.get() != "null" {
            let value = merge(merged.get(&name), &value, depth + 1)?;
            merged.0.insert(name, value);
        }
    }
    RawValue::from_string(merged.to_json())
}

fn object(value: &RawValue) -> serde_json::Result<Body> {
    serde_json::Deserializer::from_str(value.get()).deserialize_map(Members { twice: true })
}

/// Judges the row as it is (its JSON) before a write touches it: `If-Match`.
#[derive(Clone)]
pub struct Precondition(pub Arc<Judge>);

/// Says whether a row, given as its JSON, is the one that is meant.
pub type Judge = dyn Fn(&[u8]) -> bool + Send + Sync;

impl std::fmt::Debug for Precondition {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Precondition")
    }
}

/// One change of one row.
#[derive(Clone, Debug)]
pub enum Write {
    /// A new row.
    Create {
        /// Its columns; others get their defaults.
        body: Body,
    },
    /// Sets every shown column; those not in the body get their defaults.
    Replace {
        /// The row.
        key: Key,
        /// Its columns.
        body: Body,
        /// What must hold of it.
        precondition: Option<Precondition>,
    },
    /// Sets the columns in the body, and merges into JSON columns (RFC 7396).
    Merge {
        /// The row.
        key: Key,
        /// The changed columns.
        body: Body,
        /// What must hold of it.
        precondition: Option<Precondition>,
    },
    /// Removes the row.
    Delete {
        /// The row.
        key: Key,
        /// What must hold of it.
        precondition: Option<Precondition>,
    },
}

/// What a committed write did.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The row as the database has it now; `None` after a delete.
    pub row: Option<Bytes>,
    /// The row's key, as the database spells it.
    pub key: Key,
    /// Declared lists (by position) and the values under which the row was or is in them.
    pub lists: Vec<(usize, String)>,
    /// Everything that its transaction changed, where changes are captured: cascades and what triggers did, too.
    pub changes: Vec<Change>,
    /// There may be more changes, which are not known yet.
    pub incomplete: bool,
}

/// Asked before a write is committed, with its row locks taken. Without an answer, nothing is committed.
#[derive(Clone, Default)]
pub struct LastWord(Option<Arc<Ask>>);

type Ask = dyn Fn(Written) -> BoxFuture<'static, bool> + Send + Sync;

impl LastWord {
    /// Whoever is to be asked; the answer says whether the write may be committed.
    pub fn new(ask: impl Fn(Written) -> BoxFuture<'static, bool> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(ask)))
    }

    /// Whether there is anybody to be asked.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Asks.
    ///
    /// # Errors
    ///
    /// [`WriteError::Untold`] where the answer is no.
    pub async fn given(&self, written: &Written) -> Result<(), WriteError> {
        let Some(ask) = &self.0 else { return Ok(()) };
        if ask(written.clone()).await {
            return Ok(());
        }
        Err(WriteError::Untold)
    }
}

impl std::fmt::Debug for LastWord {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("LastWord")
    }
}

/// Why nothing, or nobody knows what, was written.
#[derive(Clone, Debug, PartialEq)]
pub enum WriteError {
    /// There is no such row.
    NotFound,
    /// The row is not what the client says it is.
    PreconditionFailed,
    /// Another row is in the way: a duplicate key, or rows that refer to this one.
    Conflict {
        /// The columns concerned, where the database tells.
        columns: Vec<String>,
        /// What is wrong, without SQL.
        detail: String,
    },
    /// A value breaks a constraint or is not of its column's type.
    Violation {
        /// The columns concerned, where the database tells.
        columns: Vec<String>,
        /// What is wrong, without SQL.
        detail: String,
    },
    /// The connection was lost while committing: the write may have happened or not. This is what it touched if it did.
    Unknown(Box<Written>),
    /// The cache can't be told before the commit, which `consistency: hold` asks for: nothing was written.
    Untold,
    /// Nothing was written.
    Store(StoreError),
}

impl From<StoreError> for WriteError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::{Body, merge_patch};

    fn raw(text: &str) -> Box<RawValue> {
        serde_json::from_str(text).expect("test input is JSON")
    }

    #[test]
    fn the_examples_of_rfc_7396_hold() {
        for (target, patch, expected) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, "{}"),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"a":"foo"}"#, "null", "null"),
            (r#"{"a":"foo"}"#, r#""bar""#, r#""bar""#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            ("[1,2]", r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            ("{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            let merged = merge_patch(Some(&raw(target)), &raw(patch)).expect("both are JSON");
            assert_eq!(merged.get(), expected, "{target} patched by {patch}");
        }
    }

    #[test]
    fn a_merge_loses_no_digit() {
        let target = r#"{"n":12345678901234567890.123456789012345678901,"m":1e400}"#;
        let merged = merge_patch(Some(&raw(target)), &raw(r#"{"x":0.10}"#)).expect("both are JSON");
        assert_eq!(merged.get(), r#"{"n":12345678901234567890.123456789012345678901,"m":1e400,"x":0.10}"#);
    }

    #[test]
    fn a_patch_of_any_depth_is_answered() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
        assert!(merge_patch(None, &raw(&deep)).is_err());
    }

    #[test]
    fn a_member_that_stands_twice_is_refused() {
        assert!(serde_json::from_str::<Body>(r#"{"a":1,"a":2}"#).is_err());
        assert!(serde_json::from_str::<Body>("[1]").is_err());
    }
}
