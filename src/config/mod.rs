//! One YAML file, overridden by the environment, parsed into types once: whatever reads a value later
//! need not doubt it.
//!
//! - one struct per section, with each default beside its field
//! - `load` goes through the steps: `yaml` reads the file into a `tree` that remembers lines, `interpolate` fills in
//!   `${NAME}`, then `well_known` variables, `overrides` and `compose`d URLs are laid over it, `shape` refuses what
//!   stands in the wrong place, serde makes the types, and `validate` judges what no single field can
//! - `units` are durations, sizes and numbers as people write them; `forms` describe them in the `schema`

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

mod env;
mod error;
mod file;
mod tree;
mod units;
mod yaml;

mod compose;
mod interpolate;
mod overrides;
mod well_known;

mod forms;
mod not_built_yet;
mod schema;
mod shape;
mod validate;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use access::{Access, AccessLevel, Digest, Scope, Token};
pub use cache::{Cache, Local};
pub use database::Database;
pub use env::Env;
pub use error::ConfigError;
pub(crate) use error::nearest;
pub use invalidation::{Invalidation, InvalidationMode};
pub use lifetimes::Defaults;
pub use queries::{Parameter, Query};
pub use resources::{Consistency, GenerateKey, List, Resource, WriteKind};
use schemars::JsonSchema;
pub use secret::SecretUrl;
use serde::Deserialize;
pub use server::Server;
pub use telemetry::{LogFormat, Telemetry};
pub use units::parse_duration;

/// The whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
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
    #[schemars(with = "forms::Named<Resource>", extend("propertyNames" = { "pattern": "^[a-z][a-z0-9_]*$" }))]
    pub resources: BTreeMap<String, Resource>,
    /// The served queries, by a name of the same form.
    #[schemars(with = "forms::Named<Query>", extend("propertyNames" = { "pattern": "^[a-z][a-z0-9_]*$" }))]
    pub queries: BTreeMap<String, Query>,
    /// How changes of other writers reach the cache.
    pub invalidation: Invalidation,
    /// Who may do what.
    pub access: Access,
    /// Logs and traces.
    pub telemetry: Telemetry,
}
