//! One YAML file, overridden by the environment, parsed into types once: whatever reads a value later
//! need not doubt it.
//!
//! - one struct per section, with each default beside its field
//! - `tree` reads YAML and remembers lines; `overlay` lays the environment over it; `load` makes the types
//! - `units` are durations, sizes and numbers as people write them

mod access;
mod cache;
mod database;
mod env;
mod error;
mod invalidation;
mod load;
mod overlay;
mod resources;
mod secret;
mod server;
mod telemetry;
#[cfg(test)]
mod tests;
mod tree;
mod units;
mod validate;

use std::collections::BTreeMap;

pub use access::{Access, AccessLevel, Digest, Scope, Token};
pub use cache::{Cache, Local};
pub use database::Database;
pub use env::Env;
pub use error::ConfigError;
pub use invalidation::{Invalidation, InvalidationMode};
pub use resources::{Consistency, Defaults, GenerateKey, List, Parameter, Query, Resource, WriteKind};
use schemars::JsonSchema;
pub use secret::SecretUrl;
use serde::Deserialize;
pub use server::Server;
pub use telemetry::{LogFormat, Telemetry};

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
    /// The served tables, by the name under which they are served.
    pub resources: BTreeMap<String, Resource>,
    /// The served queries, by name.
    pub queries: BTreeMap<String, Query>,
    /// How changes of other writers reach the cache.
    pub invalidation: Invalidation,
    /// Who may do what.
    pub access: Access,
    /// Logs and traces.
    pub telemetry: Telemetry,
}
