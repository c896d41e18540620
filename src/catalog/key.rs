//! Keys are parsed at the door: by the column's type, into the one spelling under which they are cached.

use std::fmt::Write as _;

use super::{Column, Kind};

/// Why a text can't be a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// The text is not of the column's type; the sentence says what one looks like.
    Malformed(String),
    /// Well formed, but no row can have it (a number past its type's range): simply not found.
    CannotExist,
}

/// A row's key: one canonical text for each key column.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    parts: Vec<String>,
}

impl Key {
    /// Checks and canonicalises one text per key column.
    ///
    /// # Errors
    ///
    /// [`KeyError`], which names the column.
    pub fn parse<'a>(columns: impl ExactSizeIterator<Item = &'a Column>, texts: Vec<String>) -> Result<Self, KeyError> {
        if columns.len() != texts.len() {
            let expected = columns.len();
            return Err(KeyError::Malformed(format!(
                "the key has {expected} part{}, {} came; parts are separated by commas, and a comma inside a part \
                 is written %2C",
                if expected == 1 { "" } else { "s" },
                texts.len(),
            )));
        }
        let parts = columns.zip(texts).map(|(column, text)| canonical(column, text)).collect::<Result<_, _>>()?;
        Ok(Self { parts })
    }

    /// A key from texts that the database itself gave.
    #[must_use]
    pub fn from_database(parts: Vec<String>) -> Self {
        Self { parts }
    }

    /// The texts of a key of so many columns, out of the spelling that it has in cache keys: a single one stands as it is,
    /// several are separated by commas, with a comma inside a part as `%2C`.
    ///
    /// # Errors
    ///
    /// [`KeyError`] where a part is no text.
    pub(super) fn texts(spelled: &str, columns: usize) -> Result<Vec<String>, KeyError> {
        if columns == 1 {
            return Ok(vec![spelled.to_owned()]);
        }
        spelled.split(',').map(unescaped).collect()
    }

    /// The canonical texts, in the order of the key's columns.
    #[must_use]
    pub fn parts(&self) -> &[String] {
        &self.parts
    }

    /// Appends the key as it stands in cache keys: a single part as it is, several joined by commas,
    /// with `,` and `%` inside a part escaped.
    pub(super) fn spell(&self, out: &mut String) {
        if let [only] = self.parts.as_slice() {
            out.push_str(only);
            return;
        }
        for (index, part) in self.parts.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            for letter in part.chars() {
                match letter {
                    ',' => out.push_str("%2C"),
                    '%' => out.push_str("%25"),
                    other => out.push(other),
                }
            }
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        self.spell(&mut text);
        out.write_str(&text)
    }
}

/// A part in which bytes may stand as a percent sign and two hexadecimal digits.
fn unescaped(part: &str) -> Result<String, KeyError> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let digits = more.first_chunk::<2>().filter(|_| *first == b'%').and_then(|digits| str::from_utf8(digits).ok());
        let escaped = digits.filter(|digits| !digits.starts_with('+'));
        if let Some(byte) = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            bytes.push(byte);
            rest = &more[2..];
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    String::from_utf8(bytes).map_err(|_| KeyError::Malformed("the key is not UTF-8".into()))
}

/// The one spelling of `text` as a value of `column`.
pub(super) fn canonical(column: &Column, text: String) -> Result<String, KeyError> {
    let malformed =
        |what: &str| Err(KeyError::Malformed(format!("{} is of type {}: {what}", column.name, column.type_name)));
    if text.contains('\0') {
        return malformed("a NUL byte can't be part of it");
    }
    match &column.kind {
        Kind::Integer { min, max } => match integer(&text) {
            None => malformed("expected a whole number such as 42"),
            Some(Some(number)) if (*min..=*max).contains(&number) => Ok(respell(text, number)),
            Some(_) => Err(KeyError::CannotExist),
        },
        Kind::Text { max_bytes: Some(max) } if text.len() > *max => Err(KeyError::CannotExist),
        Kind::Text { .. } | Kind::Other => Ok(text),
        Kind::Uuid => match uuid::Uuid::try_parse(&text) {
            Ok(uuid) => Ok(uuid.hyphenated().to_string()),
            Err(_) => malformed("expected a UUID such as 0195f1c6-7c00-7d1e-b1a5-0b6f2f0e8f11"),
        },
        Kind::Boolean => match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "1" => Ok("true".into()),
            "false" | "f" | "0" => Ok("false".into()),
            _ => malformed("expected true or false"),
        },
        Kind::Bytes => {
            let digits = text.strip_prefix("\\x").filter(|digits| {
                digits.len().is_multiple_of(2) && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            match digits {
                Some(_) => Ok(text.to_ascii_lowercase()),
                None => malformed("expected hexadecimal digits after \\x, such as \\x00ff"),
            }
        }
        Kind::Label(labels) if labels.contains(&text) => Ok(text),
        Kind::Label(_) => Err(KeyError::CannotExist),
        Kind::Number => match number(&text) {
            Number::Fine => Ok(text),
            Number::TooLong => Err(KeyError::CannotExist),
            Number::Malformed => malformed("expected a number such as 12.50"),
        },
    }
}

/// `None`: no whole number. `Some(None)`: one that no type holds.
fn integer(text: &str) -> Option<Option<i128>> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    (!digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())).then(|| text.parse().ok())
}

