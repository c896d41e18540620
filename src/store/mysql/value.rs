//! Values as JSON, and as the texts of keys: every type that the protocol has, by hand and exactly.
//!
//! Neither server can be left to write the JSON: MariaDB's `JSON_OBJECT` rounds floats and knows no documents, MySQL's
//! writes dates and binary strings in forms of its own. So values come in the binary protocol, typed, and are written
//! here as PostgreSQL's `row_to_json` would write them.

use std::fmt::Write as _;

use mysql_async::Value;
use serde_json::value::RawValue;

use super::form::Form;
use crate::store::spelling::{double, hexadecimal, single, string};

/// Appends a value as it stands in the row's JSON.
pub(super) fn write(out: &mut Vec<u8>, value: &Value, form: Form) {
    let Some(text) = text(value, form) else {
        out.extend_from_slice(b"null");
        return;
    };
    let bare = match form {
        Form::Integer | Form::Decimal | Form::Boolean => true,
        Form::Float | Form::Double => !matches!(text.as_str(), "NaN" | "Infinity" | "-Infinity"),
        // The server has judged it, perhaps otherwise than we do.
        Form::Json => serde_json::from_str::<&RawValue>(&text).is_ok(),
        _ => false,
    };
    // A column that was altered a moment ago may hold anything: nothing of the row may break.
    let bare = bare && (form == Form::Json || !matches!(value, Value::Bytes(_)) || is_number(&text));
    if bare {
        out.extend_from_slice(text.trim().as_bytes());
    } else {
        string(out, &text);
    }
}

/// The text of a value: its JSON without quotes; `None` for NULL.
pub(super) fn text(value: &Value, form: Form) -> Option<String> {
    Some(match (value, form) {
        (Value::NULL, _) => return None,
        (Value::Int(number @ (0 | 1)), Form::Boolean) => (*number == 1).to_string(),
        (Value::Int(number), _) => number.to_string(),
        (Value::UInt(number), _) => number.to_string(),
        // A union may have made a double of a float.
        #[expect(clippy::cast_possible_truncation, reason = "it was a float before")]
        (Value::Double(number), Form::Float) => single(*number as f32),
        (Value::Double(number), _) => double(*number),
        (Value::Float(number), _) => single(*number),
        (Value::Date(year, month, day, hour, minute, second, micros), _) => {
            let mut text = format!("{year:04}-{month:02}-{day:02}");
            if form != Form::Date {
                let _ = write!(text, "T{hour:02}:{minute:02}:{second:02}{}", fraction(*micros));
            }
            if form == Form::Timestamp {
                text.push_str("+00:00");
            }
            text
        }
        (Value::Time(negative, days, hours, minutes, seconds, micros), _) => {
            let (sign, hours) = (if *negative { "-" } else { "" }, u64::from(*days) * 24 + u64::from(*hours));
            format!("{sign}{hours:02}:{minutes:02}:{seconds:02}{}", fraction(*micros))
        }
        (Value::Bytes(bytes), Form::Bytes) => hexadecimal(bytes),
        (Value::Bytes(bytes), Form::Bits(width)) => bits(bytes, width),
        (Value::Bytes(bytes), Form::Decimal) => decimal(&String::from_utf8_lossy(bytes)),
        (Value::Bytes(bytes), _) => String::from_utf8_lossy(bytes).into_owned(),
    })
}

pub(super) fn is_number(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text)
        .is_ok_and(|raw| raw.get().starts_with(|first: char| first == '-' || first.is_ascii_digit()))
}

/// Microseconds as PostgreSQL writes them: without zeros at the end.
fn fraction(micros: u32) -> String {
    if micros == 0 {
        return String::new();
    }
    let digits = format!(".{micros:06}");
    digits.trim_end_matches('0').to_owned()
}

/// The digits of a bit field of this width.
fn bits(bytes: &[u8], width: u32) -> String {
    let all: String = bytes.iter().map(|byte| format!("{byte:08b}")).collect();
    let width = usize::try_from(width).unwrap_or(64).min(all.len());
    all[all.len() - width..].to_owned()
}

/// A decimal without the zeros that ZEROFILL puts in front.
fn decimal(text: &str) -> String {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    let whole = digits.split('.').next().unwrap_or(digits).len();
    let zeros = digits.bytes().take(whole.saturating_sub(1)).take_while(|digit| *digit == b'0').count();
    format!("{sign}{}", &digits[zeros..])
}

#[cfg(test)]
mod tests {
    use super::{bits, decimal};

    #[test]
    fn decimals_and_bits_are_written_as_postgresql_writes_them() {
        for (text, expected) in [("0012.50", "12.50"), ("-0.10", "-0.10"), ("0000", "0"), ("00.00", "0.00"), ("5", "5")]
        {
            assert_eq!(decimal(text), expected);
        }
        assert_eq!(bits(&[0b101], 3), "101");
        assert_eq!(bits(&[1, 2], 10), "0100000010");
    }
}
