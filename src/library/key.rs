//! A program's keys as text and back: cache keys are text, and loaders want their own types.
//!
//! Strings stand as they are (`users:01KB584F3Y9AF31621Q7N62Q67`), everything else as its JSON (`lines:[7,2]`). So that no
//! two keys share a text, a string that could be read as JSON (`"123"`, `"true"`) stands in quotes.

use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::Error;

/// The text of a key.
pub(super) fn spell<Q: Serialize + ?Sized>(key: &Q) -> Result<String, Error> {
    let mut json = serde_json::to_string(key).map_err(|error| Error::Key(error.to_string()))?;
    let plain = json.len() > 2 && json.starts_with('"') && !json.contains('\\') && !is_json(&json[1..json.len() - 1]);
    if plain {
        json.pop();
        json.remove(0);
    }
    Ok(json)
}

/// The key of a text.
pub(super) fn read<K: DeserializeOwned>(text: &str) -> Result<K, serde_json::Error> {
    if is_json(text) { serde_json::from_str(text) } else { serde_json::from_value(text.into()) }
}

fn is_json(text: &str) -> bool {
    // Most strings are no JSON from their first letter on.
    let other = |first: u8| first.is_ascii_alphabetic() && !matches!(first, b't' | b'f' | b'n');
    !text.as_bytes().first().copied().is_some_and(other) && serde_json::from_str::<IgnoredAny>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::{read, spell};

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct UserId(String);

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i64),
        Pair(u8, bool),
        Text(String),
    }

    #[test]
    fn keys_read_well() {
        assert_eq!(spell("01KB584F3Y9AF31621Q7N62Q67").ok().as_deref(), Some("01KB584F3Y9AF31621Q7N62Q67"));
        assert_eq!(spell(&UserId("ada".into())).ok().as_deref(), Some("ada"));
        assert_eq!(spell(&42).ok().as_deref(), Some("42"));
        assert_eq!(spell(&(7, 2)).ok().as_deref(), Some("[7,2]"));
        assert_eq!(spell("42").ok().as_deref(), Some("\"42\""));
    }

    #[test]
    fn what_differs_is_spelled_differently() {
        let text = |text: &str| Either::Text(text.into());
        let keys = [
            Either::Number(1),
            text("1"),
            text("\"1\""),
            text(" 1"),
            Either::Pair(1, true),
            text("[1,true]"),
            text("true"),
            text(""),
            text("a\"b"),
            text("a\\\"b"),
            text("null"),
        ];
        let spelled: BTreeSet<String> = keys.iter().map(|key| spell(key).expect("it has a text")).collect();
        assert_eq!(spelled.len(), keys.len());
        for key in keys {
            assert_eq!(read::<Either>(&spell(&key).expect("it has a text")).ok(), Some(key));
        }
    }

    proptest! {
        #[test]
        fn any_string_comes_back(text: String) {
            let key = UserId(text);
            prop_assert_eq!(read::<UserId>(&spell(&key).expect("it has a text")).ok(), Some(key));
        }
    }
}