/// Most keys come canonical: those keep the buffer they came in.
fn respell(mut text: String, number: i128) -> String {
    let plain = text.as_bytes();
    let canonical = match plain {
        [b'0'] => true,
        [b'-', first, ..] | [first, ..] => matches!(first, b'1'..=b'9'),
        [] => false,
    };
    if !canonical {
        text.clear();
        // Writing to a String can't fail.
        let _ = write!(text, "{number}");
    }
    text
}

enum Number {
    Fine,
    TooLong,
    Malformed,
}

/// Judges the syntax of a decimal number, and refuses magnitudes that no column holds.
fn number(text: &str) -> Number {
    const LONGEST: usize = 1000;
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if ["nan", "infinity", "inf"].contains(&unsigned.to_ascii_lowercase().as_str()) {
        return Number::Fine;
    }
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let digits = mantissa.bytes().filter(u8::is_ascii_digit).count();
    let dots = mantissa.bytes().filter(|byte| *byte == b'.').count();
    let exponent = match exponent.map(integer) {
        None => Some(0),
        Some(None) => return Number::Malformed,
        Some(Some(exponent)) => exponent,
    };
    if digits == 0 || dots > 1 || digits + dots != mantissa.len() {
        return Number::Malformed;
    }
    match exponent {
        Some(-300..=300) if digits <= LONGEST => Number::Fine,
        _ => Number::TooLong,
    }
}

#[cfg(test)]
mod tests {
    use super::{Key, KeyError, canonical};
    use crate::catalog::{Column, Kind};

    fn column(kind: Kind) -> Column {
        Column {
            name: "id".into(),
            type_name: "some type".into(),
            cast: String::new(),
            kind,
            exact: true,
            json: false,
            generated: false,
            counted: false,
            nullable: false,
        }
    }

    #[test]
    fn a_value_has_one_spelling() {
        let int = column(Kind::Integer { min: i32::MIN.into(), max: i32::MAX.into() });
        for (text, expected) in
            [("1", "1"), ("01", "1"), ("+7", "7"), ("-0", "0"), ("-12", "-12"), ("2147483647", "2147483647")]
        {
            assert_eq!(canonical(&int, text.into()), Ok(expected.into()), "{text}");
        }
        let uuid = column(Kind::Uuid);
        assert_eq!(
            canonical(&uuid, "{0195F1C6-7C00-7D1E-B1A5-0B6F2F0E8F11}".into()),
            Ok("0195f1c6-7c00-7d1e-b1a5-0b6f2f0e8f11".into())
        );
        assert_eq!(canonical(&column(Kind::Bytes), "\\xAB".into()), Ok("\\xab".into()));
        assert_eq!(canonical(&column(Kind::Boolean), "T".into()), Ok("true".into()));
    }

    #[test]
    fn what_cannot_exist_is_told_from_what_is_malformed() {
        let int = column(Kind::Integer { min: i32::MIN.into(), max: i32::MAX.into() });
        for text in ["2147483648", "-99999999999999999999999999"] {
            assert_eq!(canonical(&int, text.into()), Err(KeyError::CannotExist), "{text}");
        }
        for text in ["", "-", "1.0", "1e3", "x", " 1", "1 ", "0x10", "١", "1\0"] {
            assert!(matches!(canonical(&int, text.into()), Err(KeyError::Malformed(_))), "{text:?}");
        }
        let label = column(Kind::Label(vec!["red".into()]));
        assert_eq!(canonical(&label, "blue".into()), Err(KeyError::CannotExist));
        let number = column(Kind::Number);
        assert_eq!(canonical(&number, "1e999999999".into()), Err(KeyError::CannotExist));
        assert!(canonical(&number, "-.5e-3".into()).is_ok());
        for text in ["", ".", "1.2.3", "e5", "1e", "0x1"] {
            assert!(matches!(canonical(&number, text.into()), Err(KeyError::Malformed(_))), "{text:?}");
        }
        let name = column(Kind::Text { max_bytes: Some(63) });
        assert_eq!(canonical(&name, "x".repeat(64)), Err(KeyError::CannotExist));
    }

    #[test]
    fn composite_keys_cannot_be_confused() {
        let text = [column(Kind::Text { max_bytes: None }), column(Kind::Text { max_bytes: None })];
        let spell = |a: &str, b: &str| Key::parse(text.iter(), vec![a.into(), b.into()]).map(|key| key.to_string());
        assert_eq!(spell("a,b", "c"), Ok("a%2Cb,c".into()));
        assert_eq!(spell("a", "b,c"), Ok("a,b%2Cc".into()));
        assert_eq!(spell("a%2C", "b"), Ok("a%252C,b".into()));
        for (a, b) in [("a,b", "c"), ("a%2C", "b"), ("%", "%2"), ("%+f", ",%zz"), ("é", "")] {
            let spelled = spell(a, b).unwrap();
            assert_eq!(Key::texts(&spelled, 2), Ok(vec![a.into(), b.into()]), "{spelled}");
        }
        assert_eq!(Key::texts("a,b%2C", 1), Ok(vec!["a,b%2C".into()]), "a single part stands as it is");
        assert!(Key::texts("%ff,1", 2).is_err());
        assert!(Key::parse(text.iter(), vec!["a".into()]).is_err());
    }
}
