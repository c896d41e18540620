//! `defaults:`, `resources:` and `queries:`: what is served, and how long it lives.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::Deserializer;

use super::units;

/// How long things live, unless a resource or query says otherwise.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Entries are fresh for this long. Also `CACHE_TTL`, in seconds. Default `1h`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub ttl: Duration,
    /// Each TTL is drawn from `[ttl*(1-jitter), ttl]`. Default 0.1.
    #[serde(deserialize_with = "units::number")]
    pub ttl_jitter: f64,
    /// How long "not found" is cached; `0s`: never. Default `5s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub negative_ttl: Duration,
    /// How long past its TTL an entry may still be served when the database fails. Default `10m`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub stale_if_error: Duration,
    /// How long past its TTL an entry is served while one reader refreshes it. Default `0s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub stale_while_revalidate: Duration,
    /// The beta of `XFetch`; 0: nothing is refreshed before its TTL ends. Default 1.
    #[serde(deserialize_with = "units::number")]
    pub refresh_ahead: f64,
    /// How long the in-process tier may hold an entry; `0s`: not at all. Default `0s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub local_ttl: Duration,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            ttl: Duration::from_hours(1),
            ttl_jitter: 0.1,
            negative_ttl: Duration::from_secs(5),
            stale_if_error: Duration::from_mins(10),
            stale_while_revalidate: Duration::ZERO,
            refresh_ahead: 1.0,
            local_ttl: Duration::ZERO,
        }
    }
}

/// A struct with the given fields, and one for each value of [`Defaults`] that it may override.
macro_rules! overriding {
    ($(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($fields)*
            /// Overrides `defaults.ttl`.
            #[serde(deserialize_with = "units::some_duration")]
            #[schemars(with = "String")]
            pub ttl: Option<Duration>,
            /// Overrides `defaults.ttl_jitter`.
            #[serde(deserialize_with = "units::some_number")]
            #[schemars(with = "f64")]
            pub ttl_jitter: Option<f64>,
            /// Overrides `defaults.negative_ttl`.
            #[serde(deserialize_with = "units::some_duration")]
            #[schemars(with = "String")]
            pub negative_ttl: Option<Duration>,
            /// Overrides `defaults.stale_if_error`.
            #[serde(deserialize_with = "units::some_duration")]
            #[schemars(with = "String")]
            pub stale_if_error: Option<Duration>,
            /// Overrides `defaults.stale_while_revalidate`.
            #[serde(deserialize_with = "units::some_duration")]
            #[schemars(with = "String")]
            pub stale_while_revalidate: Option<Duration>,
            /// Overrides `defaults.refresh_ahead`.
            #[serde(deserialize_with = "units::some_number")]
            #[schemars(with = "f64")]
            pub refresh_ahead: Option<f64>,
            /// Overrides `defaults.local_ttl`.
            #[serde(deserialize_with = "units::some_duration")]
            #[schemars(with = "String")]
            pub local_ttl: Option<Duration>,
        }

        impl $name {
            /// The values that hold for it.
            #[must_use]
            pub fn over(&self, defaults: &Defaults) -> Defaults {
                Defaults {
                    ttl: self.ttl.unwrap_or(defaults.ttl),
                    ttl_jitter: self.ttl_jitter.unwrap_or(defaults.ttl_jitter),
                    negative_ttl: self.negative_ttl.unwrap_or(defaults.negative_ttl),
                    stale_if_error: self.stale_if_error.unwrap_or(defaults.stale_if_error),
                    stale_while_revalidate: self.stale_while_revalidate.unwrap_or(defaults.stale_while_revalidate),
                    refresh_ahead: self.refresh_ahead.unwrap_or(defaults.refresh_ahead),
                    local_ttl: self.local_ttl.unwrap_or(defaults.local_ttl),
                }
            }
        }
    };
}

overriding! {
    /// A table or view that is served.
    pub struct Resource {
        /// `table` or `schema.table`, quoted as in SQL where needed. Default: the resource's name.
        pub table: String,
        /// The column that identifies a row, or a list of them. Default: the primary key.
        #[serde(deserialize_with = "units::one_or_many")]
        #[schemars(with = "StringOrList")]
        pub key: Vec<String>,
        /// The columns that are shown. Default: all.
        pub columns: Option<Vec<String>>,
        /// Who makes the key of a new row. Default `database`.
        pub generate_key: GenerateKey,
        /// What may be written. Default: nothing.
        pub write: Vec<WriteKind>,
        /// Lists of rows by the value of a column.
        pub lists: BTreeMap<String, List>,
        /// For a view: the tables whose change drops its rows.
        pub depends_on: Vec<String>,
        /// What is promised to concurrent readers and writers. Default `fenced`.
        pub consistency: Consistency,
    }
}

overriding! {
    /// A query that is served.
    pub struct Query {
        /// The statement, with `$1`, `$2`… for its parameters.
        pub sql: String,
        /// The parameters' names, in order.
        pub params: Vec<Parameter>,
        /// The tables whose change drops its results.
        pub depends_on: Vec<String>,
    }
}

/// A name or a list of names.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "describes the schema of a field that is parsed into a Vec")]
enum StringOrList {
    One(String),
    Many(Vec<String>),
}

/// Who makes the key of a new row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Stale fills are refused.
    #[default]
    Fenced,
    /// Readers go to the database while a write is under way.
    Hold,
}

/// A list of rows by the value of a column.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct List {
    /// Overrides the resource's `ttl`.
    #[serde(deserialize_with = "units::some_duration")]
    #[schemars(with = "String")]
    pub ttl: Option<Duration>,
    /// `name`, `name desc` or several of them with commas between; ties are broken by the key.
    pub order_by: Option<String>,
    /// The most rows of one answer. Default 1000.
    #[serde(deserialize_with = "units::number")]
    pub limit: usize,
}

impl Default for List {
    fn default() -> Self {
        Self { ttl: None, order_by: None, limit: 1000 }
    }
}

/// A query's parameter: a name, or a name with a default.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
pub struct Parameter {
    /// The name in the URL.
    pub name: String,
    /// What holds where it is not given.
    pub default: Option<String>,
}

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a parameter's name")]
        enum Form {
            Name(String),
            Whole { name: String, default: Option<String> },
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Name(name) => Self { name, default: None },
            Form::Whole { name, default } => Self { name, default },
        })
    }
}
