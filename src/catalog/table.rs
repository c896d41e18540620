//! What a store tells the catalog about a table: names, types and how far they can be trusted as keys.

/// A table or view as the database describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The schema it was found in; `None` where the engine has none.
    pub schema: Option<String>,
    /// Its exact name, unquoted.
    pub name: String,
    /// Views are read only here, and need no unique key.
    pub is_view: bool,
    /// All columns, in the table's order.
    pub columns: Vec<Column>,
    /// The names of the primary key's columns, in its order; empty where there is none.
    pub primary_key: Vec<String>,
    /// The column sets of every other unique index that is neither partial nor on expressions.
    pub unique: Vec<Vec<String>>,
}

impl Table {
    /// The name as SQL has it: quoted, and with its schema.
    #[must_use]
    pub fn relation(&self) -> String {
        let quote = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
        match &self.schema {
            Some(schema) => format!("{}.{}", quote(schema), quote(&self.name)),
            None => quote(&self.name),
        }
    }

    /// The position of the column of this exact name.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// Whether one row at most can have given values in `columns`.
    #[must_use]
    pub fn is_unique(&self, columns: &[&str]) -> bool {
        let covers =
            |index: &Vec<String>| !index.is_empty() && index.iter().all(|name| columns.contains(&name.as_str()));
        covers(&self.primary_key) || self.unique.iter().any(covers)
    }
}

/// One column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its exact name, unquoted.
    pub name: String,
    /// The type as the engine writes it in a declaration, e.g. `character varying(20)`.
    pub type_name: String,
    /// The type to which a key's text is cast, where the engine casts; domains are resolved.
    pub cast: String,
    /// How a key of this type is spelled.
    pub kind: Kind,
    /// Whether equal values have one text alone. Where they don't (citext, `char(n)`, numeric,
    /// nondeterministic collations), a row is cached only under the text the database itself gives.
    pub exact: bool,
    /// Whether the type holds JSON documents, into which PATCH merges.
    pub json: bool,
    /// Computed by the database from other columns: it can't be written.
    pub generated: bool,
    /// Counted up by the database where no value is given, and told to whoever wrote the row (`AUTO_INCREMENT`).
    pub counted: bool,
    /// Whether NULL is allowed.
    pub nullable: bool,
}

/// How the text of a key or list value is checked before the database sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole numbers between two bounds, both included.
    Integer {
        /// The smallest value of the type.
        min: i128,
        /// The largest value of the type.
        max: i128,
    },
    /// Any text without NUL, up to a number of bytes where the type has such a limit.
    Text {
        /// The longest value in bytes, for types that would cut it silently.
        max_bytes: Option<usize>,
    },
    /// A UUID, in any of its usual spellings.
    Uuid,
    /// `true` or `false`.
    Boolean,
    /// Bytes, written `\x` and hexadecimal digits.
    Bytes,
    /// One of these labels.
    Label(Vec<String>),
    /// A decimal number of any size, or `NaN` and the infinities.
    Number,
    /// Everything else: the database judges the text, and its "no" is the client's mistake.
    Other,
}
