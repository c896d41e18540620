//! Texts and members of bodies as values: what the server compares, and what it stores.

use mysql_async::Value;
use serde_json::value::RawValue;

use super::form::{Form, labels, scale};
use super::temporal::{temporal, temporal_form};
use super::value::is_number;
use crate::catalog::{Column, Kind};
use crate::store::StoreError;
use crate::store::spelling::bytes;

/// The value that a key's or list's text is compared as. What no row can have is NULL: it finds nothing.
pub(super) fn compared(column: &Column, text: &str) -> Result<Value, StoreError> {
    let bad = |what: &str| StoreError::BadValue(format!("{}: expected {what}", column.name));
    let form = Form::of(column);
    Ok(match form {
        Form::Integer => integer(text).unwrap_or(Value::NULL),
        // A `tinyint(1)` may hold other numbers; the database's own texts of them come back here.
        Form::Boolean => text.parse().map_or_else(|_| Value::Int(i64::from(text == "true")), Value::Int),
        Form::Decimal => fixed(column, text).map_or(Value::NULL, |digits| Value::Bytes(digits.into_bytes())),
        Form::Float => text.parse::<f32>().ok().filter(|number| number.is_finite()).map_or(Value::NULL, Value::Float),
        Form::Double => text.parse::<f64>().ok().filter(|number| number.is_finite()).map_or(Value::NULL, Value::Double),
        Form::Bits(width) => binary_digits(text, width).ok_or_else(|| bad("binary digits"))?,
        Form::Date | Form::DateTime | Form::Timestamp | Form::Time => {
            temporal(text, form).ok_or_else(|| bad(temporal_form(form)))?
        }
        Form::Bytes => bytes(text).map(Value::Bytes).ok_or_else(|| bad("\\x and hexadecimal digits"))?,
        Form::Json | Form::Text => Value::Bytes(text.as_bytes().to_vec()),
    })
}

/// The value that a member of a body is stored as, or why it can't be.
pub(super) fn stored(column: &Column, raw: &RawValue) -> Result<Value, String> {
    let json = raw.get();
    let wrong = |expected: &str| Err(format!("expected {expected}"));
    if json == "null" {
        return Ok(Value::NULL);
    }
    let form = Form::of(column);
    let quoted: Option<String> = if json.starts_with('"') { serde_json::from_str(json).ok() } else { None };
    let bare = quoted.as_deref().unwrap_or(json);
    let or = |value: Option<Value>, expected: &str| value.map_or_else(|| wrong(expected), Ok);
    match (form, &quoted) {
        (Form::Json, _) => Ok(Value::Bytes(json.as_bytes().to_vec())),
        (Form::Integer, _) => or(integer(bare), "a whole number"),
        (Form::Boolean, _) => match bare {
            "true" => Ok(Value::Int(1)),
            "false" => Ok(Value::Int(0)),
            _ => or(integer(bare), "true or false"),
        },
        // The server rounds to the column's scale, as every server does.
        (Form::Decimal, _) => or(is_number(bare).then(|| Value::Bytes(bare.as_bytes().to_vec())), "a number"),
        (Form::Float | Form::Double, _) => {
            let number = bare.parse::<f64>().ok().filter(|number| number.is_finite() && is_number(bare));
            or(number.map(Value::Double), "a number")
        }
        (Form::Bits(width), Some(text)) => or(binary_digits(text, width), "binary digits, no more than there are bits"),
        (Form::Date | Form::DateTime | Form::Timestamp | Form::Time, Some(text)) => {
            or(temporal(text, form), temporal_form(form))
        }
        (Form::Bytes, Some(text)) => or(bytes(text).map(Value::Bytes), "\\x and hexadecimal digits"),
        (Form::Text, Some(text)) if text.contains('\0') => wrong("text without NUL"),
        (Form::Text, Some(text)) => match &column.kind {
            // A number as text would be taken for a label's position.
            Kind::Label(labels) if !labels.contains(text) => wrong("one of the column's labels"),
            Kind::Uuid if uuid::Uuid::try_parse(text).is_err() => wrong("a UUID"),
            Kind::Other if column.type_name.starts_with("set(") && !in_set(&column.type_name, text) => {
                wrong("some of the column's labels, separated by commas")
            }
            _ => Ok(Value::Bytes(text.as_bytes().to_vec())),
        },
        (Form::Bits(_), None) => wrong("a text of binary digits"),
        (Form::Bytes, None) => wrong("\\x and hexadecimal digits"),
        (Form::Date | Form::DateTime | Form::Timestamp | Form::Time, None) => wrong(temporal_form(form)),
        (Form::Text, None) => wrong("text"),
    }
}

