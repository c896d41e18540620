//! What a store tells of changes, whoever made them.

use crate::catalog::Image;

/// A table whose changes are to be captured, and the columns that come along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The table, quoted and with its schema.
    pub relation: String,
    /// Key and list columns.
    pub columns: Vec<String>,
}

/// How far changes of a table are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Captured {
    /// All of them.
    Complete {
        /// By this installation.
        id: String,
        /// Not every wanted column of a row comes as it was before the change.
        partial: bool,
        /// Changes are told a moment after they are visible: whoever claims to know them must wait for that.
        late: bool,
    },
    /// Not, or not yet: what is missing and what to do.
    Lacking(String),
    /// They can't be: why, and what that means.
    Never(String),
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The table, quoted and with its schema.
    pub relation: String,
    /// A row as it was or is; `None`: any row of the table may have changed.
    pub image: Option<Image>,
    /// Seconds since the change was made, by the database's clock.
    pub age: f64,
}

/// What changed since a point, and where that leads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Owed {
    /// Everything visible at this point is among the changes or was there before.
    pub point: String,
    /// Which database this is, and which of its lives; empty where it only follows another.
    pub origin: String,
    /// Nothing is missing. Otherwise the outbox does not reach back so far, or there was no point to begin with.
    pub complete: bool,
    /// What changed, in no order.
    pub changes: Vec<Change>,
}
