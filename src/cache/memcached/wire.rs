//! Memcached's meta commands as bytes, and replies read back: no sockets, no meaning.
//!
//! Every command carries a number that its reply repeats, so that a reply is never taken for another command's. What is
//! no reply at all, or another command's, ends the connection: nothing after it can be told apart any more.

use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes, BytesMut};

use super::key::Spelled;

/// No line of a reply is longer.
const LINE: usize = 2048;
/// No value is larger: the most that a server can be told to hold.
const VALUE: usize = 1 << 30;
/// A life longer than this is taken for a date by the server, in seconds.
const LONGEST: u64 = 30 * 24 * 60 * 60;

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// What must be so for a value to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum If {
    /// Nothing is there.
    Absent,
    /// What is there has this number.
    Is(u64),
}

/// Commands that go out together, and whose replies come back together.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    /// Of all replies, and how many there will be.
    pub(super) number: u64,
    pub(super) count: u32,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), number: NUMBERS.fetch_add(1, Ordering::Relaxed), count: 0 }
    }

    /// Gets all of these.
    pub(super) fn of_gets(keys: impl IntoIterator<Item = Spelled>) -> Self {
        let mut batch = Self::new();
        for key in keys {
            batch.get(&key);
        }
        batch
    }

    /// The value, its number and how long it will live.
    pub(super) fn get(&mut self, key: &Spelled) {
        self.command("mg", key, format_args!(" v c t"));
    }

    /// Stores a value for so many seconds, zero for as long as there is room, and asks for its number.
    pub(super) fn set(&mut self, key: &Spelled, condition: If, life: u64, value: &[u8]) {
        match condition {
            If::Absent => self.command("ms", key, format_args!(" {} ME T{life} c", value.len())),
            If::Is(cas) => self.command("ms", key, format_args!(" {} C{cas} T{life} c", value.len())),
        }
        self.bytes.extend_from_slice(value);
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// Deletes what is there, whatever it is.
    pub(super) fn delete(&mut self, key: &Spelled) {
        self.command("md", key, format_args!(""));
    }

    /// Deletes what is there if it has this number.
    pub(super) fn delete_if(&mut self, key: &Spelled, cas: u64) {
        self.command("md", key, format_args!(" C{cas}"));
    }

    fn command(&mut self, verb: &str, key: &Spelled, rest: std::fmt::Arguments<'_>) {
        let (text, binary) = key.on_the_wire();
        let binary = if binary { " b" } else { "" };
        // Writing into memory does not fail. For `ms` the length comes first, so the flags follow it.
        let _ = write!(self.bytes, "{verb} {text}{rest}{binary} O{}:{}\r\n", self.number, self.count);
        self.count += 1;
    }
}

/// How long the server is to keep what must be there for `milliseconds`. Its clock moves once in a second, so a life of
/// one may be over at once.
pub(super) fn life(milliseconds: u64) -> u64 {
    (milliseconds.div_ceil(1000) + 1).min(LONGEST)
}

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// What is there.
    Value {
        /// Its bytes.
        value: Bytes,
        /// Its number: any other value of this key, in this life of the server, has another.
        cas: u64,
        /// The seconds it has left; zero: no end is set.
        life: u64,
    },
    /// It was done; the number of what was stored.
    Done(u64),
    /// Nothing is there.
    Missing,
    /// Something is there, and nothing was to be.
    Taken,
    /// Something else is there.
    Changed,
    /// The server could not: no memory for it, or it is too large.
    Refused,
}

/// What came is not the reply that was due.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the reply that was due: {0:?}")]
pub(super) struct Nonsense(String);

impl Nonsense {
    fn new(line: &[u8]) -> Self {
        Self(String::from_utf8_lossy(&line[..line.len().min(100)]).into_owned())
    }
}