fn integer(text: &str) -> Option<Value> {
    text.parse().map(Value::Int).or_else(|_| text.parse().map(Value::UInt)).ok()
}

/// A decimal as the column can hold it, so that it is compared digit by digit; `None`: no row has it.
fn fixed(column: &Column, text: &str) -> Option<String> {
    let (precision, scale) = scale(column);
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let exponent: i64 = exponent.parse().ok()?;
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{part}");
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) || exponent.abs() > 1000 {
        return None;
    }
    // Where the point is, counted from the first digit.
    let point = i64::try_from(whole.len()).ok()? + exponent;
    let digit = |place: i64| usize::try_from(place).ok().and_then(|place| digits.as_bytes().get(place).copied());
    let last = i64::try_from(digits.len()).ok()?;
    let nonzero = |from: i64, to: i64| (from..to).any(|place| digit(place).is_some_and(|digit| digit != b'0'));
    let (most, scale) = (i64::from(precision - scale.min(precision)), i64::from(scale));
    if nonzero(0, point - most) || nonzero((point + scale).max(0), last) {
        return None;
    }
    let run =
        |from: i64, to: i64| -> String { (from..to).map(|place| char::from(digit(place).unwrap_or(b'0'))).collect() };
    let whole = run(point - most, point);
    let whole = whole.trim_start_matches('0');
    let sign = if negative { "-" } else { "" };
    let whole = if whole.is_empty() { "0" } else { whole };
    let part = run(point, point + scale);
    Some(if part.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{part}") })
}

fn binary_digits(text: &str, width: u32) -> Option<Value> {
    let fits = !text.is_empty()
        && text.len() <= usize::try_from(width).ok()?
        && text.bytes().all(|d| matches!(d, b'0' | b'1'));
    fits.then(|| u64::from_str_radix(text, 2).ok().map(Value::UInt)).flatten()
}

fn in_set(declared: &str, text: &str) -> bool {
    let labels = labels(declared);
    text.is_empty() || text.split(',').all(|label| labels.iter().any(|known| known == label))
}

#[cfg(test)]
mod tests {
    use mysql_async::Value;

    use super::super::value::text;
    use super::{Form, compared};
    use crate::catalog::{Column, Kind};

    fn column(type_name: &str, kind: Kind) -> Column {
        Column {
            name: "c".into(),
            type_name: type_name.into(),
            cast: String::new(),
            kind,
            exact: false,
            json: false,
            generated: false,
            counted: false,
            nullable: true,
        }
    }

    #[test]
    fn a_decimal_key_is_compared_digit_by_digit_or_finds_nothing() {
        let price = column("decimal(6,2)", Kind::Number);
        for (given, expected) in [
            ("1", Some("1.00")),
            ("-01.50", Some("-1.50")),
            ("1.5e1", Some("15.00")),
            ("1234.5678e-2", None),
            ("1.005", None),
            ("1.0050e1", Some("10.05")),
            ("9999.99", Some("9999.99")),
            ("10000", None),
            ("1e400", None),
            ("NaN", None),
            (".5", Some("0.50")),
            ("0", Some("0.00")),
        ] {
            let expected = expected.map_or(Value::NULL, |digits| Value::Bytes(digits.into()));
            assert_eq!(compared(&price, given), Ok(expected), "{given}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (form, text_of, declared) in [
            (Form::Date, "2024-05-01", "date"),
            (Form::DateTime, "2024-05-01T10:00:00.123456", "datetime(6)"),
            (Form::Timestamp, "2024-05-01T10:00:00+00:00", "timestamp"),
            (Form::Timestamp, "0000-00-00T00:00:00+00:00", "timestamp"),
            (Form::Time, "-838:59:59", "time"),
            (Form::Bits(4), "0101", "bit(4)"),
        ] {
            let value = compared(&column(declared, Kind::Other), text_of).expect("it is one");
            if !matches!(form, Form::Bits(_)) {
                assert_eq!(text(&value, form).as_deref(), Some(text_of));
            }
        }
    }
}
