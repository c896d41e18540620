//! Dates and times out of texts, in their binary form: no server's idea of what a text may mean comes in between.

use mysql_async::Value;
use time::{Date, Month, PrimitiveDateTime, Time, UtcOffset};

use super::form::Form;

/// How it is to be spelled, for people.
pub(super) fn temporal_form(form: Form) -> &'static str {
    match form {
        Form::Date => "a date such as 2024-05-01",
        Form::DateTime => "a date and time such as 2024-05-01T10:00:00",
        Form::Timestamp => "a moment such as 2024-05-01T10:00:00+00:00",
        _ => "a time such as 10:00:00",
    }
}

/// A date or time; `None`: it is none.
pub(super) fn temporal(text: &str, form: Form) -> Option<Value> {
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

#[cfg(test)]
mod tests {
    use mysql_async::Value;

    use super::{Form, temporal};

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
}
