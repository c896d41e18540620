//! `database:` where the truth is.

use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::Deserialize;

#[cfg(feature = "config")]
use super::forms;
use super::{SecretUrl, units};

/// The database.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// `postgres://user:password@host/name`, `mysql://…`, `mariadb://…`, `sqlite:FILE` or `sqlite::memory:`. Also `DATABASE_URL`, or composed of
    /// `DB_ENGINE DB_HOST DB_PORT DB_USER DB_PASSWORD DB_NAME`. Required.
    pub url: SecretUrl,
    /// The most connections, at least 1. Default 16.
    #[serde(deserialize_with = "units::number")]
    pub pool_size: u32,
    /// Requests that may wait for a connection; past it they get 503 at once. Default 256.
    #[serde(deserialize_with = "units::number")]
    pub queue: u32,
    /// The database itself ends a statement that takes longer; more than 0. Default `2s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub statement_timeout: Duration,
    /// A streaming standby of PostgreSQL, with the same user: fills read there where it provably shows enough. Default:
    /// none.
    #[serde(deserialize_with = "units::some_text")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Text"))]
    pub replica_url: Option<SecretUrl>,
    /// A file of certificates (PEM) to trust instead of the system's. Default: none.
    #[serde(deserialize_with = "units::some_text")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Text"))]
    pub ca_file: Option<PathBuf>,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: SecretUrl::default(),
            pool_size: 16,
            queue: 256,
            statement_timeout: Duration::from_secs(2),
            replica_url: None,
            ca_file: None,
        }
    }
}