/// Takes the reply to a batch's command of this index off the front; `None`: it is not all there yet.
///
/// # Errors
///
/// [`Nonsense`], after which the connection is of no use.
pub(super) fn take(input: &mut BytesMut, number: u64, index: u32) -> Result<Option<Reply>, Nonsense> {
    let Some(end) = input.iter().take(LINE).position(|byte| *byte == b'\n') else {
        return if input.len() < LINE { Ok(None) } else { Err(Nonsense::new(input)) };
    };
    let line = input[..end].strip_suffix(b"\r").ok_or_else(|| Nonsense::new(&input[..end]))?;
    let text = std::str::from_utf8(line).map_err(|_| Nonsense::new(line))?;
    let nonsense = || Nonsense::new(text.as_bytes());
    let mut words = text.split(' ');
    let verb = words.next().unwrap_or_default();
    if verb == "SERVER_ERROR" {
        // It repeats no number; if it was another command's, the next reply will tell.
        tracing::debug!(said = text, "the cache refused a command");
        input.advance(end + 1);
        return Ok(Some(Reply::Refused));
    }
    let size = match verb {
        "VA" => Some(words.next().and_then(|size| size.parse::<usize>().ok()).ok_or_else(nonsense)?),
        "HD" | "EN" | "NF" | "NS" | "EX" => None,
        _ => return Err(nonsense()),
    };
    let (mut cas, mut life, mut repeated) = (None, 0, false);
    for word in words {
        let Some((flag, value)) = word.split_at_checked(1) else { continue };
        match flag {
            "c" => cas = Some(value.parse().map_err(|_| nonsense())?),
            // Minus one: for ever.
            "t" => life = value.parse::<i64>().map_err(|_| nonsense())?.try_into().unwrap_or(0),
            "O" => {
                let (batch, at) = value.split_once(':').ok_or_else(nonsense)?;
                repeated = batch.parse() == Ok(number) && at.parse() == Ok(index);
            }
            _ => {}
        }
    }
    if !repeated {
        return Err(nonsense());
    }
    let reply = match (verb, size) {
        ("VA", Some(size)) => {
            // A server without such numbers can't compare them: what it stores is stored blindly.
            let cas = cas.filter(|cas| *cas != 0 && size <= VALUE).ok_or_else(nonsense)?;
            let whole = end + 1 + size + 2;
            if input.len() < whole {
                input.reserve(whole - input.len());
                return Ok(None);
            }
            if &input[whole - 2..whole] != b"\r\n" {
                return Err(nonsense());
            }
            input.advance(end + 1);
            let value = input.split_to(size).freeze();
            input.advance(2);
            return Ok(Some(Reply::Value { value, cas, life }));
        }
        ("HD", _) if cas == Some(0) => return Err(nonsense()),
        ("HD", _) => Reply::Done(cas.unwrap_or(0)),
        ("NS", _) => Reply::Taken,
        ("EX", _) => Reply::Changed,
        _ => Reply::Missing,
    };
    input.advance(end + 1);
    Ok(Some(reply))
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;

    use super::super::key::Spelling;
    use super::{Batch, If, Reply, life, take};

    fn taken(bytes: &[u8]) -> Result<Option<Reply>, super::Nonsense> {
        take(&mut BytesMut::from(bytes), 7, 1)
    }

    #[test]
    fn commands_say_what_is_meant() {
        let spelling = Spelling::new("");
        let mut batch = Batch { number: 7, ..Batch::new() };
        batch.get(&spelling.of("fruit:1"));
        batch.set(&spelling.of("fruit:1"), If::Absent, 3, b"a\r\nb");
        batch.set(&spelling.of("fruit:1"), If::Is(9), 0, b"");
        batch.delete(&spelling.of("a b"));
        batch.delete_if(&spelling.of("fruit:1"), 8);
        let text = "mg fruit:1 v c t O7:0\r\nms fruit:1 4 ME T3 c O7:1\r\na\r\nb\r\nms fruit:1 0 C9 T0 c O7:2\r\n\r\n\
                    md YSBi b O7:3\r\nmd fruit:1 C8 O7:4\r\n";
        assert_eq!(String::from_utf8_lossy(&batch.bytes), text);
        assert_eq!(batch.count, 5);
    }

    #[test]
    fn replies_are_read_whole_or_not_at_all() {
        let value = Reply::Value { value: "a\r\nb".into(), cas: 3, life: 9 };
        let whole = b"VA 4 c3 t9 O7:1\r\na\r\nb\r\nHD";
        for short in 0..whole.len() - 2 {
            assert_eq!(taken(&whole[..short]), Ok(None), "{short}");
        }
        let mut input = BytesMut::from(whole.as_slice());
        assert_eq!(take(&mut input, 7, 1), Ok(Some(value)));
        assert_eq!(input, "HD");
        for (line, reply) in [
            ("HD c5 O7:1\r\n", Reply::Done(5)),
            ("HD O7:1\r\n", Reply::Done(0)),
            ("EN O7:1\r\n", Reply::Missing),
            ("NF c0 O7:1\r\n", Reply::Missing),
            ("NS c0 O7:1\r\n", Reply::Taken),
            ("EX c0 O7:1\r\n", Reply::Changed),
            ("SERVER_ERROR out of memory storing object\r\n", Reply::Refused),
        ] {
            assert_eq!(taken(line.as_bytes()), Ok(Some(reply)), "{line}");
        }
    }

    #[test]
    fn what_is_not_the_reply_that_was_due_ends_the_connection() {
        for line in [
            "HD c5 O7:2\r\n",
            "HD c5 O8:1\r\n",
            "HD c5\r\n",
            "EN\r\n",
            "ERROR\r\n",
            "CLIENT_ERROR bad data chunk\r\n",
            "MN\r\n",
            "\r\n",
            "HD\n",
            "VA x c3 O7:1\r\n",
            "VA 1 c3 O7:1\r\nabc",
            "VA 99999999999 c3 O7:1\r\n",
            // Compare and set is switched off there.
            "VA 1 c0 O7:1\r\na\r\n",
            "HD c0 O7:1\r\n",
        ] {
            assert!(taken(line.as_bytes()).is_err(), "{line:?}");
        }
        assert!(taken(&[b'x'; 4096]).is_err());
    }

    #[test]
    fn nothing_ends_before_its_time() {
        assert_eq!([life(1), life(1000), life(1001), life(u64::MAX)], [2, 2, 3, 2_592_000]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_reply_or_nonsense(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = taken(&bytes);
        }
    }
}
