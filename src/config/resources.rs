//! `resources:` the tables and views that are served.

use std::collections::BTreeMap;
use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[cfg(feature = "config")]
use super::forms;
use super::lifetimes::overriding;
use super::units;

overriding! {
    /// A table or view that is served.
    pub struct Resource {
        /// `table` or `schema.table`, quoted as in SQL where needed. Default: the resource's name.
        pub table: String,
        /// The column that identifies a row, or a list of them; each once. Default: the primary key.
        #[serde(deserialize_with = "units::one_or_many")]
        #[cfg_attr(feature = "config", schemars(with = "forms::Names"))]
        pub key: Vec<String>,
        /// The columns that are shown, each once, the key's among them. Default: all.
        pub columns: Option<Vec<String>>,
        /// Who makes the key of a new row; `ulid` and `uuidv7` need a key of one column. Default `database`.
        pub generate_key: GenerateKey,
        /// What may be written, each kind once. Default: nothing.
        pub write: Vec<WriteKind>,
        /// Lists of rows by the value of a column. Default: none.
        #[cfg_attr(feature = "config", schemars(with = "forms::Named<List>"))]
        pub lists: BTreeMap<String, List>,
        /// For a view: the tables whose change drops its rows. Default: none.
        pub depends_on: Vec<String>,
        /// Keys that no row has are answered without a question to the database, by a filter of those that exist, in each process; with
        /// `redis://` or `valkey://` and invalidation `outbox` or `wal`. A new row is found at other replicas within
        /// `max_staleness`. Default `false`.
        #[serde(deserialize_with = "units::flag")]
        #[cfg_attr(feature = "config", schemars(with = "forms::Flag"))]
        pub filter: bool,
        /// What is promised to concurrent readers and writers. Default `fenced`.
        pub consistency: Consistency,
    }
}

/// A list of rows by the value of a column.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct List {
    /// Overrides the resource's `ttl`; more than 0.
    #[serde(with = "units::some_duration")]
    #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
    pub ttl: Option<Duration>,
    /// `name`, `name desc` or several of them with commas between; ties are broken by the key. Default: the key.
    pub order_by: Option<String>,
    /// The most rows of one answer, at least 1. Default 1000.
    #[serde(deserialize_with = "units::number")]
    pub limit: usize,
}

impl Default for List {
    fn default() -> Self {
        Self { ttl: None, order_by: None, limit: 1000 }
    }
}

/// Who makes the key of a new row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum GenerateKey {
    /// The service: a ULID.
    Ulid,
    /// The service: a UUID of version 7.
    Uuidv7,
    /// The database, or the client.
    #[default]
    Database,
}

/// A kind of write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum WriteKind {
    /// POST.
    Create,
    /// PUT and PATCH.
    Update,
    /// DELETE.
    Delete,
}

/// What is promised to concurrent readers and writers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Stale fills are refused.
    #[default]
    Fenced,
    /// Readers go to the database while a write is under way.
    Hold,
}
