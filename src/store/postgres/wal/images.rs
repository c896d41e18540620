//! From decoded rows to the outbox's images, each text as the server sent it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::capture::{Column, Written};
use super::pgoutput::{Cell, Message, Old, RelationColumn, Tuple};
use crate::catalog::Image;

/// Of a transaction that changed more rows of a table, only that is told.
const MOST_ROWS: usize = 10_000;

/// A published table: what the stream and the catalogue say of it.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// In the order of the stream's rows.
    pub(super) columns: Vec<RelationColumn>,
    /// What is wanted of each row.
    pub(super) wanted: Vec<Column>,
}

impl Table {
    /// The rows that a change concerns, as far as they are known; `None`: any row.
    fn images(&self, message: &Message) -> BTreeSet<Option<Image>> {
        let anything = BTreeSet::from([None]);
        if self.wanted.iter().any(|column| column.kind == Written::Unsettled) {
            return anything;
        }
        let images = match message {
            Message::Insert { new, .. } => vec![self.image(new, None, false)],
            // An identity that is not told is what it was.
            Message::Update { old: None, new, .. } => vec![self.image(new, None, false), self.image(new, None, true)],
            Message::Update { old: Some(old), new, .. } => {
                vec![self.before(old), self.image(new, old.whole.then_some(&old.tuple), false)]
            }
            Message::Delete { old, .. } => vec![self.before(old)],
            _ => return anything,
        };
        images.into_iter().map(Some).collect()
    }

    fn before(&self, old: &Old) -> Image {
        self.image(&old.tuple, None, !old.whole)
    }

    /// `before`: the row's past, for what did not change and is not told.
    fn image(&self, tuple: &Tuple, before: Option<&Tuple>, identity_alone: bool) -> Image {
        let mut image = Image::new();
        for wanted in &self.wanted {
            let Some(position) = self.columns.iter().position(|column| column.name == wanted.name) else { continue };
            if identity_alone && !self.columns[position].identity {
                continue;
            }
            let cell = match tuple.get(position) {
                Some(Cell::Unchanged) => before.and_then(|before| before.get(position)),
                cell => cell,
            };
            match cell {
                Some(Cell::Text(text)) => image.insert(wanted.name.clone(), Some(text.clone())),
                // Beside an identity, what is not told is null too.
                Some(Cell::Null) if identity_alone => continue,
                Some(Cell::Null) => image.insert(wanted.name.clone(), None),
                Some(Cell::Unchanged) | None => continue,
            };
        }
        image
    }
}

/// What whole transactions changed, until it is in the outbox.
#[derive(Debug, Default)]
pub(super) struct Batch {
    xid: Option<u32>,
    /// How often the open transaction changed each table.
    told: HashMap<u32, usize>,
    rows: BTreeMap<u32, BTreeSet<(u32, Option<Image>)>>,
    count: usize,
}

