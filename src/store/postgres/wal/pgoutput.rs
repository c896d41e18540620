//! The messages of PostgreSQL's output plugin `pgoutput`, protocol version 1.
//!
//! Source: PostgreSQL's manual, "Logical Replication Message Formats". What it does not name is skipped.

use bytes::{Buf, Bytes};

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A transaction that was committed, by the lower half of its id.
    Begin {
        xid: u32,
    },
    /// Its end, and the position right after it.
    Commit {
        end: u64,
    },
    /// What a table is from here on.
    Relation(Relation),
    Insert {
        table: u32,
        new: Tuple,
    },
    /// `old` is there if the table's whole rows are its identity, or if its identity changed.
    Update {
        table: u32,
        old: Option<Old>,
        new: Tuple,
    },
    Delete {
        table: u32,
        old: Old,
    },
    Truncate {
        tables: Vec<u32>,
    },
    /// Of this table something changed, in a message too long or too odd to read.
    Anything {
        table: u32,
    },
    Other,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Relation {
    pub(super) table: u32,
    pub(super) columns: Vec<RelationColumn>,
}

/// One of its columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RelationColumn {
    pub(super) name: String,
    /// It identifies the row.
    pub(super) identity: bool,
}

/// What a row was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Old {
    /// All of it is known, not the identity alone.
    pub(super) whole: bool,
    pub(super) tuple: Tuple,
}

pub(super) type Tuple = Vec<Cell>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    Null,
    /// Stored elsewhere and not changed, so not told.
    Unchanged,
    Text(String),
}

/// Reads one message; `None` where it breaks off.
pub(super) fn parse(mut data: Bytes) -> Option<Message> {
    let kind = data.try_get_u8().ok()?;
    Some(match kind {
        b'B' => {
            skip(&mut data, 16)?;
            Message::Begin { xid: data.try_get_u32().ok()? }
        }
        b'C' => {
            skip(&mut data, 9)?;
            Message::Commit { end: data.try_get_u64().ok()? }
        }
        b'R' => Message::Relation(relation(&mut data)?),
        b'I' | b'U' | b'D' => {
            let table = data.try_get_u32().ok()?;
            row(kind, table, &mut data).unwrap_or(Message::Anything { table })
        }
        b'T' => {
            let count = data.try_get_u32().ok()?;
            skip(&mut data, 1)?;
            let tables = (0..count).map(|_| data.try_get_u32().ok()).collect::<Option<_>>()?;
            Message::Truncate { tables }
        }
        _ => Message::Other,
    })
}

fn row(kind: u8, table: u32, data: &mut Bytes) -> Option<Message> {
    let part = |data: &mut Bytes| Some((data.try_get_u8().ok()?, tuple(data)?));
    let (mark, first) = part(data)?;
    let old = |mark, tuple| matches!(mark, b'K' | b'O').then_some(Old { whole: mark == b'O', tuple });
    Some(match (kind, mark) {
        (b'I', b'N') => Message::Insert { table, new: first },
        (b'U', b'N') => Message::Update { table, old: None, new: first },
        (b'U', _) => {
            let old = old(mark, first)?;
            let (mark, new) = part(data)?;
            (mark == b'N').then_some(Message::Update { table, old: Some(old), new })?
        }
        (b'D', _) => Message::Delete { table, old: old(mark, first)? },
        _ => return None,
    })
}

fn relation(data: &mut Bytes) -> Option<Relation> {
    let table = data.try_get_u32().ok()?;
    let _schema = text_to_zero(data)?;
    let _name = text_to_zero(data)?;
    let _identity = data.try_get_u8().ok()?;
    let count = data.try_get_u16().ok()?;
    let columns = (0..count).map(|_| {
        let identity = data.try_get_u8().ok()? & 1 == 1;
        let name = text_to_zero(data)?;
        // Type and modifier.
        skip(data, 8)?;
        Some(RelationColumn { name, identity })
    });
    Some(Relation { table, columns: columns.collect::<Option<_>>()? })
}

fn tuple(data: &mut Bytes) -> Option<Tuple> {
    let count = data.try_get_u16().ok()?;
    (0..count)
        .map(|_| {
            Some(match data.try_get_u8().ok()? {
                b'n' => Cell::Null,
                b'u' => Cell::Unchanged,
                b't' => {
                    let length = usize::try_from(data.try_get_u32().ok()?).ok()?;
                    (data.len() >= length).then_some(())?;
                    Cell::Text(String::from_utf8(data.split_to(length).to_vec()).ok()?)
                }
                _ => return None,
            })
        })
        .collect()
}

fn skip(data: &mut Bytes, count: usize) -> Option<()> {
    (data.len() >= count).then(|| data.advance(count))
}

fn text_to_zero(data: &mut Bytes) -> Option<String> {
    let end = data.iter().position(|byte| *byte == 0)?;
    let text = String::from_utf8(data.split_to(end).to_vec()).ok()?;
    data.advance(1);
    Some(text)
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};
    use proptest::prelude::*;

    use super::{Cell, Message, Old, parse};

    fn cells(out: &mut BytesMut, mark: u8, cells: &[Option<&str>]) {
        out.put_u8(mark);
        out.put_u16(u16::try_from(cells.len()).expect("few"));
        for cell in cells {
            match cell {
                None => out.put_u8(b'n'),
                Some("~") => out.put_u8(b'u'),
                Some(text) => {
                    out.put_u8(b't');
                    out.put_u32(u32::try_from(text.len()).expect("short"));
                    out.put_slice(text.as_bytes());
                }
            }
        }
    }

    fn message(kind: u8, parts: &[(u8, &[Option<&str>])]) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(kind);
        out.put_u32(7);
        for (mark, part) in parts {
            cells(&mut out, *mark, part);
        }
        out.freeze()
    }

    fn text(text: &str) -> Cell {
        Cell::Text(text.into())
    }

    #[test]
    fn rows_are_read_with_what_is_known_of_their_past() {
        let read = |kind, parts: &[(u8, &[Option<&str>])]| parse(message(kind, parts)).expect("a message");
        let row: &[Option<&str>] = &[Some("1"), None, Some("~")];
        let tuple = vec![text("1"), Cell::Null, Cell::Unchanged];
        assert_eq!(read(b'I', &[(b'N', row)]), Message::Insert { table: 7, new: tuple.clone() });
        assert_eq!(read(b'U', &[(b'N', row)]), Message::Update { table: 7, old: None, new: tuple.clone() });
        let old = Old { whole: false, tuple: vec![text("0"), Cell::Null, Cell::Null] };
        let key: &[Option<&str>] = &[Some("0"), None, None];
        let both = read(b'U', &[(b'K', key), (b'N', row)]);
        assert_eq!(both, Message::Update { table: 7, old: Some(old.clone()), new: tuple.clone() });
        assert_eq!(read(b'D', &[(b'K', key)]), Message::Delete { table: 7, old });
        assert_eq!(read(b'D', &[(b'O', row)]), Message::Delete { table: 7, old: Old { whole: true, tuple } });
    }

    #[test]
    fn a_row_that_breaks_off_may_be_any() {
        let whole = message(b'U', &[(b'K', &[Some("0")]), (b'N', &[Some("long")])]);
        for length in 5..whole.len() {
            assert_eq!(parse(whole.slice(..length)), Some(Message::Anything { table: 7 }), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(Bytes::from(bytes));
        }
    }
}
