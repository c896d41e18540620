//! A resource that was found to fit the database, with everything a request needs to know of it.

use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

#[cfg(feature = "store")]
use super::Kind;
use super::{Column, Key, KeyError, Parameters, Table, Target, What, key, mapping};
use crate::config::{Defaults, GenerateKey, WriteKind};
use crate::store::Wanted;

/// How long entries live. All durations count from the moment the entry was stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Fresh for this long, at most.
    pub ttl: Duration,
    /// Each TTL is drawn from `[ttl * (1 - jitter), ttl]`, so that entries don't end together.
    pub jitter: f64,
    /// How long "not found" is cached; zero: never.
    pub negative_ttl: Duration,
    /// How long past its TTL an entry may be served when the database fails.
    pub stale_if_error: Duration,
    /// How long past its TTL an entry is served while one reader refreshes it.
    pub stale_while_revalidate: Duration,
    /// How eagerly an entry is refreshed before its TTL ends; 0: never.
    pub refresh_ahead: f64,
    /// How long an in-process tier may hold an entry; zero: not at all.
    pub local_ttl: Duration,
    /// The same for an entry that is hot; zero: no longer than others.
    pub local_hot_ttl: Duration,
}

impl Policy {
    /// The policy that these configured values describe.
    #[must_use]
    pub fn new(values: &Defaults) -> Self {
        Self {
            ttl: values.ttl,
            jitter: values.ttl_jitter,
            negative_ttl: values.negative_ttl,
            stale_if_error: values.stale_if_error,
            stale_while_revalidate: values.stale_while_revalidate,
            refresh_ahead: values.refresh_ahead,
            local_ttl: values.local_ttl,
            local_hot_ttl: values.local_hot_ttl,
        }
    }

    /// How long past its TTL an entry is of any use.
    #[must_use]
    pub fn grace(&self) -> Duration {
        self.stale_if_error.max(self.stale_while_revalidate)
    }
}

/// The store's own texts for one resource, written once when it is bound; the catalog can't read them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statements {
    /// One row by its key.
    pub row: String,
    /// Many rows by their keys.
    pub rows: String,
    /// One per declared list, in their order.
    pub lists: Vec<String>,
    /// A page of keys, in the order of the key: the first.
    pub first_keys: String,
    /// The page that begins after a key.
    pub next_keys: String,
}

/// One column of an ORDER BY, as a position in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// Position in [`Table::columns`].
    pub column: usize,
    /// Largest first.
    pub descending: bool,
}

/// A declared list: the rows whose `column` has one value.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// Position in [`Table::columns`].
    pub column: usize,
    /// The declared order, then the key.
    pub order: Vec<Order>,
    /// The most rows of one answer.
    pub limit: usize,
    /// How long its entries live.
    pub policy: Policy,
}

/// A table or view that is served.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    /// The name in paths, cache keys and metrics.
    pub name: Arc<str>,
    /// The table as the database described it.
    pub table: Table,
    /// Positions of the key's columns in [`Table::columns`].
    pub key: Vec<usize>,
    /// Positions of the columns that are shown, in the order they are shown.
    pub columns: Vec<usize>,
    /// The declared lists.
    pub lists: Vec<List>,
    /// How long rows live.
    pub policy: Policy,
    /// Which writes are allowed.
    pub write: Vec<WriteKind>,
    /// Who makes the key of a new row.
    pub generate_key: GenerateKey,
    /// A fingerprint of all that decides the bytes of an entry: another shape is another entry.
    pub shape: u64,
    /// What comes before the resource's name in its cache keys.
    pub key_prefix: String,
    /// The store's texts.
    pub statements: Statements,
    /// For the results of a statement: what it is given. [`Statements::row`] is the statement then.
    pub parameters: Option<Parameters>,
    /// The tables, quoted and with their schemas, whose change drops everything here.
    pub depends_on: Vec<String>,
    /// For each of them, the cache key of the generation that all its dependants share.
    pub groups: Vec<String>,
    /// The same for lists, where changes don't tell which of them they concern: any change drops them all.
    pub list_groups: Vec<String>,
    /// Writers hold entries while they commit, so that no reader is ever ahead of another.
    pub hold: bool,
    /// Changes are told a moment after they are visible.
    pub late: bool,
    /// Whether changes by others are seen. Where they aren't and should be, nothing is cached.
    pub capture: Capture,
    /// Keys that no row has are answered by a filter, if all that it needs is there.
    pub filter: bool,
}

