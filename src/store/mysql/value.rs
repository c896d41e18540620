//! Values as JSON, keys as text, and both back: every type that the protocol has, by hand and exactly.
//!
//! Neither server can be left to write the JSON: MariaDB's `JSON_OBJECT` rounds floats and knows no documents, MySQL's
//! writes dates and binary strings in forms of its own. So values come in the binary protocol, typed, and are written
//! here as PostgreSQL's `row_to_json` would write them.

use std::fmt::Write as _;

use mysql_async::Value;
use mysql_async::consts::{ColumnFlags, ColumnType};
use serde_json::value::RawValue;
use time::{Date, Month, PrimitiveDateTime, Time, UtcOffset};

use crate::catalog::{Column, Kind};
use crate::store::StoreError;

/// The character set of what is no text.
const BINARY: u16 = 63;

/// How values of a column are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Integer,
    /// `tinyint(1)`, which clients of MySQL have always taken for a boolean.
    Boolean,
    /// That many bits.
    Bits(u32),
    Decimal,
    Float,
    Double,
    Date,
    /// Without a time zone.
    DateTime,
    /// A moment, in UTC here.
    Timestamp,
    Time,
    Json,
    Bytes,
    Text,
}

impl Form {
    /// Of a table's column, as it was declared.
    pub(super) fn of(column: &Column) -> Self {
        if column.json {
            return Self::Json;
        }
        let declared = column.type_name.as_str();
        let name = declared.split(['(', ' ']).next().unwrap_or(declared);
        match name {
            "tinyint" if column.kind == Kind::Boolean => Self::Boolean,
            "tinyint" | "smallint" | "mediumint" | "int" | "bigint" | "year" => Self::Integer,
            "bit" => Self::Bits(arguments(declared).first().copied().unwrap_or(1)),
            "decimal" => Self::Decimal,
            "float" => Self::Float,
            "double" => Self::Double,
            "date" => Self::Date,
            "datetime" => Self::DateTime,
            "timestamp" => Self::Timestamp,
            "time" => Self::Time,
            _ if column.kind == Kind::Bytes => Self::Bytes,
            _ => Self::Text,
        }
    }

    /// Of a statement's result.
    pub(super) fn of_result(column: &mysql_async::Column) -> Self {
        match column.column_type() {
            ColumnType::MYSQL_TYPE_TINY
                if column.column_length() == 1 && !column.flags().contains(ColumnFlags::UNSIGNED_FLAG) =>
            {
                Self::Boolean
            }
            ColumnType::MYSQL_TYPE_TINY
            | ColumnType::MYSQL_TYPE_SHORT
            | ColumnType::MYSQL_TYPE_INT24
            | ColumnType::MYSQL_TYPE_LONG
            | ColumnType::MYSQL_TYPE_LONGLONG
            | ColumnType::MYSQL_TYPE_YEAR => Self::Integer,
            ColumnType::MYSQL_TYPE_BIT => Self::Bits(column.column_length()),
            ColumnType::MYSQL_TYPE_DECIMAL | ColumnType::MYSQL_TYPE_NEWDECIMAL => Self::Decimal,
            ColumnType::MYSQL_TYPE_FLOAT => Self::Float,
            ColumnType::MYSQL_TYPE_DOUBLE => Self::Double,
            ColumnType::MYSQL_TYPE_DATE | ColumnType::MYSQL_TYPE_NEWDATE => Self::Date,
            ColumnType::MYSQL_TYPE_DATETIME | ColumnType::MYSQL_TYPE_DATETIME2 => Self::DateTime,
            ColumnType::MYSQL_TYPE_TIMESTAMP | ColumnType::MYSQL_TYPE_TIMESTAMP2 => Self::Timestamp,
            ColumnType::MYSQL_TYPE_TIME | ColumnType::MYSQL_TYPE_TIME2 => Self::Time,
            ColumnType::MYSQL_TYPE_JSON => Self::Json,
            _ if column.character_set() == BINARY => Self::Bytes,
            _ => Self::Text,
        }
    }
}

/// The numbers in a type's parentheses.
fn arguments(declared: &str) -> Vec<u32> {
    let inner = declared.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map_or("", |(inner, _)| inner);
    inner.split(',').filter_map(|number| number.trim().parse().ok()).collect()
}

/// Appends a JSON string.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    // A string always has a JSON form.
    out.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
}

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

/// As PostgreSQL writes numbers: the shortest digits that read back as the same one.
fn double(number: f64) -> String {
    shortest(number.is_finite(), &format!("{number:e}"), &number.to_string(), number > 0.0, 15)
}

fn single(number: f32) -> String {
    shortest(number.is_finite(), &format!("{number:e}"), &number.to_string(), number > 0.0, 6)
}

