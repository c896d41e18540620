//! How a cache key is spelled for Memcached, which takes 250 bytes without spaces.
//!
//! An ordinary key is spelled as it is, so that what the documentation says can be typed. One with other bytes than
//! visible ASCII is sent in base64, which the server undoes. What is too long for either goes under its SHA-256. Two keys never
//! share a spelling, and if they did, the fingerprint in the entry would tell.

use sha2::{Digest, Sha256};

/// The most that the server takes, in bytes, also of what is in base64.
const LONGEST: usize = 250;

/// Spells keys.
#[derive(Clone, Debug)]
pub(super) struct Spelling {
    prefix: String,
}

/// A key as the server is told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spelled {
    text: String,
    binary: bool,
}

impl Spelled {
    /// The text, and whether it is in base64.
    pub(super) fn on_the_wire(&self) -> (&str, bool) {
        (&self.text, self.binary)
    }
}

impl Spelling {
    /// Keys start with `prefix`.
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The key beside an entry under which those writers stand who hold it.
    pub(super) fn hold_of(&self, key: &str) -> Spelled {
        let own = key.strip_prefix(&self.prefix).unwrap_or(key);
        self.of(&format!("{}cache-aside:hold:{own}", self.prefix))
    }

    pub(super) fn of(&self, key: &str) -> Spelled {
        let plain = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        if plain && key.len() <= LONGEST {
            return Spelled { text: key.to_owned(), binary: false };
        }
        if !plain && !key.is_empty() && key.len().div_ceil(3) * 4 <= LONGEST {
            return Spelled { text: base64(key.as_bytes()), binary: true };
        }
        // No resource is called that: `-` is no letter of theirs.
        let digest: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Spelled { text: format!("{}cache-aside:long:{digest}", self.prefix), binary: false }
    }
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(group.get(at).copied().unwrap_or(0)));
        for at in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * at) & 63) as usize];
            text.push(if at <= group.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::{LONGEST, Spelling, base64};

    #[test]
    fn base64_is_what_everybody_means_by_it() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xFB, 0xFF, 0xBF]), "+/+/");
    }

    #[test]
    fn ordinary_keys_are_spelled_as_they_are() {
        let spelling = Spelling::new("p:");
        assert_eq!(spelling.of("p:fruit:1").on_the_wire(), ("p:fruit:1", false));
        assert_eq!(spelling.of(&"k".repeat(250)).on_the_wire().0.len(), 250);
        assert_eq!(spelling.of("p:fruit:a b").on_the_wire(), ("cDpmcnVpdDphIGI=", true));
        assert_eq!(spelling.hold_of("p:fruit:1").on_the_wire(), ("p:cache-aside:hold:fruit:1", false));
        assert!(spelling.of(&"k".repeat(251)).on_the_wire().0.starts_with("p:cache-aside:long:"));
        assert!(spelling.of(&"é".repeat(200)).on_the_wire().0.starts_with("p:cache-aside:long:"));
    }

    proptest! {
        #[test]
        fn every_key_has_a_spelling_of_its_own(keys in proptest::collection::hash_set(".{0,300}", 0..20)) {
            let spelling = Spelling::new("");
            let mut seen = HashSet::new();
            for key in &keys {
                let spelled = spelling.of(key);
                let (text, binary) = spelled.on_the_wire();
                prop_assert!(!text.is_empty() && text.len() <= LONGEST);
                prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
                prop_assert!(seen.insert((text.to_owned(), binary)));
            }
        }
    }
}
