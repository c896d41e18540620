//! Durations, sizes and numbers as people write them. The file and the environment give text; these make values of it,
//! and text of values for the defaults in the schema.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, Serializer};

/// The longest duration, in milliseconds: a century is more than anybody means, and leaves room for sums.
const CENTURY: u64 = 100 * 365 * 86_400_000;

/// Each unit of time and its milliseconds, the largest first.
const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Each unit of size and its bytes, the largest first.
const SIZES: [(&str, usize); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// `250ms`, `10s`, `5m`, `1h`, `1d`, or `0`.
///
/// # Errors
///
/// A sentence that says what is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let wrong = || format!("{text:?} is no duration; write it like 250ms, 10s, 5m or 1h");
    if number.is_empty() {
        return Err(wrong());
    }
    let factor = match TIMES.iter().find(|(name, _)| *name == unit) {
        Some((_, factor)) => *factor,
        None if unit.is_empty() && number.bytes().all(|digit| digit == b'0') => 1,
        None if unit.is_empty() => return Err(format!("{text:?} has no unit; add a unit, e.g. {number}s")),
        None => return Err(wrong()),
    };
    let milliseconds = number.parse().ok().and_then(|number: u64| number.checked_mul(factor));
    match milliseconds {
        Some(milliseconds) if milliseconds <= CENTURY => Ok(Duration::from_millis(milliseconds)),
        _ => Err(format!("{text:?} is longer than a century")),
    }
}

/// `512`, `512B`, `64KiB`, `1MiB`, `2GiB`.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let (number, unit) = split(text);
    let factor = SIZES.iter().find(|(name, _)| *name == unit || (unit.is_empty() && *name == "B"));
    let Some((_, factor)) = factor.filter(|_| !number.is_empty()) else {
        return Err(format!("{text:?} is no size; write it like 512B, 64KiB or 1MiB"));
    };
    let bytes = number.parse().ok().and_then(|number: usize| number.checked_mul(*factor));
    // Half the address space: sums of two sizes still fit.
    bytes.filter(|bytes| *bytes <= usize::MAX / 2).ok_or_else(|| format!("{text:?} is too large"))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    (number, unit.trim_start())
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer)
}

/// For `#[serde(with)]`: a [`Duration`] in its text form.
pub(super) mod duration {
    use super::{Deserializer, Duration, Error, Serializer, TIMES, parse_duration, text};

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse_duration(&text(deserializer)?).map_err(D::Error::custom)
    }

    pub(in super::super) fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        let whole = value.as_millis();
        let unit = TIMES.iter().find(|(_, factor)| whole != 0 && whole.is_multiple_of(u128::from(*factor)));
        match unit {
            Some((unit, factor)) => serializer.collect_str(&format_args!("{}{unit}", whole / u128::from(*factor))),
            None => serializer.serialize_str("0s"),
        }
    }
}

/// For `#[serde(with)]`: a duration that may be left out.
pub(super) mod some_duration {
    use super::{Deserializer, Duration, Serialize, Serializer};

    pub(in super::super) fn deserialize<'de, D>(deserializer: D) -> Result<Option<Duration>, D::Error>
    where
        D: Deserializer<'de>,
    {
        super::duration::deserialize(deserializer).map(Some)
    }

    /// Only defaults are written, and these are none.
    #[expect(clippy::ref_option, reason = "serde asks for a reference")]
    pub(in super::super) fn serialize<S: Serializer>(_: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        ().serialize(serializer)
    }
}

/// For `#[serde(with)]`: a number of bytes.
pub(super) mod size {
    use super::{Deserializer, Error, SIZES, Serializer, parse_size, text};

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
        parse_size(&text(deserializer)?).map_err(D::Error::custom)
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
    pub(in super::super) fn serialize<S: Serializer>(value: &usize, serializer: S) -> Result<S::Ok, S::Error> {
        match SIZES.iter().find(|(_, factor)| *value != 0 && value.is_multiple_of(*factor)) {
            Some((unit, factor)) => serializer.collect_str(&format_args!("{}{unit}", value / factor)),
            None => serializer.serialize_str("0B"),
        }
    }
}

/// A number, in decimal or as YAML 1.2 writes other bases: `0x1f`, `0o17`.
pub(super) fn number<'de, D, N>(deserializer: D) -> Result<N, D::Error>
where
    D: Deserializer<'de>,
    N: FromStr<Err: Display>,
{
    let text = text(deserializer)?;
    let based = |prefix, radix| u64::from_str_radix(text.strip_prefix(prefix)?, radix).ok();
    let decimal = based("0x", 16).or_else(|| based("0o", 8)).map(|number| number.to_string());
    let number = decimal.as_deref().unwrap_or(&text).parse();
    number.map_err(|error| D::Error::custom(format!("{text:?} is no number that fits here: {error}")))
}

/// A number that may be left out.
pub(super) fn some_number<'de, D, N>(deserializer: D) -> Result<Option<N>, D::Error>
where
    D: Deserializer<'de>,
    N: FromStr<Err: Display>,
{
    number(deserializer).map(Some)
}

/// Text that may be left out; empty is left out.
pub(super) fn some_text<'de, D, V>(deserializer: D) -> Result<Option<V>, D::Error>
where
    D: Deserializer<'de>,
    V: From<String>,
{
    let text = text(deserializer)?;
    Ok((!text.is_empty()).then(|| text.into()))
}

/// One string or a list of them.
pub(super) fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged, expecting = "expected a name or a list of names")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}