/// Whether changes by others are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Nobody asked for it: TTLs bound how old an entry can be.
    Off,
    /// They are.
    On,
    /// They should be and aren't: served past the cache.
    Lacking,
}

impl Resource {
    /// Values that a program loads by keys of its own. Another `version` is another shape of them: older values are as
    /// good as absent.
    #[must_use]
    pub fn loaded(name: &str, policy: Policy, key_prefix: &str, version: u64) -> Self {
        Self::bare(name, policy, key_prefix, xxh3_64(format!("{name} loaded {version}").as_bytes()))
    }

    /// What no table stands behind: read only, without columns, and its changes are captured by nobody.
    pub(super) fn bare(name: &str, policy: Policy, key_prefix: &str, shape: u64) -> Self {
        let table = Table {
            schema: None,
            name: name.to_owned(),
            is_view: true,
            columns: Vec::new(),
            primary_key: Vec::new(),
            unique: Vec::new(),
        };
        Self {
            name: Arc::from(name),
            table,
            key: Vec::new(),
            columns: Vec::new(),
            lists: Vec::new(),
            policy,
            write: Vec::new(),
            generate_key: GenerateKey::Database,
            shape,
            key_prefix: key_prefix.to_owned(),
            statements: Statements::default(),
            parameters: None,
            depends_on: Vec::new(),
            groups: Vec::new(),
            list_groups: Vec::new(),
            hold: false,
            late: false,
            capture: Capture::Off,
            filter: false,
        }
    }

    /// The key's columns.
    #[must_use]
    pub fn key_columns(&self) -> impl ExactSizeIterator<Item = &Column> {
        self.key.iter().map(|position| &self.table.columns[*position])
    }

    /// The shown columns.
    #[must_use]
    pub fn shown_columns(&self) -> impl ExactSizeIterator<Item = &Column> {
        self.columns.iter().map(|position| &self.table.columns[*position])
    }

    /// The shown column of this name.
    #[must_use]
    pub fn shown(&self, name: &str) -> Option<&Column> {
        self.shown_columns().find(|column| column.name == name)
    }

    /// Whether the column is part of the key.
    #[must_use]
    pub fn is_key(&self, name: &str) -> bool {
        self.key_columns().any(|column| column.name == name)
    }

    /// Whether each key has one text alone, so that "not found" may be cached under it.
    #[must_use]
    pub fn exact_key(&self) -> bool {
        self.key_columns().all(|column| column.exact)
    }

