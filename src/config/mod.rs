//! One YAML file, overridden by the environment, parsed into types once: whatever reads a value later
//! need not doubt it.
//!
//! - one struct per section, with each default beside its field
//! - `load` goes through the steps: `yaml` reads the file into a `tree` that remembers lines, `interpolate` fills in
//!   `${NAME}`, then `well_known` variables, `overrides` and `compose`d URLs are laid over it, `shape` refuses what
//!   stands in the wrong place, serde makes the types, and `validate` judges what no single field can
//! - without the feature `config` there are the types alone, to be filled in by code
//! - `units` are durations, sizes and numbers as people write them; `forms` describe them in the `schema`

#[cfg(feature = "config")]
mod load;

mod access;
mod cache;
mod database;
mod invalidation;
mod lifetimes;
mod queries;
mod resources;
mod secret;
mod server;
mod telemetry;

mod error;
mod not_built_yet;
#[cfg_attr(not(feature = "config"), allow(dead_code, reason = "what only the schema needs"))]
mod units;
mod validate;

#[cfg(feature = "config")]
mod env;
#[cfg(feature = "config")]
mod file;
#[cfg(feature = "config")]
mod tree;
#[cfg(feature = "config")]
mod yaml;

#[cfg(feature = "config")]
mod compose;
#[cfg(feature = "config")]
mod interpolate;
#[cfg(feature = "config")]
mod overrides;
#[cfg(feature = "config")]
mod well_known;

#[cfg(feature = "config")]
mod forms;
#[cfg(feature = "config")]
mod schema;
#[cfg(feature = "config")]
mod shape;

#[cfg(all(test, feature = "config"))]
mod tests;

use std::collections::BTreeMap;

pub use access::{Access, AccessLevel, Digest, Scope, Token};
pub use cache::{Cache, Local};
pub use database::Database;
#[cfg(feature = "config")]
pub use env::Env;
pub use error::ConfigError;
pub(crate) use error::nearest;
pub use invalidation::{Invalidation, InvalidationMode};
pub use lifetimes::Defaults;
pub use queries::{Parameter, Query};
pub use resources::{Consistency, GenerateKey, List, Resource, WriteKind};
#[cfg(feature = "config")]
use schemars::JsonSchema;
pub use secret::SecretUrl;
use serde::Deserialize;
pub use server::Server;
pub use telemetry::{LogFormat, Telemetry};
pub use units::parse_duration;

/// The whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The HTTP server.
    pub server: Server,
    /// The database that holds the truth.
    pub database: Database,
    /// The cache in front of it.
    pub cache: Cache,
    /// What any resource or query may override.
    pub defaults: Defaults,
    /// The served tables, by the name under which they are served: lower-case letters, digits and `_`, not `query` or
    /// `queries`.
    #[cfg_attr(feature = "config", schemars(with = "forms::Named<Resource>", extend("propertyNames" = { "pattern": "^[a-z][a-z0-9_]*$" })))]
    pub resources: BTreeMap<String, Resource>,
    /// The served queries, by a name of the same form.
    #[cfg_attr(feature = "config", schemars(with = "forms::Named<Query>", extend("propertyNames" = { "pattern": "^[a-z][a-z0-9_]*$" })))]
    pub queries: BTreeMap<String, Query>,
    /// How changes of other writers reach the cache.
    pub invalidation: Invalidation,
    /// Who may do what.
    pub access: Access,
    /// Logs and traces.
    pub telemetry: Telemetry,
}