impl Batch {
    /// Whether a transaction is under way.
    pub(super) fn is_open(&self) -> bool {
        self.xid.is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn begin(&mut self, xid: u32) {
        self.xid = Some(xid);
        self.told.clear();
    }

    pub(super) fn commit(&mut self) {
        self.xid = None;
    }

    /// Takes what has gathered: each table's changes, each with its transaction.
    pub(super) fn take(&mut self) -> BTreeMap<u32, BTreeSet<(u32, Option<Image>)>> {
        self.count = 0;
        std::mem::take(&mut self.rows)
    }

    /// Adds one change; `None` for `table`: it is not captured.
    pub(super) fn add(&mut self, id: u32, table: Option<&Table>, message: &Message) {
        let (Some(xid), Some(table)) = (self.xid, table) else { return };
        let told = self.told.entry(id).or_default();
        *told += 1;
        if *told > MOST_ROWS + 1 {
            return;
        }
        let images = if *told > MOST_ROWS { BTreeSet::from([None]) } else { table.images(message) };
        let rows = self.rows.entry(id).or_default();
        if images.contains(&None) {
            *told = MOST_ROWS + 1;
            let before = rows.len();
            rows.retain(|(of, _)| *of != xid);
            self.count -= before - rows.len();
        }
        for image in images {
            self.count += usize::from(rows.insert((xid, image)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::super::capture::{Column, Written};
    use super::super::pgoutput::{Cell, Message, Old, RelationColumn, Tuple};
    use super::{Batch, MOST_ROWS, Table};
    use crate::catalog::Image;

    /// Identity `id`; `id` and `group` are wanted.
    fn table() -> Table {
        let column = |name: &str, identity| RelationColumn { name: name.into(), identity };
        let wanted = |name: &str| Column { name: name.into(), type_name: "text".into(), kind: Written::Json };
        Table {
            columns: vec![column("id", true), column("more", false), column("group", false)],
            wanted: vec![wanted("id"), wanted("group")],
        }
    }

    fn tuple(cells: [&str; 3]) -> Tuple {
        let cell = |text: &str| match text {
            "" => Cell::Null,
            "~" => Cell::Unchanged,
            text => Cell::Text(text.into()),
        };
        cells.map(cell).into()
    }

    #[expect(clippy::unnecessary_wraps, reason = "what is told of a row is an option")]
    fn image(values: &[(&str, &str)]) -> Option<Image> {
        let value = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Some(values.iter().map(|(name, text)| ((*name).to_owned(), value(text))).collect())
    }

    fn told(message: &Message) -> BTreeSet<Option<Image>> {
        let mut batch = Batch::default();
        batch.begin(3);
        batch.add(7, Some(&table()), message);
        batch.commit();
        batch.take().remove(&7).into_iter().flatten().map(|(_, image)| image).collect()
    }

    #[test]
    fn what_is_not_told_of_a_row_is_left_out() {
        let (new, key) = (tuple(["1", "x", "b"]), tuple(["0", "", ""]));
        let full = image(&[("id", "1"), ("group", "b")]);
        assert_eq!(told(&Message::Insert { table: 7, new: new.clone() }), BTreeSet::from([full.clone()]));
        // The same key, in a group that nobody names.
        let update = Message::Update { table: 7, old: None, new: new.clone() };
        assert_eq!(told(&update), BTreeSet::from([full.clone(), image(&[("id", "1")])]));
        // Another key.
        let old = Old { whole: false, tuple: key.clone() };
        let moved = Message::Update { table: 7, old: Some(old.clone()), new: new.clone() };
        assert_eq!(told(&moved), BTreeSet::from([image(&[("id", "0")]), full.clone()]));
        assert_eq!(told(&Message::Delete { table: 7, old }), BTreeSet::from([image(&[("id", "0")])]));
        // With all of the old row, everything is known; what is stored elsewhere and did not change, too.
        let old = Old { whole: true, tuple: tuple(["1", "y", "a"]) };
        let whole = Message::Update { table: 7, old: Some(old.clone()), new: tuple(["1", "x", "~"]) };
        assert_eq!(told(&whole), BTreeSet::from([image(&[("group", "a"), ("id", "1")])]));
        let whole = Message::Update { table: 7, old: Some(old), new };
        assert_eq!(told(&whole), BTreeSet::from([image(&[("group", "a"), ("id", "1")]), full]));
    }

    #[test]
    fn a_truncate_or_too_many_rows_are_one_change_of_anything() {
        assert_eq!(told(&Message::Truncate { tables: vec![7] }), BTreeSet::from([None]));
        let mut batch = Batch::default();
        let row = |number: usize| Message::Insert { table: 7, new: tuple([&number.to_string(), "", ""]) };
        batch.begin(1);
        batch.add(7, Some(&table()), &row(0));
        batch.commit();
        batch.begin(2);
        (0..=MOST_ROWS).for_each(|number| batch.add(7, Some(&table()), &row(number)));
        batch.add(7, None, &row(0));
        batch.commit();
        assert_eq!(batch.len(), 2);
        let rows: Vec<(u32, bool)> =
            batch.take().remove(&7).into_iter().flatten().map(|(xid, image)| (xid, image.is_some())).collect();
        assert_eq!(rows, [(1, true), (2, false)]);
    }
}
