//! How PostgreSQL writes values, for databases whose rows are written as JSON here.

use std::fmt::Write as _;

/// Appends a JSON string.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    // A string always has a JSON form.
    out.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
}

/// As PostgreSQL writes numbers: the shortest digits that read back as the same one.
pub(super) fn double(number: f64) -> String {
    shortest(number.is_finite(), &format!("{number:e}"), &number.to_string(), number > 0.0, 15)
}

/// The same in single precision.
#[cfg(feature = "mysql")]
pub(super) fn single(number: f32) -> String {
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

/// Bytes as `\x` and hexadecimal digits.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    for byte in bytes {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// And those back.
pub(super) fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("\\x")?;
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_written_as_postgresql_writes_them() {
        for (number, expected) in [
            (1.0, "1"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (-0.0, "-0"),
            (1e15, "1e+15"),
            (123_456_789_012_345.0, "123456789012345"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (1.5e300, "1.5e+300"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(super::double(number), expected);
        }
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn so_are_those_of_single_precision() {
        for (number, expected) in
            [(0.1, "0.1"), (123_456.0, "123456"), (1_234_567.0, "1.234567e+06"), (f32::NAN, "NaN")]
        {
            assert_eq!(super::single(number), expected);
        }
    }
}