    /// What keeps a filter from telling which rows there are.
    ///
    /// # Errors
    ///
    /// Why there is none, in words.
    pub fn filterable(&self) -> Result<(), &'static str> {
        if self.table.is_view || !self.depends_on.is_empty() {
            Err("needs a table of its own, whose changes name the rows: neither a view nor depends_on")
        } else if !self.exact_key() {
            Err("needs a key whose equal values have one text alone")
        } else if self.policy.negative_ttl.is_zero() {
            Err("needs a negative_ttl: with 0s \"not found\" is not to be remembered")
        } else {
            Ok(())
        }
    }

    /// Whether a filter may answer for its rows now.
    #[must_use]
    pub fn is_filtered(&self) -> bool {
        self.filter && self.capture == Capture::On && self.filterable().is_ok()
    }

    /// What the cache keys of its rows start with.
    #[must_use]
    pub fn row_prefix(&self) -> String {
        self.entry(":")
    }

    /// Whether this kind of write was declared.
    #[must_use]
    pub fn allows(&self, kind: WriteKind) -> bool {
        self.write.contains(&kind)
    }

    /// Whether a column can be written.
    ///
    /// # Errors
    ///
    /// Why not, in words that follow its name.
    pub fn writable(&self, name: &str) -> Result<(), &'static str> {
        match self.shown(name) {
            None => Err("there is no such column"),
            Some(column) if column.generated => Err("the database computes this column"),
            Some(_) => Ok(()),
        }
    }

    /// A key for a new row, where the database makes none.
    #[cfg(feature = "store")]
    #[must_use]
    pub fn make_key(&self) -> Option<String> {
        let as_uuid = self.key_columns().next().is_some_and(|column| column.kind == Kind::Uuid);
        match self.generate_key {
            GenerateKey::Database => None,
            GenerateKey::Ulid => {
                let made = ulid::Ulid::new();
                Some(if as_uuid { uuid::Uuid::from_u128(made.0).to_string() } else { made.to_string() })
            }
            GenerateKey::Uuidv7 => Some(uuid::Uuid::now_v7().to_string()),
        }
    }

    /// The query parameter that carries keys of a batch.
    #[must_use]
    pub fn batch_parameter(&self) -> &str {
        match self.key.as_slice() {
            [only] => &self.table.columns[*only].name,
            _ => "key",
        }
    }

    /// Parses a row's key from one text per key column.
    ///
    /// # Errors
    ///
    /// [`KeyError`] where no row can have it.
    pub fn row(self: &Arc<Self>, texts: Vec<String>) -> Result<Target, KeyError> {
        Ok(self.row_of(Key::parse(self.key_columns(), texts)?))
    }

    /// Parses a row's key as it is spelled in cache keys: `7,2`, with a comma inside one of several parts as `%2C`.
    ///
    /// # Errors
    ///
    /// [`KeyError`] where no row can have it.
    pub fn row_spelled(self: &Arc<Self>, spelled: &str) -> Result<Target, KeyError> {
        self.row(Key::texts(spelled, self.key.len())?)
    }

    /// The target of a key that is canonical already.
    #[must_use]
    pub fn row_of(self: &Arc<Self>, key: Key) -> Target {
        let mut entry = self.entry(":");
        key.spell(&mut entry);
        Target::new(Arc::clone(self), entry, What::Row(key))
    }

    /// The declared list on the column of this name, for one value.
    ///
    /// # Errors
    ///
    /// [`KeyError`] where no row can have the value.
    pub fn list(self: &Arc<Self>, index: usize, text: String) -> Result<Target, KeyError> {
        let value = key::canonical(&self.table.columns[self.lists[index].column], text)?;
        Ok(self.list_of(index, value))
    }

    /// The target of a list value that is canonical already.
    #[must_use]
    pub fn list_of(self: &Arc<Self>, index: usize, value: String) -> Target {
        let column = &self.table.columns[self.lists[index].column].name;
        let entry = mapping::list(&self.entry(""), column, &value);
        Target::new(Arc::clone(self), entry, What::List { index, value })
    }

    /// The row or list whose cache key this is; `None`: it is none of this resource.
    #[must_use]
    pub fn of_entry(self: &Arc<Self>, entry: &str) -> Option<Target> {
        let target = if let Some(spelled) = entry.strip_prefix(&self.row_prefix()) {
            self.row_spelled(spelled)
        } else {
            let (column, value) = entry.strip_prefix(&self.entry("?"))?.split_once('=')?;
            self.list(self.list_on(column)?, value.to_owned())
        };
        let target = target.ok()?;
        (target.entry() == entry).then_some(target)
    }

    /// The position of the list declared on the column of this name.
    #[must_use]
    pub fn list_on(&self, column: &str) -> Option<usize> {
        self.lists.iter().position(|list| self.table.columns[list.column].name == column)
    }

    /// Makes everything here depend on a table, named as SQL has it.
    pub fn depend_on(&mut self, relation: String, key_prefix: &str) {
        if !self.depends_on.contains(&relation) {
            let group = format!("{key_prefix}cache-aside:group:{relation}");
            self.groups.push(group.clone());
            self.list_groups.push(group);
            self.depends_on.push(relation);
        }
    }

    /// The tables whose changes concern this resource, and the columns that must come along.
    #[must_use]
    pub fn wanted(&self) -> Vec<Wanted> {
        let bare = |relation: &String| Wanted { relation: relation.clone(), columns: Vec::new() };
        let mut all: Vec<Wanted> = self.depends_on.iter().map(bare).collect();
        if !self.table.is_view {
            let columns = self.key_columns().chain(self.cached_lists()).map(|column| column.name.clone());
            all.push(Wanted { relation: self.table.relation(), columns: columns.collect() });
        }
        all
    }

    /// Learns that changes are captured by installations of these ids, whether any is lacking, and whether they leave out
    /// what a row was before. What was cached under other installations may have missed changes between them, so it is of
    /// another shape.
    pub fn captured(&mut self, ids: &[String], lacking: bool, partial: bool) {
        if partial {
            self.list_groups.push(format!("{}cache-aside:lists:{}", self.key_prefix, self.name));
        }
        if lacking {
            self.capture = Capture::Lacking;
        } else if !ids.is_empty() {
            self.capture = Capture::On;
            self.shape ^= xxh3_64(ids.join(",").as_bytes());
        }
    }

    fn entry(&self, mark: &str) -> String {
        let mut entry = String::with_capacity(self.key_prefix.len() + self.name.len() + 40);
        entry.push_str(&self.key_prefix);
        entry.push_str(&self.name);
        entry.push_str(mark);
        entry
    }
}