fn shortest(finite: bool, scientific: &str, plain: &str, positive: bool, digits: i32) -> String {
    if !finite {
        return if plain == "NaN" {
            "NaN"
        } else if positive {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..digits).contains(&exponent) {
        return plain.to_owned();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    for byte in bytes {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("\\x")?;
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok()).collect()
}

/// The value that a key's or list's text is compared as. What no row can have is NULL: it finds nothing.
pub(super) fn bind(column: &Column, text: &str) -> Result<Value, StoreError> {
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

/// Precision and scale of a decimal column.
pub(super) fn scale(column: &Column) -> (u32, u32) {
    match arguments(&column.type_name).as_slice() {
        [precision, scale] => (*precision, *scale),
        [precision] => (*precision, 0),
        _ => (10, 0),
    }
}

fn binary_digits(text: &str, width: u32) -> Option<Value> {
    let fits = !text.is_empty()
        && text.len() <= usize::try_from(width).ok()?
        && text.bytes().all(|d| matches!(d, b'0' | b'1'));
    fits.then(|| u64::from_str_radix(text, 2).ok().map(Value::UInt)).flatten()
}

fn temporal_form(form: Form) -> &'static str {
    match form {
        Form::Date => "a date such as 2024-05-01",
        Form::DateTime => "a date and time such as 2024-05-01T10:00:00",
        Form::Timestamp => "a moment such as 2024-05-01T10:00:00+00:00",
        _ => "a time such as 10:00:00",
    }
}

/// A date or time in its binary form: no server's idea of what a text may mean comes in between.
fn temporal(text: &str, form: Form) -> Option<Value> {
    if form == Form::Time {
        let (negative, unsigned) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (hours, minutes, seconds, micros) = clock(unsigned, 3)?;
        (hours <= 838).then_some(())?;
        let (days, hours) = (hours / 24, u8::try_from(hours % 24).ok()?);
        return Some(Value::Time(negative, days, hours, minutes, seconds, micros));
    }
    let mut parts = text.get(..10)?.splitn(3, '-');
    let mut number =
        |width: usize| parts.next().filter(|part| part.len() == width && digits(part))?.parse::<u16>().ok();
    let (year, month, day) = (number(4)?, number(2)?, number(2)?);
    let rest = &text[10..];
    // As the database itself has it, where it was allowed to.
    if year == 0 && month == 0 && day == 0 {
        let bare = matches!(rest, "" | "T00:00:00" | " 00:00:00" | "T00:00:00+00:00");
        return bare.then_some(Value::Date(0, 0, 0, 0, 0, 0, 0));
    }
    let date = Date::from_calendar_date(
        i32::from(year),
        Month::try_from(u8::try_from(month).ok()?).ok()?,
        u8::try_from(day).ok()?,
    )
    .ok()?;
    if form == Form::Date {
        return rest.is_empty().then(|| Value::Date(year, u8::from(date.month()), date.day(), 0, 0, 0, 0));
    }
    let rest = if rest.is_empty() { "00:00:00" } else { rest.strip_prefix(['T', ' '])? };
    let (rest, offset) = match rest.find(['Z', '+', '-']) {
        Some(at) => (&rest[..at], Some(&rest[at..])),
        None => (rest, None),
    };
    let (hours, minutes, seconds, micros) = clock(rest, 2)?;
    let time = Time::from_hms_micro(u8::try_from(hours).ok()?, minutes, seconds, micros).ok()?;
    let mut moment = PrimitiveDateTime::new(date, time);
    match (form, offset) {
        (_, None) => {}
        (Form::Timestamp, Some(offset)) => {
            let moved = moment.assume_offset(parse_offset(offset)?).checked_to_offset(UtcOffset::UTC)?;
            moment = PrimitiveDateTime::new(moved.date(), moved.time());
        }
        // A column without a zone can't keep it.
        (_, Some(_)) => return None,
    }
    let (date, time) = (moment.date(), moment.time());
    Some(Value::Date(
        u16::try_from(date.year()).ok()?,
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.microsecond(),
    ))
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit())
}

/// `10:00`, `10:00:00`, `10:00:00.5`: hours of so many digits at most.
fn clock(text: &str, most: usize) -> Option<(u32, u8, u8, u32)> {
    let (text, fraction) = text.split_once('.').map_or((text, None), |(text, fraction)| (text, Some(fraction)));
    let mut parts = text.split(':');
    let hours = parts.next().filter(|hours| digits(hours) && hours.len() <= most)?.parse().ok()?;
    let mut sixty = |needed: bool| match parts.next() {
        Some(part) if digits(part) && part.len() == 2 => part.parse::<u8>().ok().filter(|number| *number < 60),
        Some(_) => None,
        None => (!needed).then_some(0),
    };
    let (minutes, seconds) = (sixty(true)?, sixty(fraction.is_some())?);
    let micros = match fraction {
        Some(fraction) if digits(fraction) && fraction.len() <= 6 => format!("{fraction:0<6}").parse().ok()?,
        Some(_) => return None,
        None => 0,
    };
    parts.next().is_none().then_some((hours, minutes, seconds, micros))
}

fn parse_offset(text: &str) -> Option<UtcOffset> {
    if text == "Z" {
        return Some(UtcOffset::UTC);
    }
    let (sign, rest) = text.split_at_checked(1)?;
    let sign = if sign == "-" { -1 } else { 1 };
    let (hours, minutes) = match rest.split_once(':') {
        Some(both) => both,
        None => rest.split_at_checked(2)?,
    };
    let minutes = if minutes.is_empty() { "00" } else { minutes };
    if ![hours, minutes].iter().all(|part| part.len() == 2 && digits(part)) {
        return None;
    }
    UtcOffset::from_hms(sign * hours.parse::<i8>().ok()?, sign * minutes.parse::<i8>().ok()?, 0).ok()
}

/// The value that a member of a body is stored as, or why it can't be.
pub(super) fn parse(column: &Column, raw: &RawValue) -> Result<Value, String> {
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

fn is_number(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text)
        .is_ok_and(|raw| raw.get().starts_with(|first: char| first == '-' || first.is_ascii_digit()))
}

fn in_set(declared: &str, text: &str) -> bool {
    let labels = labels(declared);
    text.is_empty() || text.split(',').all(|label| labels.iter().any(|known| known == label))
}

/// The labels of `enum('a','b''c')` or `set(…)`.
pub(super) fn labels(declared: &str) -> Vec<String> {
    let (mut labels, mut label, mut inside) = (Vec::new(), String::new(), false);
    let mut letters = declared.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' if inside && letters.peek() == Some(&'\'') => {
                letters.next();
                label.push('\'');
            }
            '\'' if inside => {
                labels.push(std::mem::take(&mut label));
                inside = false;
            }
            '\'' => inside = true,
            other if inside => label.push(other),
            _ => {}
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use mysql_async::Value;

    use super::{Form, bind, bits, decimal, double, labels, single, temporal, text};
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
    fn numbers_are_written_as_postgresql_writes_them() {
        for (number, expected) in [
            (1.0, "1"),
            (0.1, "0.1"),
            (-0.0, "-0"),
            (1e15, "1e+15"),
            (123_456_789_012_345.0, "123456789012345"),
            (1e-5, "1e-05"),
            (1.5e300, "1.5e+300"),
        ] {
            assert_eq!(double(number), expected);
        }
        for (number, expected) in
            [(0.1, "0.1"), (123_456.0, "123456"), (1_234_567.0, "1.234567e+06"), (f32::NAN, "NaN")]
        {
            assert_eq!(single(number), expected);
        }
        for (text, expected) in [("0012.50", "12.50"), ("-0.10", "-0.10"), ("0000", "0"), ("00.00", "0.00"), ("5", "5")]
        {
            assert_eq!(decimal(text), expected);
        }
        assert_eq!(bits(&[0b101], 3), "101");
        assert_eq!(bits(&[1, 2], 10), "0100000010");
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
            assert_eq!(bind(&price, given), Ok(expected), "{given}");
        }
    }

    #[test]
    fn dates_and_times_are_read_or_refused() {
        let date = |text| temporal(text, Form::Timestamp);
        let expected = Value::Date(2024, 5, 1, 10, 0, 0, 500_000);
        for same in [
            "2024-05-01T10:00:00.5",
            "2024-05-01 10:00:00.5Z",
            "2024-05-01T12:00:00.50+02:00",
            "2024-05-01T04:30:00.5-0530",
        ] {
            assert_eq!(date(same), Some(expected.clone()), "{same}");
        }
        for wrong in [
            "",
            "2024-02-30T10:00:00",
            "2024-5-1",
            "2024-05-01T25:00:00",
            "2024-05-01T10",
            "2024-05-01T10:00:00.5x",
            "0",
            "ä2024-05-0",
        ] {
            assert_eq!(date(wrong), None, "{wrong}");
        }
        assert_eq!(temporal("2024-05-01T10:00:00+02:00", Form::DateTime), None);
        assert_eq!(temporal("-100:30:00.25", Form::Time), Some(Value::Time(true, 4, 4, 30, 0, 250_000)));
        assert_eq!(temporal("839:00:00", Form::Time), None);
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
            let value = bind(&column(declared, Kind::Other), text_of).expect("it is one");
            if !matches!(form, Form::Bits(_)) {
                assert_eq!(text(&value, form).as_deref(), Some(text_of));
            }
        }
    }

    #[test]
    fn labels_are_taken_out_of_their_declaration() {
        assert_eq!(labels("enum('a','b''c','','d,e')"), ["a", "b'c", "", "d,e"]);
    }
}
